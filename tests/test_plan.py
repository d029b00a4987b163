import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import MPNetConfig, MPNetModel

from embedistill import forecast as forecasts
from embedistill.architectures import Sizes, read_config, read_sizes
from embedistill.errors import UsageError
from embedistill.forecast import Forecast, Speed, choose_by_speed, forecast, make_text
from embedistill.outlook import plan, plan_section
from embedistill.recipe import list_recipes, load_recipe
from embedistill.student.building import build_student
from embedistill.student.planning import TransformerPlan, choose_sizes, list_neighbours, list_rungs
from embedistill.training.batches import count_tokens

MPNET = {  # the configuration of all-mpnet-base-v2
    "model_type": "mpnet",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30527,
    "max_position_embeddings": 514,
}


def test_what_is_forecast_of_size_is_what_is_built(mpnet_dir: Path, sentences: list[str]) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    sizes = replace(read_sizes(read_config(mpnet_dir)), layers=2, hidden_size=16, intermediate_size=24)
    sizes = replace(sizes, vocabulary_size=240)
    _, found = forecast(teacher, {"student": sizes}, 8)
    vectors = teacher.encode(sentences)
    student, _ = build_student(
        teacher, TransformerPlan(sizes), sentences, vectors, projection=torch.eye(32)[:, :8].numpy()
    )
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert found.embedding_parameters == 240 * 16
    assert found.training_hours is None


def test_flops_and_megabytes_by_hand(mpnet_dir: Path) -> None:
    """A layer has 4 products of 32 x 32 and 2 of 32 x 64 a token, and 4 operations a pair and dimension."""
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    sizes = replace(read_sizes(read_config(mpnet_dir)), layers=1)
    _, found = forecast(teacher, {"student": sizes}, 32)
    assert found.flops == 2 * 32 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 32 * 32 * 32 + 2 * 32 * 32
    assert Forecast("x", sizes, 3_000_000, 1_000_000, 1.0, Speed(1, 1)).megabytes(8) == 4
    assert Forecast("x", sizes, 3_000_000, 1_000_000, 1.0, Speed(1, 1)).megabytes(32) == 16


def test_the_text_that_is_timed_has_32_tokens(mpnet_dir: Path) -> None:
    tokenizer = SentenceTransformer(str(mpnet_dir), device="cpu").tokenizer
    assert len(tokenizer(make_text(tokenizer))["input_ids"]) == 32


def count(sizes: Sizes, embedding_size: int = 768) -> int:
    """Return the parameters of transformers' own model of these sizes, and of a head."""
    config = MPNetConfig(
        vocab_size=sizes.vocabulary_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=514,
    )
    with torch.device("meta"):
        body = sum(weight.numel() for weight in MPNetModel(config).parameters())
    return body + sizes.hidden_size * embedding_size


@pytest.mark.parametrize("budget", [109e6, 60e6, 14.5e6, 8e6])
def test_a_budget_is_kept_and_used(budget: int) -> None:
    sizes = choose_sizes(MPNET, 768, budget, "student.max_parameters")
    assert replace(sizes, vocabulary_size=30527) in list_rungs(MPNET)
    assert count(sizes) <= budget
    assert sizes.vocabulary_size == 30527 or count(sizes) > budget - sizes.hidden_size  # no room for one piece more
    assert 30527 // 2 <= sizes.vocabulary_size <= 30527


@pytest.mark.parametrize("path", list_recipes(), ids=lambda path: path.stem)
def test_a_recipe_can_be_planned_and_is_as_large_as_it_says(path: Path) -> None:
    student = load_recipe(path.stem).student
    said = re.search(r"([\d.]+) million parameters", path.read_text().replace("\n# ", " "))
    size = student.embedding_size or 768
    found = 30527 * size if student.origin == "static" else count(plan_section(MPNET, student, "student").sizes, size)
    assert said is None or found / 1e6 == pytest.approx(float(said[1]), rel=0.01)


def test_a_budget_that_nothing_fits_says_what_would() -> None:
    with pytest.raises(
        UsageError, match=r"student\.max_parameters: 500,000 parameters; expected at least 2,\d{3},\d{3}"
    ):
        choose_sizes(MPNET, 768, 5e5, "student.max_parameters")


def test_rungs_fall_in_size() -> None:
    sizes = [rung.layers * rung.hidden_size * rung.intermediate_size for rung in list_rungs(MPNET)]
    assert sizes == sorted(sizes, reverse=True)
    assert Sizes(4, 312, 12, 1248, 30527) in list_rungs(MPNET)


def test_a_speedup_chooses_the_largest_that_is_fast_enough(mpnet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    speeds = iter([1.5, 2.5, 3.5, 9.0])
    monkeypatch.setattr(
        forecasts, "measure", lambda models: {"teacher": Speed(10, 1), "student": Speed(10 * next(speeds), 1)}
    )
    config = read_config(mpnet_dir)
    assert choose_by_speed(teacher, config, 32, 3.0) == list_rungs(config)[2]
    monkeypatch.setattr(forecasts, "measure", lambda models: {"teacher": Speed(10, 1), "student": Speed(20, 1)})
    with pytest.raises(UsageError, match=r"student\.speedup: 3; expected at most 2\.0 here"):
        choose_by_speed(teacher, config, 32, 3.0)


def test_neighbours_differ_in_one_thing_each() -> None:
    found = list_neighbours(MPNET, Sizes(4, 312, 12, 1248, 30527))
    assert found == {
        "half the layers": Sizes(2, 312, 12, 1248, 30527),
        "narrower": Sizes(4, 208, 8, 832, 30527),
        "half the pieces": Sizes(4, 312, 12, 1248, 15263),
    }


@pytest.mark.parametrize(("settings", "seconds"), [([], 2 * 256 / 16), (["training.steps=5"], 5)])
def test_a_plan_times_the_steps_that_training_takes(
    recipe_file: Path, settings: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(forecasts, "time_step", lambda model, texts, dtype: seen.append(len(texts)) or 1.0)
    outlook = plan(load_recipe(recipe_file, "training.epochs=2", "training.batch_size=16", *settings))
    assert set(seen) == {16}
    assert outlook.forecasts[1].training_hours == pytest.approx(seconds / 3600)


def test_a_planned_batch_fills_its_tokens(
    recipe_file: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(forecasts, "time_step", lambda model, texts, dtype: seen.append(texts) or 1.0)
    outlook = plan(load_recipe(recipe_file, "training.epochs=1", "training.batch_tokens=150"))
    tokens = count_tokens(SentenceTransformer(str(teacher_dir)), seen[0]).sum()
    assert 120 < tokens < 160
    assert outlook.forecasts[1].training_hours == pytest.approx(256 / len(seen[0]) / 3600)


def test_a_plan_counts_the_corpus_and_fits_the_time(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "time_step", lambda *_: 1.0)
    outlook = plan(load_recipe(recipe_file, "training.minutes=0.6", "training.epochs=1000"))
    assert outlook.texts == round(0.8 * 2 * 160)  # 160 texts and as many queries, a fifth held out
    assert outlook.encode_hours > 0
    assert all(one.training_hours == pytest.approx(0.01) for one in outlook.forecasts[1:])
    with pytest.raises(UsageError, match=r"student\.from: static; expected teacher"):
        plan(load_recipe(recipe_file, "student={from: static}"))
