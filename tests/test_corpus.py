import csv
import errno
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedistill import hub
from embedistill.corpus.docstrings import _to_record, find_packages, read_docstrings
from embedistill.corpus.filtering import drop_near_duplicates, make_filter
from embedistill.corpus.preparation import prepare
from embedistill.corpus.reading import Columns, _file_rows, _parse_hub_name, describe_source, read_corpus, read_pairs
from embedistill.corpus.records import Record, choose_kind, load_corpus, save_corpus
from embedistill.corpus.selection import select, share_out
from embedistill.errors import EmbedistillError, UsageError
from embedistill.recipe import CorpusSection
from embedistill.sources import check_corpus

anything = make_filter(1, damaged=False, language=None)
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


def test_a_column_without_a_name_is_neither_query_nor_negative(tmp_path: Path) -> None:
    """Such as the row numbers that pandas writes."""
    (tmp_path / "frame.csv").write_text(",text\n0,the first\n1,the second\n")
    found = list(read_corpus(str(tmp_path / "frame.csv"), Columns()))
    assert found == [Record("the first", "frame"), Record("the second", "frame")]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path, kind)) == [Record(text, "texts") for text in TEXTS]


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b one\nb two\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("c\n")
    (tmp_path / "notes.md").write_text("not read")
    assert [record.text for record in read(tmp_path) if record] == ["c", "b one", "b two"]


def test_every_file_of_a_folder_is_looked_at_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    check_corpus(CorpusSection(source=str(tmp_path)))
    (tmp_path / "b.jsonl").write_text('{"body": "of another column"}\n')
    with pytest.raises(UsageError, match=r"b\.jsonl:1: no column 'text'"):
        check_corpus(CorpusSection(source=str(tmp_path)))


def test_most_texts_say_what_a_corpus_is_judged_on() -> None:
    documents, queries = [Record("d", query="q")], [Record(text, kind="query") for text in ("a", "b")]
    assert choose_kind(documents + queries) == (queries, "query")
    assert choose_kind(documents + queries[:1]) == (documents, "document")


def test_queries_are_kept_as_such(tmp_path: Path) -> None:
    path = tmp_path / "searches.txt"
    path.write_text("where is it\nwhat is it\n")
    records = [record for record in read(path, kind="query") if record]
    assert [record.parts for record in records] == [[("query", "where is it")], [("query", "what is it")]]
    save_corpus(tmp_path / "corpus.parquet", {"train": records, "holdout": [Record("d", negative="n")]})
    assert load_corpus(tmp_path / "corpus.parquet") == {"train": records, "holdout": [Record("d", negative="n")]}
    table = pq.read_table(tmp_path / "corpus.parquet").drop_columns(["kind"])  # as runs of before have it
    pq.write_table(table, tmp_path / "corpus.parquet")
    assert {record.kind for some in load_corpus(tmp_path / "corpus.parquet").values() for record in some} == {
        "document"
    }


def bad(tmp_path: Path, name: str, content: bytes, **columns: object) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read(path, **columns)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_bad_input_says_where_what_and_what_to_do(tmp_path: Path) -> None:
    assert bad(tmp_path, "a.jsonl", b'{"body": "x", "id": 1}', text="text") == (
        "a.jsonl:1: no column 'text'; expected one of: body, id; set corpus.text_column, query_column or source_column"
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
    csv_of_two = b'text,n\n\n"one\n\nline",1\n\n"two, 2\n"three",3\n'
    assert bad(tmp_path, "a.csv", csv_of_two).startswith("a.csv:7: not CSV: ',' expected after '\"'; expected rows of")
    assert bad(tmp_path, "a.csv", b'text\n"he said "hi" there"\n').startswith("a.csv:2: not CSV: ',' expected after")
    assert bad(tmp_path, "a.csv", b"text\n\n \n\nfine\n", max_characters=3).startswith("a.csv:5: text has 4 char")
    assert bad(tmp_path, "a.csv", b'text\n"one\ntwo\n').startswith("a.csv:2: not CSV: unexpected end of data")
    assert bad(tmp_path, "a.jsonl", b'{"text": "\\ud800"}').startswith("a.jsonl:1: text has half of a surrogate pair")
    row_too_long = b"text,n\nfine,1\nHello, world and more,2\n"
    assert bad(tmp_path, "a.csv", row_too_long).startswith("a.csv:3: beyond its columns '2'; expected a cell for each")
    assert bad(tmp_path, "a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n").startswith("a.jsonl:1: not JSON: ")
    assert bad(tmp_path, "a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n").startswith("a.jsonl:1: not JSON: ")
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
    _, funnel = prepare(records, find_rule=anything, size=None, holdout=0.4, seed=0)
    assert (funnel.read, funnel.bad) == (7, 2)


def test_a_row_need_not_have_a_query_or_a_negative(tmp_path: Path) -> None:
    rows = [{"text": "one", "title": "a"}, {"text": "two", "title": None}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tmp_path / "a.jsonl", query="title")
    assert [record.query for record in found if record] == ["a", None, None]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"title": "no text"}\n')
    assert read(tmp_path / "b.jsonl", bad_rows="skip") == [Record("one", "b"), None]
    pairs = [
        {"anchor": "q1", "positive": "p1"},
        {"anchor": "q2", "positive": "p2", "negative": "n2"},
        {"anchor": "q3", "positive": "p3", "negative": None},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    paired = list(read_pairs(tmp_path / "pairs.jsonl", max_characters=100, bad_rows="error"))
    assert [record.negative for record in paired if record] == [None, "n2", None]
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}')
    with pytest.raises(UsageError, match=r"no column 'positive'; .*; call its columns anchor, positive and"):
        next(read_pairs(tmp_path / "b.jsonl", max_characters=100, bad_rows="error"))


def test_of_a_parquet_file_what_is_asked_for_is_read(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "title": ["a", "b"], "odd": [[1.0] * 768, None], "source": ["s", "t"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (_, row), *_ = _file_rows(tmp_path / "a.parquet", Columns())
    assert row == {"text": "one", "source": "s"}
    with pytest.raises(UsageError, match="no column 'body'; expected one of: text, title, odd, source"):
        read(tmp_path / "a.parquet", text="body")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        read(tmp_path)


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
    def load_dataset(path: str, config: str | None, split: str, **settings: bool) -> Iterator[dict[str, str]]:
        if path != "org/d":
            raise ValueError(f"no config {config}")
        yield {"text": f"{config} {split}", "title": "a title"}
        yield {"text": f"streaming: {settings.get('streaming', False)}", "title": "another"}

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    whole = "org/d:en:test"
    assert read(f"hf:{whole}") == [Record("en test", whole), Record("streaming: False", whole)]
    assert read("hf:org/d:train[:1]#title") == [Record("a title", "org/d:train[:1]")]
    assert read("hf:org/d:train[:2]")[1].text == "streaming: True"  # only so many rows are fetched
    with pytest.raises(UsageError, match="no column 'body'; expected one of: text, title"):
        read("hf:org/d#body")
    with pytest.raises(UsageError, match="hf:org/d:a:b:c: too many parts; expected hf:org/dataset"):
        read("hf:org/d:a:b:c")
    with pytest.raises(UsageError, match="hf:org/other: no config None; expected hf:org/dataset"):
        read("hf:org/other")


def test_what_a_source_is_changes_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "txt")
    before = describe_source(str(path))
    assert describe_source(str(path)) == before
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])  # as many bytes
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert describe_source(str(path)) != before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("o/d", ("o/d", None, "train")),
        ("o/d:test", ("o/d", None, "test")),
        ("o/d:train[:10%]", ("o/d", None, "train[:10%]")),
        ("o/d:en:train[5:10]", ("o/d", "en", "train[5:10]")),
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
    assert Record("a  b", query="c").document == "a  b"
    assert Record("Ant: an insect. An Ant  is small.", query="Ant").document == ": an insect. An Ant is small."
    assert Record("I have a  dog. Ants too.", query="a").document == "I have a  dog. Ants too."
    assert Record("Red Ants bite. A Red Ant is small.", query="Red Ant").document == "Red Ants bite. A is small."
    assert Record("Why C++? It is fast.", query="Why C++?").document == "It is fast."


def test_preparation_does_not_depend_on_the_order_of_reading() -> None:
    records = [Record(f"text number {i}") for i in range(50)]
    settings = {"find_rule": anything, "size": 20, "holdout": 0.25, "seed": 3}
    forward, funnel = prepare(records, **settings)  # type: ignore[arg-type]
    backward, _ = prepare(reversed(records), **settings)  # type: ignore[arg-type]
    assert forward == backward
    assert (funnel.train, funnel.holdout, funnel.not_selected) == (15, 5, 30)
    other, _ = prepare(records, **{**settings, "seed": 4})  # type: ignore[arg-type]
    assert other != forward


def test_nothing_held_out_or_evaluated_is_trained_on() -> None:
    records = [Record(f"Text number {i}", query=f"number {i % 5}") for i in range(40)]
    settings: dict[str, Any] = {"find_rule": anything, "size": None, "holdout": 0.05, "seed": 0}
    splits, _ = prepare(records, **settings, evaluation_texts={"number 3"})
    trained = {text for record in splits["train"] for text in record.texts}
    assert not trained & {text for record in splits["holdout"] for text in record.texts}
    assert "number 3" not in trained
    alone = [Record(f"Text number {i}") for i in range(40)]
    splits, funnel = prepare(alone, **settings, evaluation_texts={f"text NUMBER  {i}" for i in range(20)})
    held = {text for record in splits["train"] for text in (record.text, *record.texts)}
    assert "Text number 3" not in held
    asked = {f"Text number {i}" for i in range(20)}
    assert not asked & {record.text for record in splits["train"]}
    assert funnel.in_evaluation == 20 - len(asked & {record.text for record in splits["holdout"]})
    queried = [Record(f"Word{i} number {i}", query=f"Word{i}") for i in range(40)]  # whose documents are "number 3"
    splits, _ = prepare(queried, **settings, evaluation_texts={f"word{i} number {i}" for i in range(20)})
    assert not {f"number {i}" for i in range(20)} & {record.document for record in splits["train"]}


def test_a_query_that_many_texts_share_costs_none_of_them() -> None:
    """Such as the title Introduction: of 40 with it, held out or not, no text is lost, and none is trained on."""
    records = [Record(f"Chapter number {i}", query="Introduction") for i in range(40)]
    records += [Record(f"Part number {i}", query=f"Title {i}", negative="Chapter number 3") for i in range(60)]
    splits, funnel = prepare(records, find_rule=anything, size=None, holdout=0.1, seed=2)
    held = {text for record in splits["holdout"] for text in record.texts}
    assert "Introduction" in held
    assert (funnel.train, funnel.holdout, funnel.in_evaluation) == (89, 10, 0)
    assert funnel.examples["in_holdout"] == ["Chapter number 3"]  # a negative of what is held out
    assert not held & {text for record in splits["train"] for text in record.texts}


def test_what_is_selected_is_held_out_and_selected_again_as_it_comes() -> None:
    """By cost an eighth of what is selected is long: so it is of what is held out, and of what is drawn again."""
    records = [Record(f"short {i}") for i in range(1000)] + [Record(f"{i} " + "long " * 100) for i in range(1000)]

    def count_long(some: Sequence[Record]) -> int:
        return sum(len(record.text) > 100 for record in some)

    splits, _ = prepare(records, find_rule=anything, size=800, holdout=0.25, seed=3, by="cost")
    selected = splits["train"] + splits["holdout"]
    assert len(splits["holdout"]) == 200
    assert 80 < count_long(selected) < 110  # 800 / (1 + sqrt(501 / 9)) or so
    assert count_long(splits["holdout"]) == pytest.approx(count_long(selected) / 4, abs=12)
    assert count_long(splits["train"][:200]) == pytest.approx(count_long(selected) / 4, abs=12)
    again, _ = prepare(selected, find_rule=anything, size=200, holdout=0.5, seed=3, by="random")
    assert count_long(again["train"] + again["holdout"]) == pytest.approx(count_long(selected) / 4, abs=12)
    more, _ = prepare(selected, find_rule=anything, size=400, holdout=0.5, seed=3, by="random")
    assert {record.text for record in again["holdout"]} <= {record.text for some in more.values() for record in some}


def test_duplicates_and_short_texts_are_counted() -> None:
    records = [
        Record("One text"),
        Record("one  TEXT"),
        Record("x"),
        Record("two texts"),
        Record("three"),
        Record("four"),
    ]
    splits, funnel = prepare(
        records, find_rule=make_filter(2, damaged=False, language=None), size=None, holdout=0.5, seed=0
    )
    assert str(funnel) == "6 read, 1 short, 1 duplicate, 2 train, 2 holdout"
    assert len(splits["train"]) == 2


def test_a_text_may_come_with_several_queries() -> None:
    records = [Record("a text", query=f"question {number}") for number in (1, 2, 2)]
    splits, funnel = prepare(
        [*records, *(Record(f"other {n}") for n in range(4))], find_rule=anything, size=None, holdout=0.3, seed=1
    )
    everything = splits["train"] + splits["holdout"]
    assert funnel.duplicate == 1
    assert len(everything) + funnel.in_holdout == 6


def test_a_corpus_of_nothing_says_what_became_of_it() -> None:
    with pytest.raises(UsageError, match=r"0 records to train on and 0 to hold out \(3 read, 3 short\)"):
        prepare(
            [Record("a")] * 3, find_rule=make_filter(5, damaged=False, language=None), size=None, holdout=0.1, seed=0
        )


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


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("An ordinary English sentence about the weather of today.", None),
        ("x", "short"),
        ("Itâ€™s broken, as UTF-8 that was read as Windows-1252 is.", "damaged"),
        ("A character was lost here: \ufffd, and nobody saw it.", "damaged"),
        ("Dies ist ein ganz gewöhnlicher deutscher Satz über das Wetter.", "language"),
        ("Kurz.", None),
    ],
)
def test_rules_have_names(text: str, rule: str | None) -> None:
    assert make_filter(3, damaged=True, language="en")(Record(text)) == rule


def test_what_is_left_out_is_counted_with_examples() -> None:
    records = [Record(f"text number {number}") for number in range(20)]
    records += [Record(f"x{number}") for number in range(12)]
    _, funnel = prepare(records, find_rule=make_filter(5, damaged=False, language=None), size=None, holdout=0.2, seed=0)
    assert funnel.counts["short"] == 12
    assert funnel.examples["short"] == [f"x{number}" for number in range(10)]


def test_the_source_of_a_row_is_in_a_column_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mixed.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "genre": ["news", "letters"], "label": [0, 1]}), path)

    def sources(**columns: str) -> list[str]:
        return [record.source for record in read_corpus(str(path), Columns(**columns)) if record]

    assert sources(source="genre") == ["news", "letters"]
    assert sources(source="label") == ["0", "1"]
    assert sources() == ["mixed", "mixed"]
    with pytest.raises(UsageError, match=r"no column 'gender'; expected one of: text.*source_column"):
        sources(source="gender")


def test_near_duplicates_are_dropped_and_counted() -> None:
    text = "The quick brown fox jumps over the lazy dog while the sun goes down behind the hills"
    records = [Record(text), Record(text + "."), Record("Something else altogether is written in this one here")]
    kept, dropped = drop_near_duplicates(records)
    assert ([one.text for one in kept], dropped) == ([text, records[2].text], [records[1]])
    asked = [replace(record, query=query) for record in records for query in ("one", "two")]
    kept, dropped = drop_near_duplicates(asked)  # a text that comes with another query is no copy
    assert (kept, dropped) == ([*asked[:2], *asked[4:]], asked[2:4])
    many = records + [Record(hashlib.sha256(bytes([number])).hexdigest()) for number in range(8)]
    _, funnel = prepare(many, find_rule=anything, size=None, holdout=0.2, seed=0, near_duplicates=False)
    assert funnel.near_duplicate == 1


def test_shares_are_as_even_as_counts_allow() -> None:
    assert share_out(Counter(a=2, b=50, c=50), 20) == {"a": 2, "b": 9, "c": 9}
    assert share_out(Counter(a=2, b=3), 20) == {"a": 2, "b": 3}
    assert share_out(Counter(a=90, b=90), 40, {"a": 3, "b": 1}) == {"a": 30, "b": 10}
    assert share_out(Counter(a=15, b=90), 40, {"a": 3, "b": 1}) == {"a": 15, "b": 25}


def test_records_are_selected_by_source_length_and_cost() -> None:
    records = [
        Record("x" * (10 if number % 10 else 200), "rare" if number % 10 == 3 else "often") for number in range(100)
    ]
    assert Counter(record.source for record in select(records, 20, "source")) == {"rare": 10, "often": 10}
    assert Counter(len(record.text) for record in select(records, 20, "length")) == {10: 10, 200: 10}
    assert select(records, 20, "random") == records[:20]
    costly = [Record("x" * (16 if number % 5 else 64)) for number in range(100)]  # 80 / 4 to 20 / 8
    assert Counter(len(record.text) for record in select(costly, 45, "cost")) == {16: 40, 64: 5}
    assert select(records, None, "source") == records


def test_a_diverse_selection_takes_of_every_cluster() -> None:
    """Ninety texts of one kind and ten of another; by chance two of twenty would be of the second."""
    records = [Record(f"common {number}" if number % 10 else f"rare {number}") for number in range(100)]

    def embed(texts: Sequence[str]) -> np.ndarray:
        jitter = np.random.default_rng(0).normal(scale=0.01, size=(len(texts), 3))
        found = np.array([[1, 0, 0] if text.startswith("common") else [0, 1, 0] for text in texts]) + jitter
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    chosen = select(records, 60, "diversity", embed)
    assert len(chosen) == 60
    assert sum(record.text.startswith("rare") for record in chosen) == 10


def test_pairs_are_records_with_a_query(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"anchor": "a question", "positive": "an answer", "negative": "no answer"}\n')
    (record,) = read_pairs(path, max_characters=100, bad_rows="error")
    assert record == Record("an answer", "pairs", "a question", "no answer")
    assert record.texts == ["an answer", "a question", "no answer"]
    path.write_text('{"anchor": "a question", "answer": "an answer"}\n')
    with pytest.raises(UsageError, match="no column 'positive'"):
        list(read_pairs(path, max_characters=100, bad_rows="error"))


def test_a_corpus_of_several_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.txt").write_text("second\n")
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert [record.text for record in read_corpus(sources, Columns()) if record] == ["first", "second"]
    assert len(describe_source(sources)) == 2
