import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from embedistill.errors import UsageError
from embedistill.student import (
    build_student,
    check_plan,
    count_layers,
    fit_pca,
    load_projection,
    project,
    save_student,
    solve_ridge,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("architecture", ["teacher_dir", "mpnet_dir"])
def test_kept_whole_with_its_own_space_the_student_is_the_teacher(
    architecture: str, request: pytest.FixtureRequest, sentences: list[str]
) -> None:
    teacher = SentenceTransformer(str(request.getfixturevalue(architecture)), device="cpu")
    expected = teacher.encode(sentences)
    student = build_student(teacher, [0, 1, 2, 3], sentences, expected)
    headless = SentenceTransformer(modules=[student[0], student[1], Normalize()], device="cpu")
    np.testing.assert_allclose(headless.encode(sentences), expected, atol=1e-5)
    assert (student.encode(sentences) * expected).sum(1).min() > 0.95  # the head has learnt the identity


@pytest.mark.parametrize("architecture", ["teacher_dir", "mpnet_dir"])
def test_layers_are_dropped_and_the_teacher_is_left_as_it_was(
    architecture: str, request: pytest.FixtureRequest, sentences: list[str]
) -> None:
    teacher = SentenceTransformer(str(request.getfixturevalue(architecture)), device="cpu")
    before = teacher.encode(sentences[:50])
    student = build_student(teacher, [0, 3], sentences[:50], before)
    assert (count_layers(student), count_layers(teacher)) == (2, 4)
    for kept, origin in zip(student[0].model.encoder.layer, [0, 3], strict=True):
        for mine, theirs in zip(kept.parameters(), teacher[0].model.encoder.layer[origin].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    np.testing.assert_array_equal(teacher.encode(sentences[:50]), before)


def test_a_saved_student_needs_nothing_of_ours(teacher_dir: Path, sentences: list[str], tmp_path: Path) -> None:
    teacher = SentenceTransformer(str(teacher_dir), device="cpu")
    vectors = teacher.encode(sentences)
    projection = fit_pca(vectors, 16)
    student = build_student(teacher, [0, 3], sentences, project(vectors, projection))
    (tmp_path / "s").mkdir()
    save_student(student, tmp_path / "s", projection, {"teacher": "t"})
    code = (
        "import sys, json; sys.modules['embedistill'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path / 's')!r}, device='cpu', trust_remote_code=False)\n"
        f"print(json.dumps(model.encode({sentences[:5]!r}).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout), student.encode(sentences[:5]), atol=1e-5)
    assert json.loads((tmp_path / "s" / "config.json").read_text())["num_hidden_layers"] == 2
    np.testing.assert_array_equal(load_projection(tmp_path / "s"), projection)
    assert json.loads((tmp_path / "s" / "embedistill.json").read_text())["teacher"] == "t"


def test_pca_keeps_inner_products_of_vectors_that_lie_in_few_dimensions() -> None:
    vectors = (RNG.normal(size=(60, 5)) @ RNG.normal(size=(5, 20)) + 3).astype(np.float32)
    projection = fit_pca(vectors, 6)
    np.testing.assert_allclose(projection.T @ projection, np.eye(6), atol=1e-5)
    mapped = vectors @ projection
    np.testing.assert_allclose(mapped @ mapped.T, vectors @ vectors.T, rtol=1e-3)
    np.testing.assert_array_equal(projection, fit_pca(vectors, 6))
    assert (projection[np.abs(projection).argmax(0), range(6)] > 0).all()


def test_projected_vectors_are_unit_and_without_projection_themselves() -> None:
    vectors = RNG.normal(size=(4, 8)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(project(vectors, fit_pca(vectors, 3)), axis=1), 1, rtol=1e-5)
    assert project(vectors, None) is vectors


def test_ridge_finds_the_map() -> None:
    inputs, weight = RNG.normal(size=(200, 6)).astype("f4"), RNG.normal(size=(6, 3)).astype("f4")
    np.testing.assert_allclose(solve_ridge(inputs, inputs @ weight, ridge=1e-6), weight, atol=1e-3)
    small = solve_ridge(inputs, inputs @ weight, ridge=1e3)
    assert np.abs(small).max() < np.abs(weight).max() / 10


@pytest.mark.parametrize(
    ("layers", "size", "plan"), [(1, None, [3]), (3, 16, [0, 1, 3]), (4, 32, [0, 1, 2, 3]), ([1, 2], None, [1, 2])]
)
def test_plans(teacher_dir: Path, layers: int | list[int], size: int | None, plan: list[int]) -> None:
    assert check_plan(teacher_dir, layers, size) == plan


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        (5, None, "student.layers: 5; expected at most the teacher's 4"),
        ([0, 4], None, "ascending numbers from 0 to 3"),
        ([1, 1], None, "ascending numbers"),
        ([], None, "ascending numbers"),
        (2, 33, "student.embedding_size: 33; expected at most the teacher's 32"),
    ],
)
def test_plans_that_cannot_be(teacher_dir: Path, layers: int | list[int], size: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_plan(teacher_dir, layers, size)


def test_an_architecture_that_is_not_supported_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UsageError, match="architecture 't5'; expected bert, mpnet, roberta"):
        check_plan(tmp_path, 2, None)
