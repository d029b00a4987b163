import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from embedistill.architectures import read_config
from embedistill.errors import EmbedistillError
from embedistill.student.building import build_student
from embedistill.student.planning import plan_transformer
from embedistill.training import loop
from embedistill.training.loop import LengthGroupedSampler, Schedule, train
from embedistill.training.objectives import DistillationLoss, similarity_divergence


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
    terms = DistillationLoss(Echo(), {"embedding": 2.0, "similarity": 0.0}, 0.1)([{"x": student}], teacher)
    assert {name: value.item() for name, value in terms.items()} == {"embedding": pytest.approx(2 * 0.4 / 2)}
    both = DistillationLoss(Echo(), {"embedding": 1.0, "similarity": 3.0}, 0.1)([{"x": student}], teacher)
    assert both["similarity"].item() == pytest.approx(3 * similarity_divergence(student, teacher, 0.1).item())


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
        "temperature": 0.1,
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


def test_a_stopped_training_goes_on_to_the_same_student(setting: SimpleNamespace, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    reads = 0

    def stopping(rows: np.ndarray) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads == 26:
            raise Stop
        return setting.vectors[rows]

    whole = run(setting, tmp_path / "whole")
    with pytest.raises(Stop):
        run(setting, tmp_path / "stopped", targets=stopping)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    broken = checkpoints / "checkpoint-999"  # as a kill in the middle of writing leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    again = run(setting, tmp_path / "stopped")
    assert int(last.name.split("-")[1]) >= 20
    np.testing.assert_allclose(again.encode(setting.texts), whole.encode(setting.texts), atol=1e-4)
    log = (tmp_path / "stopped" / "log.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in log.splitlines()]
    assert steps == sorted(steps)


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
