import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedistill import hub
from embedistill.corpus.docstrings import _to_record, find_packages, read_docstrings
from embedistill.corpus.preparation import prepare
from embedistill.corpus.reading import Columns, _parse_hub_name, describe_source, read_corpus
from embedistill.corpus.records import Record, load_corpus, save_corpus
from embedistill.errors import EmbedistillError, UsageError

TEXTS = ["Ein Öl.", "two words", "three, with comma"]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"texts.{kind}"
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    match kind:
        case "txt":
            path.write_text("\n\n".join(TEXTS), encoding="utf-8")
        case "txt.gz":
            path.write_bytes(gzip.compress("\n".join(TEXTS).encode()))
        case "csv":
            with path.open("w", encoding="utf-8-sig", newline="") as stream:
                writer = csv.DictWriter(stream, ["text", "n"])
                writer.writeheader()
                writer.writerows(rows)
        case "jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(source: Path | str, **columns: object) -> list[Record | None]:
    return list(read_corpus(str(source), Columns(**columns)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path, kind)) == [Record(text, "texts") for text in TEXTS]


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b one\nb two\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("c\n")
    (tmp_path / "notes.md").write_text("not read")
    assert [record.text for record in read(tmp_path) if record] == ["c", "b one", "b two"]


def bad(tmp_path: Path, name: str, content: bytes, **columns: object) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read(path, **columns)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_bad_input_says_where_what_and_what_to_do(tmp_path: Path) -> None:
    assert bad(tmp_path, "a.jsonl", b'{"body": "x", "id": 1}', text="text") == (
        "a.jsonl:1: no column 'text'; expected one of: body, id; set corpus.text_column or corpus.query_column"
    )
    assert bad(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": null}').startswith(
        "a.jsonl:2: text is null; expected a str"
    )
    assert bad(tmp_path, "a.jsonl", b'{"text": 3}').startswith(
        "a.jsonl:1: text is int 3; expected a string; mend the row"
    )
    assert bad(tmp_path, "a.jsonl", b'\n{"text": ').startswith("a.jsonl:2: not JSON")
    assert bad(tmp_path, "a.jsonl", b"[1]").startswith("a.jsonl:1: a JSON list")
    assert bad(tmp_path, "a.txt", b"fine\nna\xefve\n").startswith(
        "a.txt:2: byte 0xef is not UTF-8; expected text in UTF-8"
    )
    assert bad(tmp_path, "a.txt", b"\x7fELF\0\0\0").startswith("a.txt:1: a NUL byte: a binary file")
    assert bad(tmp_path, "a.txt", b"x" * 1_000_001).startswith(
        "a.txt:1: text has 1,000,001 characters; expected at most 100,"
    )
    assert bad(tmp_path, "a.csv", b"text\n" + b"x" * 1_000_001).startswith("a.csv:2: text has 1,000,001 characters")
    assert bad(tmp_path, "a.jsonl", b'{"text": "\\ud800"}').startswith("a.jsonl:1: text has half of a surrogate pair")
    assert bad(tmp_path, "a.parquet.gz", b"").startswith("a.parquet.gz: a .gz file; expected .txt, .csv, .jsonl")
    assert bad(tmp_path, "a.parquet", b"PAR1 no").startswith("a.parquet: Parquet")
    assert bad(tmp_path, "a.txt.gz", b"no gzip").startswith("a.txt.gz: Not a gzipped file")
    assert bad(tmp_path, "a.txt.gz", gzip.compress(b"a line\n" * 99)[:-9]).startswith("a.txt.gz: Compressed file ended")
    assert bad(tmp_path, "a.docx", b"").startswith("a.docx: a .docx file; expected .txt, .csv, .jsonl, .parquet")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, None, "y" * 60, "other", "more"]))
    records = read(path, bad_rows="skip", max_characters=50)
    assert records.count(None) == 2
    _, funnel = prepare(records, min_characters=1, size=None, holdout=0.4, seed=0)
    assert (funnel.read, funnel.bad) == (7, 2)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        describe_source(str(tmp_path / "nowhere.txt"))
    with pytest.raises(UsageError, match="a folder with no such file"):
        describe_source(str(tmp_path))
    with pytest.raises(UsageError, match="package 'no-such-package' is not installed; pip install no-such-package"):
        describe_source("docstrings:no-such-package")
    with pytest.raises(EmbedistillError, match="the Hub does not answer"):
        read("hf:org/dataset")


def test_rows_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, config: str | None, split: str) -> list[dict[str, str]]:
        if path != "org/d":
            raise ValueError(f"no config {config}")
        return [{"text": f"{config} {split}"}]

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("hf:org/d:en:test") == [Record("en test", "org/d:en:test")]
    with pytest.raises(UsageError, match="hf:org/other: no config None; expected hf:org/dataset"):
        read("hf:org/other")


def test_what_a_source_is_changes_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "txt")
    before = describe_source(str(path))
    assert describe_source(str(path)) == before
    path.write_text("other")
    assert describe_source(str(path)) != before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("o/d", ("o/d", None, "train")),
        ("o/d:test", ("o/d", None, "test")),
        ("o/d:train[:10%]".replace(":10", "10"), ("o/d", None, "train[10%]")),
        ("o/d:en", ("o/d", "en", "train")),
        ("o/d:en:validation", ("o/d", "en", "validation")),
    ],
)
def test_hub_names(name: str, parts: tuple[str, str | None, str]) -> None:
    assert _parse_hub_name(name) == parts


def test_documents_are_without_their_query() -> None:
    record = Record("pkg.f: Add two numbers. The sum is exact.", "pkg", "Add two numbers.")
    assert record.document == "pkg.f: The sum is exact."
    assert record.texts == ["pkg.f: The sum is exact.", "Add two numbers."]
    assert Record("a  b").texts == ["a  b"]


def test_preparation_does_not_depend_on_the_order_of_reading() -> None:
    records = [Record(f"text number {i}") for i in range(50)]
    settings = {"min_characters": 1, "size": 20, "holdout": 0.25, "seed": 3}
    forward, funnel = prepare(records, **settings)  # type: ignore[arg-type]
    backward, _ = prepare(reversed(records), **settings)  # type: ignore[arg-type]
    assert forward == backward
    assert (funnel.train, funnel.holdout, funnel.not_selected) == (15, 5, 30)
    other, _ = prepare(records, **{**settings, "seed": 4})  # type: ignore[arg-type]
    assert other != forward


def test_nothing_held_out_or_evaluated_is_trained_on() -> None:
    records = [Record(f"Text number {i}", query=f"number {i % 5}") for i in range(40)]
    splits, funnel = prepare(
        records, min_characters=1, size=None, holdout=0.05, seed=0, evaluation_texts={"text NUMBER  7", "number 3"}
    )
    trained = {text for record in splits["train"] for text in record.texts}
    assert not trained & {text for record in splits["holdout"] for text in record.texts}
    assert "number 3" not in trained
    assert funnel.in_evaluation == 40 - 2 - funnel.train > 0


def test_duplicates_and_short_texts_are_counted() -> None:
    records = [
        Record("One text"),
        Record("one  TEXT"),
        Record("x"),
        Record("two texts"),
        Record("three"),
        Record("four"),
    ]
    splits, funnel = prepare(records, min_characters=2, size=None, holdout=0.5, seed=0)
    assert str(funnel) == "6 read, 1 short, 1 duplicate, 2 train, 2 holdout"
    assert len(splits["train"]) == 2


def test_a_corpus_of_nothing_says_what_became_of_it() -> None:
    with pytest.raises(UsageError, match=r"0 records to train on and 0 to hold out \(3 read, 3 short\)"):
        prepare([Record("a")] * 3, min_characters=5, size=None, holdout=0.1, seed=0)


def test_a_corpus_survives_the_disk(tmp_path: Path) -> None:
    splits = {"train": [Record("a", "s", "q"), Record("b")], "holdout": [Record("c")]}
    save_corpus(tmp_path / "corpus.parquet", splits)  # type: ignore[arg-type]
    assert load_corpus(tmp_path / "corpus.parquet") == splits


def test_a_docstring_becomes_a_record() -> None:
    docstring = """Compute the :class:`~np.mean` of all ``values`` given. It skips what is not a number and never fails.

    Returns the mean, as one would think.

    Parameters
    ----------
    values : list
    """
    record = _to_record("pkg.mean", docstring, "pkg")
    assert record == Record(
        "pkg.mean: Compute the np.mean of all values given. It skips what is not a number and never fails. "
        "Returns the mean, as one would think.",
        "pkg",
        "Compute the np.mean of all values given.",
    )
    assert _to_record("pkg.f", "Do it.", "pkg") is None


def test_docstrings_of_an_installed_package() -> None:
    records = list(read_docstrings(find_packages(["filelock"])[0]))
    assert any(record.text.startswith("filelock.") and record.query for record in records)
