from pathlib import Path

import datasets
import pytest

from embedistill import hub
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.tasks import RetrievalTask, StsTask, describe_tasks, load_task, load_tasks, save_sts


def test_sets_from_a_folder(data_dir: Path) -> None:
    sts = load_task("STS12", data_dir)
    assert isinstance(sts, StsTask)
    assert len(sts.sentences1) == len(sts.scores) == 40
    tiny = load_task("Tiny", data_dir)
    assert isinstance(tiny, RetrievalTask)
    assert (len(tiny.queries), len(tiny.documents)) == (10, 30)
    assert tiny.relevance[0] == {0: 2.0, 5: 1.0}


def test_a_set_that_is_not_there_names_those_that_are(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"STS99: not in .* expected one of: STS12, STSBenchmark, Tiny"):
        load_task("STS99", data_dir)
    with pytest.raises(UsageError, match="no such folder"):
        load_task("STS12", tmp_path / "nowhere")


def test_without_folder_and_hub_a_set_is_an_error_or_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EmbedistillError, match="the Hub does not answer; name a folder that has it"):
        load_task("STSBenchmark", None)
    assert load_tasks(["STSBenchmark"], None, skip_missing=True) == []
    assert "Task STSBenchmark is left out" in capsys.readouterr().err


def test_sets_from_the_hub_are_those_that_mteb_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(path: str, **options: object) -> list[dict[str, object]]:
        asked.append((path, options))
        return [{"sentence1": "a", "sentence2": "b", "score": 1.0}, {"sentence1": "c", "sentence2": "d", "score": 5.0}]

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("STSBenchmark", None)
    assert isinstance(task, StsTask)
    assert (task.sentences1, task.scores) == (["a", "c"], [1.0, 5.0])
    ((path, options),) = asked  # type: ignore[misc]
    assert path == "mteb/stsbenchmark-sts"
    assert len(options["revision"]) == 40
    assert options["split"] == "test"
    with pytest.raises(UsageError, match="SciFact: a task of type Retrieval; expected an STS set"):
        load_task("SciFact", None)
    with pytest.raises(UsageError, match="Nonsense: not a task of mteb"):
        load_task("Nonsense", None)


def test_bad_sets_say_where(tmp_path: Path) -> None:
    (tmp_path / "sts").mkdir()
    path = tmp_path / "sts" / "X.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"}\n')
    with pytest.raises(UsageError, match=r"X\.jsonl:2: sentence1; expected an object with sentence1, sentence2, score"):
        load_task("X", tmp_path)
    for bad, message in (
        ('{"sentence1": "a", "sentence2": null, "score": 1}', "sentence2 is None; expected a string"),
        ('{"sentence1": "a", "sentence2": "b", "score": NaN}', "score is nan; expected a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": "x"}', "score is 'x'; expected a number"),
    ):
        path.write_text(bad)
        with pytest.raises(UsageError, match=message):
            load_task("X", tmp_path)
    path.write_bytes(b'{"sentence1": "\xff"}')
    with pytest.raises(UsageError, match=r"X\.jsonl:1: byte 0xff is not UTF-8"):
        load_task("X", tmp_path)
    path.write_text("")
    with pytest.raises(UsageError, match="0 pairs; expected two"):
        load_task("X", tmp_path)


def test_a_saved_set_is_the_same(data_dir: Path, tmp_path: Path) -> None:
    task = load_task("STS12", data_dir)
    assert isinstance(task, StsTask)
    save_sts(task, tmp_path)
    assert load_task("STS12", tmp_path) == task


def test_what_a_set_is_changes_with_its_file(data_dir: Path) -> None:
    before = describe_tasks(["STS12", "Tiny"], data_dir)
    assert before == describe_tasks(["STS12", "Tiny"], data_dir)
    assert len(before[1]) >= 4
    assert describe_tasks(["STS12"], None) == [["STS12"]]
