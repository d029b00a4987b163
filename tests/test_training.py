import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from embedistill.architectures import read_config
from embedistill.errors import EmbedistillError, LostError, UsageError
from embedistill.student.building import build_student
from embedistill.student.planning import plan_transformer
from embedistill.student.static import build_static
from embedistill.training import batches, callbacks, loop, objectives
from embedistill.training.batches import (
    Batching,
    BudgetSampler,
    TargetCollator,
    count_batches,
    count_tokens,
    find_neighbours,
    shorten,
    spread_from_centres,
)
from embedistill.training.internals import Internals, relation_divergence, states_distance
from embedistill.training.loop import Schedule, train
from embedistill.training.objectives import (
    Course,
    DistillationLoss,
    contrast,
    contrast_pairs,
    crowding,
    matrix_distance,
    ranking_distance,
    similarity_divergence,
)
from embedistill.training.optimiser import RowAdamW
from embedistill.training.packed import list_runs, without_padding
from embedistill.training.readings import Dev, Reading, find_fault, measure


def test_similarity_divergence_by_hand() -> None:
    """Three vectors; without itself each row has two others, so each softmax is a logistic of a difference."""
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]])
    temperature = 0.5

    def row(first: float, second: float) -> tuple[float, float]:
        p = 1 / (1 + math.exp((second - first) / temperature))
        return p, 1 - p

    teacher_rows = [row(0.6, 0.0), row(0.6, 0.8), row(0.0, 0.8)]
    student_rows = [row(0.8, -0.6), row(0.8, 0.0), row(-0.6, 0.0)]
    expected = sum(
        p * math.log(p / q)
        for ps, qs in zip(teacher_rows, student_rows, strict=True)
        for p, q in zip(ps, qs, strict=True)
    )
    assert similarity_divergence(student, teacher, temperature).item() == pytest.approx(expected / 3, rel=1e-5)
    reverse = sum(
        q * math.log(q / p)
        for ps, qs in zip(teacher_rows, student_rows, strict=True)
        for p, q in zip(ps, qs, strict=True)
    )
    loss = DistillationLoss(Echo(), weigh(similarity=1, reverse_similarity=2), Course(temperature, temperature))
    terms = loss([{"x": student.requires_grad_()}], label(teacher))
    assert terms["similarity"].item() == pytest.approx(expected / 3, rel=1e-5)
    assert terms["reverse_similarity"].item() == pytest.approx(2 * reverse / 3, rel=1e-5)
    assert reverse != pytest.approx(expected, rel=1e-2)
    assert torch.autograd.grad(terms["reverse_similarity"], student)[0].abs().max() > 0
    assert similarity_divergence(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    assert similarity_divergence(teacher[:1], teacher[:1], temperature).item() == 0
    alone = loss([{"x": student[:1]}], label(teacher[:1]))["reverse_similarity"]
    assert torch.autograd.grad(alone, student)[0].abs().max() == 0


class Echo(torch.nn.Module):
    """A model whose embeddings are its inputs."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["x"]}


def weigh(**weights: float) -> dict[str, Course]:
    return {term: Course(weight, weight) for term, weight in weights.items()}


def label(teacher: torch.Tensor, *positives: int) -> dict[str, torch.Tensor]:
    places = torch.tensor(positives or [-1] * len(teacher))
    return {"vectors": teacher, "positives": places, "kin": torch.arange(len(teacher))}


def test_the_loss_is_its_weighted_terms() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    constant = Course(0.1, 0.1)
    terms = DistillationLoss(Echo(), weigh(embedding=2, similarity=0), constant)([{"x": student}], label(teacher))
    assert {name: value.item() for name, value in terms.items()} == {"embedding": pytest.approx(2 * 0.4 / 2)}
    both = DistillationLoss(Echo(), weigh(embedding=1, similarity=3), constant)([{"x": student}], label(teacher))
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
    loss = DistillationLoss(Echo(), weigh(embedding=1, spread=2), Course(0.1, 0.1))
    assert loss([{"x": student}], label(student))["spread"].item() == pytest.approx(2 * 0.6**2)


def test_spread_counts_what_the_second_moment_has_above_one_in_dim() -> None:
    """One pair of cosine .8 in two dimensions: .64 for its mean squared, .64 - 1/2 for the rest."""
    student = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    loss = DistillationLoss(Echo(), weigh(spread=1), Course(0.1, 0.1))
    assert loss([{"x": student}], label(student))["spread"].item() == pytest.approx(0.64 + 0.14)


def test_spread_is_the_regulariser_of_sentence_transformers() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 0.5, dim=1)
    expected = sum(GlobalOrthogonalRegularizationLoss(Echo()).compute_gor(vectors))  # type: ignore[arg-type]
    assert crowding(vectors).item() == pytest.approx(float(expected), rel=1e-5)
    assert crowding(vectors[:1]).item() == 0


def test_prefixes_are_vectors_of_their_own() -> None:
    """Of (3, 4, 0) and (4, 3, 12) the first two dimensions have a cosine of .96, the first alone of 1."""
    student, teacher = torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[4.0, 3.0, 12.0]])
    loss = DistillationLoss(Echo(), weigh(embedding=1), Course(0.1, 0.1), prefixes=[1, 2])  # and all three
    expected = (0 + (1 - 0.96) + (1 - 24 / 65)) / 3
    assert loss([{"x": student}], label(teacher))["embedding"].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_inside_a_student_has_no_prefixes() -> None:
    asked: list[str] = []
    internals = SimpleNamespace(
        watched=lambda features: nullcontext(), distance=lambda term: asked.append(term) or torch.tensor(0.5)
    )
    loss = DistillationLoss(Echo(), weigh(embedding=1, layers=2), Course(0.1, 0.1), [1, 2])
    loss.internals = internals
    vectors = torch.tensor([[3.0, 4.0, 0.0]])
    assert loss([{"x": vectors}], label(vectors))["layers"].item() == 2 * 0.5
    assert asked == ["layers"]


def test_temperatures_go_from_start_to_end() -> None:
    assert [Course(0.1, 0.02, "linear").at(share) for share in (0, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02])
    cosine = Course(0.1, 0.02, "cosine")
    assert [cosine.at(share) for share in (0, 0.25, 1)] == pytest.approx([0.1, 0.1 - 0.08 * (1 - 0.5**0.5) / 2, 0.02])


def test_training_takes_the_temperature_along(setting: SimpleNamespace, tmp_path: Path) -> None:
    seen: list[float] = []

    class Seen(Course):
        def at(self, progress: float) -> float:
            seen.append(progress)
            return super().at(progress)

    run(setting, tmp_path, schedule=replace(SCHEDULE, steps=4), temperature=Seen(0.1, 0.02))
    assert sorted(set(seen)) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def sampler(texts: list[str], *, steps: int, **batching: object) -> BudgetSampler:
    lengths = np.array([len(text) for text in texts], np.float32)
    given = Batching(**{"size": 16, "seed": 1, **batching})
    dataset = Dataset.from_dict({"text": texts})
    return BudgetSampler(dataset, lengths=lengths, batching=given, steps=steps, batch_size=16, drop_last=False)


def test_batches_hold_every_text_once_an_epoch_and_texts_of_any_length() -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 500, 1000)]
    made = sampler(texts, steps=125)
    batches = list(made)
    assert len(batches) == len(made) == 125
    assert {len(batch) for batch in batches} == {16}  # what an epoch leaves over begins the next
    rows = [row for batch in batches for row in batch]
    for epoch in (rows[:1000], rows[1000:]):
        assert sorted(epoch) == list(range(1000))
    assert rows[:1000] != rows[1000:]
    spread = [max(len(texts[i]) for i in batch) - min(len(texts[i]) for i in batch) for batch in batches]
    assert min(spread) > 200
    assert batches == list(made)


def test_a_batch_has_no_more_tokens_than_asked_for() -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 500, 1000)]
    batches = list(sampler(texts, steps=300, tokens=1000, size=64))
    tokens = [sum(len(texts[row]) for row in batch) for batch in batches]
    assert max(tokens) <= 1000
    assert max(map(len, batches)) <= 64
    assert np.mean(tokens) > 700


def test_batches_are_cut_into_parts_of_the_same_size() -> None:
    texts = ["x" * (1 + number % 7) for number in range(90)]
    whole, parts = list(sampler(texts, steps=6)), list(sampler(texts, steps=6, parts=2))
    assert len(parts) == 12
    for number, batch in enumerate(whole):
        first, second = parts[2 * number : 2 * number + 2]
        assert len(first) == len(second)
        assert sorted(first + second) == sorted(batch)


def test_no_text_is_lost_between_parts() -> None:
    texts = ["x" * (1 + number % 7) for number in range(91)]
    parts = list(sampler(texts, steps=6, size=16, parts=5))
    assert all(len({len(part) for part in parts[start : start + 5]}) == 1 for start in range(0, len(parts), 5))
    assert len({row for part in parts for row in part}) == sum(map(len, parts)) >= 91 - 4


@pytest.mark.parametrize("n_parts", [2, 4, 8])
def test_batches_within_budgets_are_the_same_in_any_number_of_parts(n_parts: int) -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 500, 1000)]
    companions = np.full((1000, 2), -1)
    companions[:300, 0], companions[500:800, 0] = np.arange(500, 800), np.arange(300)  # texts with and without a pair
    given = {"steps": 20, "tokens": 20_000, "size": 96, "companions": companions}
    whole, parts = list(sampler(texts, **given)), list(sampler(texts, parts=n_parts, **given))
    assert max(sum(len(texts[row]) for row in batch) for batch in whole) <= 20_000
    for number, batch in enumerate(whole):
        some = parts[n_parts * number : n_parts * (number + 1)]
        assert sorted(itertools.chain(*some)) == sorted(batch)
        assert {len(part) for part in some} == {len(batch) // n_parts}
        pairs = {row for row in batch if companions[row, 0] in batch}
        assert all(companions[row, 0] in part for part in some for row in pairs & set(part))


def test_an_epoch_has_as_many_batches_as_are_counted() -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 500, 1000)]
    lengths = np.array([len(text) for text in texts], np.float32)
    neighbours = np.random.default_rng(1).integers(0, 1000, (1000, 4))
    for batching in ({"tokens": 2_000, "size": 64}, {"size": 16, "neighbours": neighbours}):
        counted = count_batches(lengths, Batching(seed=1, **batching))
        counted = math.ceil(counted)
        batches = list(sampler(texts, steps=counted + 1, **batching))
        assert len(set(itertools.chain(*batches))) == 1000
        assert len(set(itertools.chain(*batches[: counted - 2]))) < 1000


def test_a_pair_is_in_one_part() -> None:
    texts = ["x" * (1 + number % 7) for number in range(64)]
    companions = np.array([[number ^ 1, -1] for number in range(64)])  # 0 and 1, 2 and 3, ...
    for part in sampler(texts, steps=8, parts=2, companions=companions):
        assert {row ^ 1 for row in part} == set(part)


@pytest.mark.parametrize("n_parts", [2, 4, 8])
def test_pairs_alone_stay_together_in_parts_of_a_budgeted_batch(n_parts: int) -> None:
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(1, 30, 1000)]
    companions = np.array([[number ^ 1, -1] for number in range(1000)])
    for part in sampler(texts, steps=60, size=72, tokens=1_200, parts=n_parts, companions=companions):
        assert {row ^ 1 for row in part} == set(part)


def test_companions_are_in_the_batch_of_their_text() -> None:
    texts = ["x" * (1 + number % 7) for number in range(64)]
    companions = np.array([[(number + 1) % 64, -1] for number in range(64)])
    neighbours = np.array([[(number + 2) % 64] for number in range(64)])
    for batch in sampler(texts, steps=8, tokens=60, companions=companions, neighbours=neighbours):
        assert len(batch) == len(set(batch)) <= 16
        assert sum(len(texts[row]) for row in batch) <= 60
        alone = [row for row in batch if not {(row + 1) % 64, (row + 2) % 64} <= set(batch)]
        assert all({(row - 1) % 64, (row - 2) % 64} & set(batch) for row in alone)  # a companion itself
        assert len(alone) < len(batch)


def test_batches_too_small_for_their_parts_are_an_error() -> None:
    with pytest.raises(UsageError, match="no batch of 4 texts or more, for 4 parts"):
        list(sampler(["x"] * 3, steps=3, size=2, parts=4))


def test_a_curriculum_starts_with_what_is_easy() -> None:
    texts = [str(number) for number in range(1000)]
    difficulty = np.arange(1000, dtype=np.float32)[::-1].copy()  # the last is the easiest
    batches = list(sampler(texts, steps=400, difficulty=difficulty))
    assert min(row for batch in batches[:8] for row in batch) >= 800
    assert min(row for batch in batches[-32:] for row in batch) < 50


def test_a_curriculum_of_small_batches_comes_to_its_end() -> None:
    """Of four texts each, where the budget of tokens is the tighter one."""
    texts = ["x" * 10] * 1000
    difficulty = np.arange(1000, dtype=np.float32)
    batches = list(sampler(texts, steps=100, size=256, tokens=40, difficulty=difficulty))
    assert max(row for batch in batches[:8] for row in batch) < 200
    assert max(row for batch in batches[-16:] for row in batch) > 900


def test_neighbours_by_hand() -> None:
    angles = np.radians([0, 10, 25, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert find_neighbours(vectors, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert find_neighbours(np.ones((3, 2), np.float32), 2).shape == (3, 2)


def test_neighbours_among_many_are_nearly_those_of_an_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 16))[random.integers(60, size=3000)] + 0.5 * random.normal(size=(3000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    exact = find_neighbours(vectors, 5)
    monkeypatch.setattr(batches, "_CLUSTERED", 1000)
    found = find_neighbours(vectors, 5)
    assert (found != np.arange(3000)[:, None]).all()
    recall = np.mean([len(set(here) & set(there)) / 5 for here, there in zip(found, exact, strict=True)])
    assert 0.95 < recall < 1  # 16 of 54 clusters are searched: not all


def test_shortened_vectors_keep_their_similarities() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(500, 20)) @ random.normal(size=(20, 300))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    short = shorten(lambda rows: vectors[rows], 500)
    assert short.shape == (500, 128)
    np.testing.assert_allclose(short @ short.T, vectors @ vectors.T, atol=1e-3)


def test_what_is_far_from_every_centre_is_difficult() -> None:
    """Of eight texts, at 0, 75 and 90 degrees, in two clusters, the one at 75 is the farthest from its centre."""
    angles = np.radians([0, 0, 0, 0, 90, 90, 90, 75])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    far = spread_from_centres(vectors)
    assert far.argmax() == 7
    np.testing.assert_allclose(far[:4], 0, atol=1e-6)


def test_collated_labels_are_vectors_and_places_of_positives(setting: SimpleNamespace) -> None:
    partners = np.full(len(setting.texts), -1)
    partners[[3, 7]] = 7, 3
    collator = TargetCollator(setting.make_student().preprocess, targets=setting.targets, partners=partners)
    batch = collator([{"text": setting.texts[row], "label": row} for row in (5, 7, 3)])
    np.testing.assert_array_equal(batch["label"]["vectors"].numpy(), setting.vectors[[5, 7, 3]])
    assert batch["label"]["positives"].tolist() == [-1, 2, 1]
    assert batch["label"]["kin"].tolist() == [5, 7, 3]
    batch = replace(collator, kin=np.arange(len(setting.texts)) // 4)(
        [{"text": "ship", "label": row} for row in (5, 7, 3)]
    )
    assert batch["label"]["kin"].tolist() == [1, 1, 0]


def test_ranking_by_hand() -> None:
    """Texts at 0, 30 and 90 degrees; the student has the second at 60: only text 1 has its neighbours swapped."""

    def at(*degrees: float) -> torch.Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()], 1)

    cos = {angle: math.cos(math.radians(angle)) for angle in (0, 30, 60, 90)}
    first = (cos[30] - cos[90]) - (cos[60] - cos[90])  # of 0: 30 nearer than 90; the margin shrinks
    second = (cos[30] - cos[60]) - (cos[60] - cos[30])  # of 30: 0 nearer than 90; turned round
    third = 0.0  # of 90: 30 nearer than 0; the margin grows
    found = ranking_distance(at(0, 60, 90), at(0, 30, 90)).item()
    assert found == pytest.approx((first + second + third) / 3, rel=1e-5)
    assert ranking_distance(at(0, 30, 90), at(0, 30, 90)).item() == pytest.approx(0, abs=1e-6)
    assert ranking_distance(at(0, 30), at(0, 90)).item() == 0


def test_contrast_of_pairs_by_hand_masks_false_negatives() -> None:
    """Text 0 has text 1 as its positive; the teacher finds text 2 as near, and text 3 not."""
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    alone, positives = torch.arange(4), torch.tensor([1, -1, -1, -1])
    found = contrast_pairs(student, teacher, positives, alone, 0.5).item()
    assert found == pytest.approx(-math.log(math.exp(0.6 / 0.5) / (math.exp(0.6 / 0.5) + math.exp(0))), rel=1e-5)
    assert contrast_pairs(student, teacher, torch.tensor([-1] * 4), alone, 0.5).item() == 0


def test_contrast_of_pairs_does_not_push_apart_what_pairs_link() -> None:
    """Text 0 has the positives 1 and 2, of which 2 is far for the teacher, as is text 3, which nothing links to it."""
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, -1.0]])
    student = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([1, -1, -1, -1])
    linked = contrast_pairs(student, teacher, positives, torch.tensor([7, 7, 7, 3]), 0.5).item()
    assert linked == pytest.approx(-math.log(math.exp(0.6 / 0.5) / (math.exp(0.6 / 0.5) + math.exp(0))), rel=1e-5)
    apart = contrast_pairs(student, teacher, positives, torch.arange(4), 0.5).item()
    assert apart > linked


def test_a_positive_that_the_teacher_finds_far_has_negatives_all_the_same() -> None:
    """The teacher has the positive at a cosine of -.6 and text 2 at -.62, as near; text 3, at -.8, is a negative."""
    teacher = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.62, 0.7846], [-0.8, 0.6]])
    positives = torch.tensor([1, -1, -1, -1])
    found = contrast_pairs(teacher, teacher, positives, torch.arange(4), 0.5).item()
    assert found == pytest.approx(-math.log(math.exp(-1.2) / (math.exp(-1.2) + math.exp(-1.6))), rel=1e-4)


def test_a_learned_temperature_is_learned_and_stays_in_its_bounds() -> None:
    student, teacher = torch.tensor([[0.6, 0.8], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = DistillationLoss(Echo(), weigh(contrastive=1), None)
    assert loss.temperature.item() == pytest.approx(0.05)  # type: ignore[union-attr]
    loss([{"x": student}], label(teacher))["contrastive"].backward()
    assert loss.log_scale.grad is not None
    for far, bound in ((10.0, 0.01), (-1.0, 1.0)):
        loss.log_scale.grad = None
        with torch.no_grad():
            loss.log_scale.fill_(far)
        loss([{"x": student}], label(teacher))["contrastive"].backward()
        assert loss.temperature.item() == pytest.approx(bound)  # type: ignore[union-attr]
        assert loss.log_scale.grad.abs() > 0  # it can come back  # type: ignore[union-attr]
    assert set(loss.own_state()) == {"log_scale"}


def test_similarities_teach_no_temperature() -> None:
    """Their divergence falls as it rises, whatever the student does."""
    torch.manual_seed(0)
    student = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    teacher = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    loss = DistillationLoss(Echo(), weigh(similarity=1, contrastive=1), None)
    terms = loss([{"x": student.requires_grad_()}], label(teacher))
    assert torch.autograd.grad(terms["similarity"], loss.log_scale, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(terms["contrastive"], loss.log_scale)[0] != 0


def test_weights_follow_their_course() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    loss = DistillationLoss(Echo(), {"embedding": Course(0, 2, "linear")}, Course(0.1, 0.1))
    values = []
    for loss.progress in (0, 0.5, 1):
        values.append(loss([{"x": student}], label(teacher))["embedding"].item())
    assert values == pytest.approx([0, 0.4, 0.8])


class Turned(torch.nn.Module):
    """A model whose embeddings are its inputs, turned by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["x"] @ self.weight}


def test_a_term_is_balanced_from_the_first_batch_on_that_has_it() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3), torch.nn.functional.normalize(torch.randn(6, 3), dim=1)
    model = Turned()
    loss = DistillationLoss(model, weigh(embedding=1, pairs=2), Course(0.05, 0.05), balance=True)
    for positives in ((), (1, 0, -1, -1, -1, -1)):
        terms = loss([{"x": student}], label(teacher, *positives))
        norms = [torch.autograd.grad(term, model.weight, retain_graph=True)[0].norm().item() for term in terms.values()]
        assert norms == pytest.approx([1, 2 if positives else 0], rel=1e-4)


def test_balanced_terms_have_gradients_in_the_ratio_of_their_weights() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3), torch.nn.functional.normalize(torch.randn(6, 3), dim=1)
    model = Turned()
    loss = DistillationLoss(model, weigh(embedding=1, similarity=3), Course(0.05, 0.05), balance=True)
    terms = loss([{"x": student}], label(teacher))
    norms = [torch.autograd.grad(term, model.weight, retain_graph=True)[0].norm().item() for term in terms.values()]
    assert norms == pytest.approx([1, 3], rel=1e-4)
    assert set(loss.own_state()) == {"norms", "calls"}


def test_missed_variance_by_hand() -> None:
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # a variance of 2 in all
    assert states_distance(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), teacher).item() == pytest.approx(0.5)
    assert states_distance(teacher, teacher).item() == 0


def test_relations_by_hand_leave_out_padding() -> None:
    """Two tokens of one dimension and padding; each softmax is a logistic."""
    teacher, student = torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[[1.0], [0.0], [5.0]]])
    mask = torch.tensor([[True, True, False]])

    def row(first: float, second: float) -> list[float]:
        p = 1 / (1 + math.exp(second - first))
        return [p, 1 - p]

    rows = [(row(1, 2), row(1, 0)), (row(2, 4), row(0, 0))]
    expected = sum(p * math.log(p / q) for ps, qs in rows for p, q in zip(ps, qs, strict=True)) / 2
    assert relation_divergence(student, teacher, mask, 1).item() == pytest.approx(expected, rel=1e-5)


def test_relations_by_hand_are_of_heads_cut_in_order_and_scaled_by_their_size() -> None:
    """Two tokens, two heads of two dimensions: rows of products over sqrt(2), each softmax a logistic."""
    teacher = torch.tensor([[[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    student = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]]])

    def row(first: float, second: float) -> list[float]:
        p = 1 / (1 + math.exp((second - first) / math.sqrt(2)))
        return [p, 1 - p]

    rows = [(row(1, 0), row(0, 0)), (row(0, 1), row(0, 2)), (row(4, 0), row(2, 1)), (row(0, 0), row(1, 1))]
    expected = sum(p * math.log(p / q) for ps, qs in rows for p, q in zip(ps, qs, strict=True)) / 4
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert relation_divergence(student, teacher, mask, 2).item() == pytest.approx(expected, rel=1e-5)


def test_insides_are_followed_and_nothing_of_it_stays_in_the_student(
    setting: SimpleNamespace, mpnet_dir: Path, tmp_path: Path
) -> None:
    teacher, student = SentenceTransformer(str(mpnet_dir), device="cpu"), setting.make_student()
    internals = Internals(student, teacher, [(0, 0), (1, 3)], relation_heads=4)
    loss = DistillationLoss(student, weigh(embedding=1, layers=1, attention=100), Course(0.1, 0.1), internals=internals)
    trained = run(setting, tmp_path, student=student, loss=loss)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms = [entry for entry in log if "layers" in entry]
    assert terms[-1]["layers"] < terms[0]["layers"]
    assert terms[-1]["attention"] < terms[0]["attention"]
    assert set(trained.state_dict()) == set(setting.make_student().state_dict())
    kept = sorted((tmp_path / "checkpoints").glob("checkpoint-*/loss.safetensors"))
    assert set(load_file(kept[-1])) == {"internals.maps.0.weight", "internals.maps.1.weight"}


def test_insides_are_compared_in_runs_of_like_length_as_in_one(
    setting: SimpleNamespace, mpnet_dir: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = SentenceTransformer(str(mpnet_dir), device="cpu"), setting.make_student().eval()
    internals = Internals(student, teacher, [(0, 0), (1, 3)], relation_heads=4)
    features = student.preprocess([sentences[0], sentences[1] * 3, "ship", sentences[2]])

    def run_it() -> list[torch.Tensor]:
        student.zero_grad()
        with internals.watched(features):
            student(dict(features))
        terms = [internals.distance("layers"), internals.distance("attention")]
        torch.stack(terms).sum().backward()
        gradient = next(student[0].parameters()).grad
        assert gradient is not None
        return [*(term.detach() for term in terms), gradient.clone()]

    monkeypatch.setattr("embedistill.training.packed._PADDING", {"cpu": 1_000})
    whole = run_it()
    assert len(list_runs(features["attention_mask"])) == 1
    monkeypatch.setattr("embedistill.training.packed._PADDING", {"cpu": 4})
    assert len(list_runs(features["attention_mask"])) > 1
    torch.testing.assert_close(run_it(), whole, atol=1e-5, rtol=1e-5)


def test_runs_of_a_batch_are_of_like_length_and_one_where_padding_is_in_front() -> None:
    mask = torch.zeros(4, 50, dtype=torch.long)
    for row, length in enumerate((50, 5, 40, 20)):  # padded to 50: 10 tokens, 40 with those, then 85: over 64
        mask[row, :length] = 1
    assert [(rows.tolist(), longest) for rows, longest in list_runs(mask)] == [([1], 5), ([3, 2, 0], 50)]
    assert [(rows.tolist(), longest) for rows, longest in list_runs(mask.flip(1))] == [([0, 1, 2, 3], 50)]


@pytest.mark.parametrize(("architecture", "packs"), [("bert", True), ("mpnet", True), ("mpnet", False)])
def test_without_padding_a_student_gives_the_same_vectors_and_gradients(
    teacher_dir: Path,
    mpnet_dir: Path,
    sentences: list[str],
    architecture: str,
    packs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SentenceTransformer(str({"bert": teacher_dir, "mpnet": mpnet_dir}[architecture]), device="cpu").eval()
    features = model.preprocess([sentences[0], sentences[1] * 3, "ship", sentences[2]])
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))

    def run_it() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        found = model(dict(features))["sentence_embedding"]
        (found * weights).sum().backward()
        grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        return found.detach(), grads

    vectors, grads = run_it()
    monkeypatch.setattr("embedistill.training.packed._PADDING", {"cpu": 4})  # three runs, one of them padded
    if not packs:  # as for other architectures
        monkeypatch.setattr("embedistill.training.packed.is_bert_like", lambda model: False)
    with without_padding(model, torch.float32):
        packed_vectors, packed_grads = run_it()
    torch.testing.assert_close(packed_vectors, vectors, atol=1e-5, rtol=1e-5)
    assert set(packed_grads) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_it()[0], vectors)
    with without_padding(model, torch.bfloat16):
        rough, rough_grads = run_it()
    assert {grad.dtype for grad in rough_grads.values()} == {torch.float32}
    assert torch.cosine_similarity(rough.float(), vectors).min() > 0.99
    flat = [torch.cat([some[name].flatten() for name in grads]) for some in (grads, rough_grads)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


SCHEDULE = Schedule(
    epochs=2,
    minutes=None,
    learning_rate=2e-4,
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
        make_static=lambda: build_static(teacher, sentences[:100], vectors[:100]),
        texts=sentences,
        vectors=vectors,
        targets=lambda rows: vectors[rows],
    )


def run(setting: SimpleNamespace, folder: Path, **changes: object) -> SentenceTransformer:
    student = changes.pop("student", None) or setting.make_student()
    temperature = changes.pop("temperature", Course(0.1, 0.1))
    options = {
        "targets": setting.targets,
        "loss": DistillationLoss(student, weigh(embedding=1, similarity=1), temperature),
        "batching": Batching(16, seed=1),
        "schedule": SCHEDULE,
        "work_dir": folder / "checkpoints",
        "log_path": folder / "log.jsonl",
        **changes,
    }
    targets = options.pop("targets")
    return train(student, setting.texts, targets, **options)  # type: ignore[arg-type]


def agreement(model: SentenceTransformer, setting: SimpleNamespace) -> float:
    return float((model.encode(setting.texts) * setting.vectors).sum(1).mean())


def test_training_in_bfloat16_brings_the_student_nearer_too(setting: SimpleNamespace, tmp_path: Path) -> None:
    before = agreement(setting.make_student(), setting)
    student = run(setting, tmp_path, schedule=replace(SCHEDULE, dtype=torch.bfloat16))
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    assert 1 - agreement(student, setting) < 0.9 * (1 - before)


def test_training_brings_the_student_nearer_and_logs_every_term(setting: SimpleNamespace, tmp_path: Path) -> None:
    before = agreement(setting.make_student(), setting)
    student = run(setting, tmp_path)
    assert 1 - agreement(student, setting) < 0.9 * (1 - before)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert {"embedding", "similarity", "learning_rate", "step"} <= set(steps[0])
    assert steps[0]["loss"] == pytest.approx(steps[0]["embedding"] + steps[0]["similarity"], abs=1e-3)
    cards = [path.read_text() for path in (tmp_path / "checkpoints").rglob("README.md")]
    assert not any(text in card for card in cards for text in setting.texts)


def test_a_tracker_is_told_what_the_log_is(setting: SimpleNamespace, tmp_path: Path) -> None:
    run(
        setting,
        tmp_path,
        schedule=replace(SCHEDULE, report_to=("tensorboard",)),
        dev=Dev(setting.texts[:20], setting.vectors[:20]),
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("embedding", "similarity", "dev_cosine"):
        logged = {entry["step"]: entry[name] for entry in entries if name in entry}
        assert {event.step: event.value for event in events.Scalars(f"train/{name}")} == pytest.approx(logged)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_weights_move_in_proportion_to_their_size(setting: SimpleNamespace, tmp_path: Path) -> None:
    """Adam's first step is the learning rate: 2e-4 for weights whose root mean square is 0.05."""
    student = setting.make_student()
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    schedule = replace(SCHEDULE, steps=1, warmup=0.0, weight_decay=0.0)
    run(setting, tmp_path, student=student, schedule=schedule)
    moved = {name: (weight.detach() - before[name]).abs().max().item() for name, weight in student.named_parameters()}
    head = next(name for name in before if "linear" in name)
    for name in (head, next(name for name in before if name.endswith("word_embeddings.weight"))):
        expected = 2e-4 * before[name].square().mean().sqrt().item() / 0.05
        assert moved[name] == pytest.approx(expected, rel=0.05)


def test_a_row_moves_only_in_the_steps_that_use_it() -> None:
    """Row 0 is used in every step, row 1 in the third, row 2 in none; beside AdamW of torch."""
    start = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
    table, plain, matrix = (torch.nn.Parameter(start.clone()) for _ in range(3))
    groups = [{"params": [table], "by_row": True}, {"params": [matrix], "by_row": False}]
    ours = RowAdamW(groups, lr=0.1, weight_decay=0.0)
    torchs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    seen = []
    for number in range(6):
        gradient = torch.zeros(3, 2)
        gradient[0] = torch.tensor([0.5 - 0.2 * number, 1.0 + number])
        if number == 2:
            gradient[1] = torch.tensor([-7.0, 0.001])
        for weight in (table, plain, matrix):
            weight.grad = gradient.clone()
        ours.step()
        torchs.step()
        seen.append(table.detach().clone())
    torch.testing.assert_close(table[0], plain[0])
    torch.testing.assert_close(matrix, plain)
    torch.testing.assert_close(seen[1][1], start[1])
    torch.testing.assert_close(seen[2][1], torch.tensor([3.1, 3.9]), rtol=0, atol=1e-5)  # the rate, once
    torch.testing.assert_close(table[1], seen[2][1], rtol=0, atol=0)
    torch.testing.assert_close(table[2], start[2], rtol=0, atol=0)
    assert (plain[1] - start[1]).abs().min() > 0.19  # twice as far, in four steps, by the gradient of one
    assert table.grad is not None


def test_weights_of_a_row_that_is_used_decay() -> None:
    table = torch.nn.Parameter(torch.ones(2, 1))
    optimiser = RowAdamW([{"params": [table], "by_row": True}], lr=0.1, weight_decay=0.5)
    table.grad = torch.tensor([[1.0], [0.0]])
    optimiser.step()
    torch.testing.assert_close(table.detach(), torch.tensor([[1 - 0.05 - 0.1], [1.0]]))


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("transformer", {"word_embeddings", "position_embeddings", "relative_attention_bias"}),
        ("static", set()),  # of which a table is all there is: eval/LOG.md
    ],
)
def test_tables_beside_layers_are_moved_by_row(
    setting: SimpleNamespace, tmp_path: Path, kind: str, tables: set[str]
) -> None:
    student = setting.make_student() if kind == "transformer" else setting.make_static()
    names = {id(weight): name for name, weight in student.named_parameters()}
    by_row, seen = set[str](), set[str]()

    class Look(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                found = {names[id(weight)] for weight in group["params"]}
                seen.update(found)
                by_row.update(found if group["by_row"] else ())

    run(setting, tmp_path, student=student, callbacks=[Look()], schedule=replace(SCHEDULE, steps=1))
    assert {name.split(".")[-2] for name in by_row} == tables
    assert seen == set(names.values())


def test_the_same_seed_gives_the_same_student(setting: SimpleNamespace, tmp_path: Path) -> None:
    first, second = run(setting, tmp_path / "a"), run(setting, tmp_path / "b")
    np.testing.assert_allclose(first.encode(setting.texts), second.encode(setting.texts), atol=1e-5)


@pytest.mark.parametrize(("watched", "learned"), [(False, False), (True, False), (False, True)])
def test_a_stopped_training_goes_on_to_the_same_student(
    setting: SimpleNamespace, tmp_path: Path, watched: bool, learned: bool, monkeypatch: pytest.MonkeyPatch
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

    def train_in(folder: str, **changes: object) -> SentenceTransformer:
        if learned:  # the loss has a state of its own: its temperature, the norms of its terms
            student = setting.make_student()
            loss = DistillationLoss(student, weigh(embedding=1, contrastive=1), None, balance=True)
            changes |= {"student": student, "loss": loss}
        return run(setting, tmp_path / folder, dev=dev, **changes)

    whole = train_in("whole")
    with pytest.raises(Stop):
        train_in("stopped", targets=stopping)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    broken = checkpoints / "checkpoint-999"  # as a kill in the middle of writing leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    taken, forward = [], DistillationLoss.forward
    monkeypatch.setattr(
        DistillationLoss, "forward", lambda self, *given, **named: taken.append(1) or forward(self, *given, **named)
    )
    again = train_in("stopped")
    done = int(last.name.split("-")[1])
    assert done >= 20
    assert len(taken) == 30 - done  # it does not begin anew, which would come to the same student
    np.testing.assert_allclose(again.encode(setting.texts), whole.encode(setting.texts), atol=1e-4)
    log = (tmp_path / "stopped" / "log.jsonl").read_text()
    entries = [json.loads(line) for line in log.splitlines()]
    steps = [entry["step"] for entry in entries]
    assert steps == sorted(steps)
    read = [entry["step"] for entry in entries if "dev_cosine" in entry]
    assert read == ([0, *range(3, 31, 3)] if watched else [])


def test_a_lost_loss_stops_the_run_and_says_at_which_step_and_why(setting: SimpleNamespace, tmp_path: Path) -> None:
    reads: list[int] = []

    def damaged(rows: np.ndarray) -> np.ndarray:
        reads.append(len(rows))
        return setting.vectors[rows] * np.float32("nan" if len(reads) == 7 else 1)

    with pytest.raises(EmbedistillError, match="training, step 7: the teacher's vectors not finite; embedistill cache"):
        run(setting, tmp_path, targets=damaged)
    run(setting, tmp_path, targets=damaged)  # and goes on when the cache is mended


def test_what_the_steps_that_are_timed_met_is_not_told_of_the_training(
    setting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "_CALIBRATION_SECONDS", 0.01)
    monkeypatch.setattr(callbacks.Stopwatch, "seconds_per_step", 0.5)
    reads: list[int] = []

    def damaged(rows: np.ndarray) -> np.ndarray:
        begun = (tmp_path / "checkpoints" / "plan.json").is_file()  # the steps are planned, and trained
        reads.append(begun)
        return setting.vectors[rows] * np.float32("nan" if not begun or sum(reads) == 5 else 1)

    with pytest.raises(EmbedistillError, match="training, step 5: the teacher's vectors not finite"):
        run(setting, tmp_path, schedule=replace(SCHEDULE, minutes=0.1), targets=damaged)


def test_a_term_that_is_not_finite_is_named(
    setting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def overflowing(*given: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return given[0].sum() * (math.inf if len(calls) == 5 else 0.0)

    monkeypatch.setattr(objectives, "matrix_distance", overflowing)
    student = setting.make_student()
    loss = DistillationLoss(student, weigh(embedding=1, matrix=1), Course(0.1, 0.1))
    with pytest.raises(LostError, match=r"training, step 5: the term matrix not finite; lower training\.learning_rate"):
        run(setting, tmp_path, student=student, loss=loss)


def test_minutes_bound_the_steps_and_leave_the_student_as_it_was(
    setting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "_CALIBRATION_SECONDS", 0.1)
    schedule = Schedule(**{**SCHEDULE.__dict__, "epochs": 1000, "minutes": 0.01})
    student = setting.make_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines=[0.5] * 40)
    run(setting, tmp_path, student=student, schedule=schedule, dev=dev)
    for seen in dev.seen[:2]:  # the reading that is timed, and that of step 0
        for name, value in seen.items():
            torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    steps = json.loads((tmp_path / "checkpoints" / "plan.json").read_text())["steps"]
    assert 1 <= steps < 1000 * 15
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in log) == steps
    assert not (tmp_path / "checkpoints" / "calibration").exists()


@pytest.mark.parametrize(("dev_steps", "expected"), [(None, 7), (4, 10)])
def test_minutes_have_room_for_steps_and_readings(
    setting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dev_steps: int | None, expected: int
) -> None:
    """Six seconds: (6 - 11 x 0.2) / 0.5 steps, or one reading every 4: (6 - 2 x 0.2) / (0.5 + 0.2 / 4)."""
    monkeypatch.setattr(callbacks, "_CALIBRATION_SECONDS", 0.01)
    monkeypatch.setattr(callbacks.Stopwatch, "seconds_per_step", 0.5)
    monkeypatch.setattr(loop, "_time_reading", lambda student, dev: 0.2)
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines=[0.5] * 40)
    run(setting, tmp_path, schedule=replace(SCHEDULE, minutes=0.1, dev_steps=dev_steps), dev=dev)
    assert json.loads((tmp_path / "checkpoints" / "plan.json").read_text())["steps"] == expected


def test_the_learning_rate_rises_and_comes_to_nothing_at_the_end(setting: SimpleNamespace, tmp_path: Path) -> None:
    run(setting, tmp_path, schedule=replace(SCHEDULE, steps=20))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert len(rates) == 20
    peak = rates.index(max(rates))
    assert peak in {1, 2}  # of 20 steps, a tenth warms up
    assert rates[0] < rates[peak] <= 2e-4 * 1.001
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 * rates[peak]


def test_a_temperature_that_is_learned_moves_and_is_logged(setting: SimpleNamespace, tmp_path: Path) -> None:
    student = setting.make_student()
    loss = DistillationLoss(student, weigh(embedding=1, contrastive=1), None)
    run(setting, tmp_path, student=student, loss=loss)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    temperatures = [entry["temperature"] for entry in log if "loss" in entry]
    assert temperatures[0] == pytest.approx(0.05, rel=0.02)
    assert abs(math.log(temperatures[-1] / 0.05)) > 0.05


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
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines=cosines)
    student = run(setting, tmp_path, schedule=replace(SCHEDULE, dev_steps=10), dev=dev)
    assert len(dev.seen) == 4
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, dev.seen[best][name])
    assert any(not torch.equal(value, dev.seen[3][name]) for name, value in student.state_dict().items())
    said = capsys.readouterr().err
    assert f"Kept: the weights of step {10 * best}" in said
    assert ("No step was better than the untrained student" in said) == (best == 0)


def test_a_second_training_is_not_undone_by_what_it_started_from(setting: SimpleNamespace, tmp_path: Path) -> None:
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines=[0.7, 0.6, 0.65, 0.6])
    student = run(setting, tmp_path, schedule=replace(SCHEDULE, dev_steps=10), dev=dev, is_first=False)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, dev.seen[2][name])


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_gone_on_from(
    setting: SimpleNamespace, tmp_path: Path
) -> None:
    batches = 0

    def spoilt(rows: np.ndarray) -> np.ndarray:
        nonlocal batches
        batches += 1
        return setting.vectors[rows] * np.float32("nan" if batches > 8 else 1)

    schedule = replace(SCHEDULE, checkpoint_steps=2, epochs=100, steps=400)  # the loss is looked at on every 20th step
    with pytest.raises(EmbedistillError, match="step 9: the teacher's vectors not finite"):
        run(setting, tmp_path, targets=spoilt, schedule=schedule)
    whole = sorted((tmp_path / "checkpoints").glob("checkpoint-*/complete"))
    assert [path.parent.name for path in whole] == ["checkpoint-8"]
    for path in whole:
        weights = load_file(path.parent / "model.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_student_that_is_lost_stops_the_run_and_leaves_the_best_weights(
    setting: SimpleNamespace, tmp_path: Path
) -> None:
    dev = Scripted(setting.texts[:20], setting.vectors[:20], cosines=[0.5, 0.6, 0.3, 0.55, 0.3, 0.2])
    with pytest.raises(EmbedistillError, match=r"step 25: the student diverged.*lower .*learning_rate.*of step 5"):
        run(setting, tmp_path, schedule=replace(SCHEDULE, dev_steps=5), dev=dev)
    weights = load_file(tmp_path / "checkpoints" / "best.safetensors")
    name = next(name for name in weights if name.endswith(("query.weight", ".q.weight")))
    torch.testing.assert_close(weights[name], dev.seen[1][name])


@pytest.mark.parametrize("kept_out", [True, False])
def test_a_learning_rate_far_too_high_is_found_out(setting: SimpleNamespace, tmp_path: Path, kept_out: bool) -> None:
    dev = Dev(setting.texts[:60], setting.vectors[:60], kept_out=kept_out)
    terms = r"from step \d+ to \d+: embedding [\d.]+ to [\d.]+, similarity [\d.]+ to [\d.]+"
    expected = rf"the student (collapsed|diverged).*; {terms}; lower training\.learning_rate"
    with pytest.raises(LostError, match=expected) as caught:
        run(setting, tmp_path, schedule=replace(SCHEDULE, learning_rate=1.0), dev=dev)
    assert ("best.safetensors" in str(caught.value)) == kept_out == (tmp_path / "checkpoints" / "best.json").exists()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(LostError, match=re.escape(str(caught.value))):  # at once, not after the same steps again
        run(setting, tmp_path, schedule=replace(SCHEDULE, learning_rate=1.0), dev=dev, targets=pytest.fail)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_on_texts_that_are_trained_on_the_last_weights_stay(setting: SimpleNamespace, tmp_path: Path) -> None:
    dev = Dev(setting.texts[:60], setting.vectors[:60], kept_out=False)
    watched, alone = run(setting, tmp_path / "watched", dev=dev), run(setting, tmp_path / "alone")
    np.testing.assert_allclose(watched.encode(setting.texts), alone.encode(setting.texts), atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert sum("trained_cosine" in entry for entry in log) == 11
    assert not any("dev_cosine" in entry for entry in log)


def test_out_of_memory_halves_the_batches_and_goes_on(
    setting: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    largest: list[int] = []

    def scarce(rows: np.ndarray) -> np.ndarray:
        largest.append(len(rows))
        if len(rows) > 8 and len(largest) > 12:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return setting.vectors[rows]

    student = setting.make_student()
    before = agreement(student, setting)
    loss = DistillationLoss(student, weigh(embedding=1), Course(0.1, 0.1))
    trained = run(setting, tmp_path, student=student, loss=loss, targets=scarce)
    assert "Out of memory: batches of 16 texts come in 2 parts" in capsys.readouterr().err
    assert json.loads((tmp_path / "checkpoints" / "plan.json").read_text()) == {"halvings": 1, "steps": 30}
    assert agreement(trained, setting) > before
    assert max(largest[14:]) <= 8
    assert sum(largest[13:]) == 16 * (30 - 10)  # it goes on from the checkpoint of step 10


def test_too_little_memory_for_four_texts_is_an_error(setting: SimpleNamespace, tmp_path: Path) -> None:
    def none(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    with pytest.raises(EmbedistillError, match="4 texts a batch, and out of memory; use shorter texts"):
        run(setting, tmp_path, targets=none)


def test_batches_of_few_long_texts_are_halved_to_one_text_and_no_further(
    setting: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    largest: list[int] = []

    def none(rows: np.ndarray) -> np.ndarray:
        largest.append(len(rows))
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    student = setting.make_student()
    batching = Batching(256, tokens=4 * int(max(count_tokens(student, setting.texts))), seed=3)
    loss = DistillationLoss(student, weigh(embedding=1), Course(0.1, 0.1))
    with pytest.raises(EmbedistillError, match="1 texts a batch, and out of memory"):
        run(setting, tmp_path, student=student, loss=loss, targets=none, batching=batching)
    assert largest[0] > largest[-1] <= 2
    notes = capsys.readouterr().err
    assert ("come in 2 parts" in notes, "come in 16 parts" in notes) == (True, False)


def test_callbacks_of_ones_own_are_called(setting: SimpleNamespace, tmp_path: Path) -> None:
    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, *given: object, **named: object) -> None:
            self.steps += 1

    counting = Counting()
    run(setting, tmp_path, callbacks=[counting])
    assert counting.steps == 30


def test_halved_batches_give_what_whole_ones_do(setting: SimpleNamespace, tmp_path: Path) -> None:
    """Where a term is a mean over texts: two parts of the same size, their gradients added up."""
    students = []
    for folder, halvings in (("whole", 0), ("halved", 1)):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        (tmp_path / folder / "checkpoints" / "plan.json").write_text(json.dumps({"halvings": halvings, "steps": 20}))
        student = setting.make_student()
        loss = DistillationLoss(student, weigh(embedding=1), Course(0.1, 0.1))
        students.append(run(setting, tmp_path / folder, student=student, loss=loss))
    first, second = (student.encode(setting.texts) for student in students)
    np.testing.assert_allclose(first, second, atol=1e-4)
