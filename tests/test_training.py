import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embedistill.architectures import read_config
from embedistill.errors import EmbedistillError
from embedistill.student.building import build_student
from embedistill.student.planning import plan_transformer
from embedistill.training import loop
from embedistill.training.loop import LengthGroupedSampler, Schedule, train
from embedistill.training.objectives import (
    DistillationLoss,
    Temperature,
    contrast,
    matrix_distance,
    similarity_divergence,
)
from embedistill.training.readings import Dev, Reading, find_fault, measure


def test_similarity_divergence_by_hand() -> None:
    """Three vectors; without itself each row has two others, so each softmax is a logistic of a difference."""
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    temperature = 0.5

    def row(first: float, second: float) -> tuple[float, float]:
        p = 1 / (1 + math.exp((second - first) / temperature))
        return p, 1 - p

    teacher_rows = [row(0.6, 0.0), row(0.6, 0.8), row(0.0, 0.8)]
    student_rows = [row(0.8, 0.0), row(0.8, 0.6), row(0.0, 0.6)]
    expected = sum(
        p * math.log(p / q)
        for ps, qs in zip(teacher_rows, student_rows, strict=True)
        for p, q in zip(ps, qs, strict=True)
    )
    assert similarity_divergence(student, teacher, temperature).item() == pytest.approx(expected / 3, rel=1e-5)
    assert similarity_divergence(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    assert similarity_divergence(teacher[:1], teacher[:1], temperature).item() == 0


class Echo(torch.nn.Module):
    """A model whose embeddings are its inputs."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["x"]}


def test_the_loss_is_its_weighted_terms() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    constant = Temperature(0.1, 0.1)
    terms = DistillationLoss(Echo(), {"embedding": 2.0, "similarity": 0.0}, constant)([{"x": student}], teacher)
    assert {name: value.item() for name, value in terms.items()} == {"embedding": pytest.approx(2 * 0.4 / 2)}
    both = DistillationLoss(Echo(), {"embedding": 1.0, "similarity": 3.0}, constant)([{"x": student}], teacher)
    assert both["similarity"].item() == pytest.approx(3 * similarity_divergence(student, teacher, 0.1).item())


def test_matrix_distance_by_hand() -> None:
    """Cosines of the pairs: .6, 0, .8 of the student, .8, 0, .6 of the teacher; each pair counts twice of six."""
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 1.0, 0.0]])
    assert matrix_distance(student, teacher).item() == pytest.approx((0.2**2 + 0.2**2) / 3)
    assert matrix_distance(2 * student, teacher).item() == pytest.approx((1.6**2 + 2.6**2) / 3)  # no diagonal
    assert matrix_distance(student[:1], teacher[:1]).item() == 0


def test_contrast_by_hand() -> None:
    """Rows of cosines to the teacher's vectors: (.6, .8) and (0, 1); the positives are on the diagonal."""
    student, teacher = torch.tensor([[0.6, 0.8], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    first = -math.log(math.exp(0.6 / 0.5) / (math.exp(0.6 / 0.5) + math.exp(0.8 / 0.5)))
    second = -math.log(math.exp(1 / 0.5) / (1 + math.exp(1 / 0.5)))
    assert contrast(student, teacher, 0.5).item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert contrast(student[:1], teacher[:1], 0.5).item() == 0


def test_spread_by_hand() -> None:
    """One pair of cosine .6 in two dimensions: its mean squared, and nothing, .36 being less than 1/2, for the rest."""
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = DistillationLoss(Echo(), {"embedding": 1.0, "spread": 2.0}, Temperature(0.1, 0.1))
    assert loss([{"x": student}], student)["spread"].item() == pytest.approx(2 * 0.6**2)


def test_prefixes_are_vectors_of_their_own() -> None:
    """Of (3, 4, 0) and (4, 3, 12) the first two dimensions have a cosine of .96, the first alone of 1."""
    student, teacher = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[4.0, 3.0, 12.0]])
    loss = DistillationLoss(Echo(), {"embedding": 1.0}, Temperature(0.1, 0.1), prefixes=[1, 2, 3])
    expected = (0 + (1 - 0.96) + (1 - 24 / 65)) / 3
    assert loss([{"x": student}], teacher)["embedding"].item() == pytest.approx(expected, rel=1e-5)


def test_temperatures_go_from_start_to_end() -> None:
    assert [Temperature(0.1, 0.02, "linear").at(share) for share in (0, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02])
    cosine = Temperature(0.1, 0.02, "cosine")
    assert [cosine.at(share) for share in (0, 0.25, 1)] == pytest.approx([0.1, 0.1 - 0.08 * (1 - 0.5**0.5) / 2, 0.02])


def test_training_takes_the_temperature_along(setting: SimpleNamespace, tmp_path: Path) -> None:
    seen: list[float] = []

    class Seen(Temperature):
        def at(self, progress: float) -> float:
            seen.append(progress)
            return super().at(progress)

    run(setting, tmp_path, schedule=replace(SCHEDULE, steps=4), temperature=Seen(0.1, 0.02))
    assert sorted(set(seen)) == [0, 0.25, 0.5, 0.75]


def test_batches_hold_every_text_once_and_texts_of_like_length() -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 500, 1000)]
    sampler = LengthGroupedSampler(Dataset.from_dict({"text": texts}), batch_size=16, drop_last=False, seed=1)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    assert len(batches) == len(sampler) == 63
    spread = [max(len(texts[i]) for i in batch) - min(len(texts[i]) for i in batch) for batch in batches]
    assert np.median(spread) < 50
    assert batches == list(sampler)
    sampler.set_epoch(1)
    assert batches != list(sampler)


SCHEDULE = Schedule(
    epochs=2,
    minutes=None,
    batch_size=16,
    learning_rate=1e-3,
    warmup=0.1,
    weight_decay=0.01,
    checkpoint_steps=10,
    seed=1,
)


@pytest.fixture
def setting(mpnet_dir: Path, sentences: list[str]) -> SimpleNamespace:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    sentences = sentences[:240]
    vectors = teacher.encode(sentences)
    plan = plan_transformer(read_config(mpnet_dir), [0, 3])
    return SimpleNamespace(
        make_student=lambda: build_student(teacher, plan, sentences[:100], vectors[:100])[0],
        texts=sentences,
        vectors=vectors,
        targets=lambda rows: vectors[rows],
    )


def run(setting: SimpleNamespace, folder: Path, **changes: object) -> SentenceTransformer:
    options = {
        "targets": setting.targets,
        "weights": {"embedding": 1.0, "similarity": 1.0},
        "temperature": Temperature(0.1, 0.1),
        "schedule": SCHEDULE,
        "work_dir": folder / "checkpoints",
        "log_path": folder / "log.jsonl",
        **changes,
    }
    targets = options.pop("targets")
    return train(setting.make_student(), setting.texts, targets, **options)  # type: ignore[arg-type]


def agreement(model: SentenceTransformer, setting: SimpleNamespace) -> float:
    return float((model.encode(setting.texts) * setting.vectors).sum(1).mean())


def test_training_brings_the_student_nearer_and_logs_every_term(setting: SimpleNamespace, tmp_path: Path) -> None:
    before = agreement(setting.make_student(), setting)
    student = run(setting, tmp_path)
    assert 1 - agreement(student, setting) < 0.9 * (1 - before)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert {"embedding", "similarity", "learning_rate", "step"} <= set(steps[0])
    assert steps[0]["loss"] == pytest.approx(steps[0]["embedding"] + steps[0]["similarity"], abs=1e-3)


def test_the_same_seed_gives_the_same_student(setting: SimpleNamespace, tmp_path: Path) -> None:
    first, second = run(setting, tmp_path / "a"), run(setting, tmp_path / "b")
    np.testing.assert_allclose(first.encode(setting.texts), second.encode(setting.texts), atol=1e-5)


@pytest.mark.parametrize("watched", [False, True])
def test_a_stopped_training_goes_on_to_the_same_student(
    setting: SimpleNamespace, tmp_path: Path, watched: bool
) -> None:
    class Stop(BaseException):
        pass

    reads = 0

    def stopping(rows: np.ndarray) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads == 26:
            raise Stop
        return setting.vectors[rows]

    dev = Dev(setting.texts[:40], setting.vectors[:40]) if watched else None
    whole = run(setting, tmp_path / "whole", dev=dev)
    with pytest.raises(Stop):
        run(setting, tmp_path / "stopped", targets=stopping, dev=dev)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    broken = checkpoints / "checkpoint-999"  # as a kill in the middle of writing leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    again = run(setting, tmp_path / "stopped", dev=dev)
    assert int(last.name.split("-")[1]) >= 20
    np.testing.assert_allclose(again.encode(setting.texts), whole.encode(setting.texts), atol=1e-4)
    log = (tmp_path / "stopped" / "log.jsonl").read_text()
    entries = [json.loads(line) for line in log.splitlines()]
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)
    read = [entry["step"] for entry in entries if "dev_cosine" in entry]
    assert read == ([0, *range(3, 31, 3)] if watched else [])


def test_a_lost_loss_stops_the_run_and_says_why(setting: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(EmbedistillError, match=r"training, step \d+: .*not finite; lower training\.learning_rate"):
        run(setting, tmp_path, targets=lambda rows: setting.vectors[rows] * np.float32("nan"))


def test_minutes_bound_the_steps_and_leave_the_student_as_it_was(
    setting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CALIBRATION_SECONDS", 0.1)
    schedule = Schedule(**{**SCHEDULE.__dict__, "epochs": 1000, "minutes": 0.01})
    run(setting, tmp_path, schedule=schedule)
    steps = json.loads((tmp_path / "checkpoints" / "plan.json").read_text())["steps"]
    assert 1 <= steps < 1000 * 15
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in log) == steps
    assert not (tmp_path / "checkpoints" / "calibration").exists()


def test_steps_bound_the_training(setting: SimpleNamespace, tmp_path: Path) -> None:
    run(setting, tmp_path, schedule=replace(SCHEDULE, steps=7))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in log) == 7


def test_readings_by_hand() -> None:
    """Three unit vectors: the cosines of their pairs are 0, 1, 0 and the teacher's 1, 0, 0."""
    vectors = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    targets = np.array([[0, 1], [0, 1], [1, 0]], np.float32)
    found = measure(vectors, targets)
    assert found.cosine == pytest.approx(2 / 3)
    assert found.similarity == pytest.approx(-1 / 2)
    assert found.spread == pytest.approx(2 / 3)
    shares = math.sqrt(2) / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)  # singular values: the roots of 2 and 1
    assert found.rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert measure(vectors[[0, 0, 0]], targets).spread == pytest.approx(0)
    assert measure(vectors[[0, 0, 0]], targets).rank == pytest.approx(1)


@pytest.mark.parametrize(
    ("now", "fault"),
    [
        (Reading(0.75, 0.9, 0.7, 90), None),
        (Reading(0.57, 0.9, 0.7, 90), None),
        (Reading(0.55, 0.9, 0.7, 90), "diverged: cosine to the teacher's 0.550, where 0.800 was at the start"),
        (Reading(0.75, 0.9, 0.19, 90), "collapsed, .*spread 0.19, where 0.9 was"),
        (Reading(0.75, 0.9, 0.7, 24), "collapsed, .*rank 24, where 100 was"),
        (Reading(math.nan, 0.9, 0.7, 90), "not finite"),
    ],
)
def test_a_lost_student_is_told_by_its_readings(now: Reading, fault: str | None) -> None:
    untrained, teacher = Reading(0.8, 0.9, 0.9, 100), Reading(1, 1, 0.8, 110)
    found = find_fault(now, untrained, teacher)
    assert found is None if fault is None else re.search(fault, str(found))


def test_a_student_that_learns_similarities_alone_may_leave_the_teachers_space() -> None:
    untrained, teacher = Reading(0.8, 0.9, 0.9, 100), Reading(1, 1, 0.8, 110)
    assert find_fault(Reading(0.1, 0.9, 0.9, 100), untrained, teacher, "similarity") is None
    assert "diverged: similarity" in str(find_fault(Reading(0.8, 0.5, 0.9, 100), untrained, teacher, "similarity"))


@dataclass(frozen=True)
class Scripted(Dev):
    """Gives readings from a list, and keeps the weights that each was of."""

    cosines: Sequence[float] = ()
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def read(self, student: SentenceTransformer) -> Reading:
        self.seen.append({name: value.clone() for name, value in student.state_dict().items()})
        return Reading(self.cosines[len(self.seen) - 1], 0.9, 0.5, 10)


@pytest.mark.parametrize(("cosines", "best"), [([0.5, 0.7, 0.6, 0.65], 1), ([0.5, 0.4, 0.4, 0.4], 0)])
def test_the_best_weights_are_kept_not_the_last(
    setting: SimpleNamespace, tmp_path: Path, cosines: list[float], best: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines)
    student = run(setting, tmp_path, schedule=replace(SCHEDULE, dev_steps=10), dev=dev)
    assert len(dev.seen) == 4
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, dev.seen[best][name])
    assert any(not torch.equal(value, dev.seen[3][name]) for name, value in student.state_dict().items())
    said = capsys.readouterr().err
    assert f"Kept: the weights of step {10 * best}" in said
    assert ("No step was better than the untrained student" in said) == (best == 0)


def test_a_student_that_is_lost_stops_the_run_and_leaves_the_best_weights(
    setting: SimpleNamespace, tmp_path: Path
) -> None:
    dev = Scripted(setting.texts[:20], setting.vectors[:20], [0.5, 0.6, 0.3, 0.55, 0.3, 0.2])
    with pytest.raises(EmbedistillError, match=r"step 25: the student diverged.*lower .*learning_rate.*of step 5"):
        run(setting, tmp_path, schedule=replace(SCHEDULE, dev_steps=5), dev=dev)
    weights = load_file(tmp_path / "checkpoints" / "best.safetensors")
    name = next(name for name in weights if name.endswith(("query.weight", ".q.weight")))
    torch.testing.assert_close(weights[name], dev.seen[1][name])


def test_a_learning_rate_far_too_high_is_found_out(setting: SimpleNamespace, tmp_path: Path) -> None:
    dev = Dev(setting.texts[:60], setting.vectors[:60])
    with pytest.raises(EmbedistillError, match=r"the student (collapsed|diverged).*lower training\.learning_rate"):
        run(setting, tmp_path, schedule=replace(SCHEDULE, learning_rate=1.0), dev=dev)
