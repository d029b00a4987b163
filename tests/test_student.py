import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from embedistill.architectures import Sizes, find_words, read_config
from embedistill.errors import UsageError
from embedistill.evaluation.trial import make_floors
from embedistill.student.building import add_head, build_student, list_body
from embedistill.student.head import fit_pca, project, solve_ridge
from embedistill.student.planning import TransformerPlan, plan_transformer
from embedistill.student.saving import count_layers, load_projection, save_student
from embedistill.student.static import build_static

RNG = np.random.default_rng(0)


SIZES = Sizes(2, 32, 4, 64, 266)


def open_teacher(request: pytest.FixtureRequest, name: str) -> SentenceTransformer:
    return SentenceTransformer(str(request.getfixturevalue(name)), device="cpu")


def sizes_of(teacher: SentenceTransformer, **changed: int) -> Sizes:
    return replace(SIZES, vocabulary_size=len(teacher.tokenizer), **changed)


@pytest.mark.parametrize("architecture", ["teacher_dir", "mpnet_dir"])
def test_kept_whole_with_its_own_space_the_student_is_the_teacher(
    architecture: str, request: pytest.FixtureRequest, sentences: list[str]
) -> None:
    teacher = open_teacher(request, architecture)
    expected = teacher.encode(sentences)
    plan = TransformerPlan(sizes_of(teacher, layers=4), [0, 1, 2, 3])
    student, layers = build_student(teacher, plan, sentences, expected)
    headless = SentenceTransformer(modules=[student[0], student[1], Normalize()], device="cpu")
    np.testing.assert_allclose(headless.encode(sentences), expected, atol=1e-5)
    assert (student.encode(sentences) * expected).sum(1).min() > 0.95  # the head has learnt the identity
    assert layers == [0, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["teacher_dir", "mpnet_dir"])
def test_where_few_layers_are_dropped_the_others_stay_and_so_does_the_teacher(
    architecture: str, request: pytest.FixtureRequest, sentences: list[str]
) -> None:
    teacher = open_teacher(request, architecture)
    before = teacher.encode(sentences[:50])
    student, _ = build_student(teacher, TransformerPlan(sizes_of(teacher, layers=3), [0, 2, 3]), sentences[:50], before)
    assert (count_layers(student), count_layers(teacher)) == (3, 4)
    for kept, origin in zip(student[0].model.encoder.layer, [0, 2, 3], strict=True):
        for mine, theirs in zip(kept.parameters(), teacher[0].model.encoder.layer[origin].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    np.testing.assert_array_equal(teacher.encode(sentences[:50]), before)


@pytest.mark.parametrize("architecture", ["teacher_dir", "mpnet_dir"])
def test_a_narrow_student_with_few_pieces_is_as_planned_and_near_its_teacher(
    architecture: str, request: pytest.FixtureRequest, sentences: list[str], tmp_path: Path
) -> None:
    teacher = open_teacher(request, architecture)
    vectors = teacher.encode(sentences)
    wanted = sizes_of(teacher, hidden_size=24, num_attention_heads=3, intermediate_size=40)
    wanted = replace(wanted, vocabulary_size=wanted.vocabulary_size - 20)
    projection = fit_pca(vectors, 16)
    student, layers = build_student(teacher, TransformerPlan(wanted), sentences, vectors, projection=projection)
    model = student[0].model
    assert layers == sorted(layers)
    assert len(layers) == count_layers(student) == 2
    assert find_words(model).weight.shape == (wanted.vocabulary_size, 24)
    assert len(student.tokenizer) == wanted.vocabulary_size
    assert model.config.num_attention_heads == 3
    targets = project(vectors, projection)
    usual = project(targets.mean(0, keepdims=True), None)
    usual = usual / np.linalg.norm(usual)
    gap = 1 - (student.encode(sentences) * targets).sum(1).mean()
    assert gap < 0.5 * (1 - (targets @ usual.T).mean())  # half of what is between the texts, at the very least
    (tmp_path / "s").mkdir()
    save_student(student, tmp_path / "s", projection, {"layers": layers})
    again = SentenceTransformer(str(tmp_path / "s"), device="cpu")
    np.testing.assert_allclose(again.encode(sentences), student.encode(sentences), atol=1e-6)
    assert list(again.tokenizer(sentences[0])["input_ids"]) == list(student.tokenizer(sentences[0])["input_ids"])


def test_a_static_student_has_no_layers_and_says_what_its_pieces_say(
    mpnet_dir: Path, sentences: list[str], tmp_path: Path
) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    vectors = teacher.encode(sentences)
    student = build_static(teacher, sentences[:300], vectors[:300], vocabulary_size=240)
    teacher.tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<pad>")  # as all-mpnet-base-v2's is
    padded = build_static(teacher, sentences[:300], vectors[:300])
    teacher.tokenizer.backend_tokenizer.no_padding()
    plain = build_static(teacher, sentences[:300], vectors[:300])
    np.testing.assert_allclose(padded[0].embedding.weight.detach(), plain[0].embedding.weight.detach(), atol=1e-5)
    assert [type(module).__name__ for module in student] == ["StaticEmbedding", "Normalize"]
    assert student[0].embedding.weight.shape == (240, 32)
    found = student.encode(sentences[300:])
    assert (found * vectors[300:]).sum(1).mean() > (vectors[300:] @ vectors[:300].mean(0)).mean() + 0.02
    words = sentences[0].rstrip(".").split()
    np.testing.assert_allclose(
        student.encode(" ".join(words)), student.encode(" ".join(reversed(words))), atol=1e-5
    )  # it is a bag of words
    (tmp_path / "s").mkdir()
    save_student(student, tmp_path / "s", None, {"layers": None})
    again = SentenceTransformer(str(tmp_path / "s"), device="cpu")
    np.testing.assert_allclose(again.encode(sentences[:9]), student.encode(sentences[:9]), atol=1e-6)


def test_a_student_pools_the_prompts_that_it_is_trained_with(mpnet_dir: Path, sentences: list[str]) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu", prompts={"query": "ship : "})
    teacher[1].include_prompt = False
    vectors = teacher.encode(sentences)
    student, _ = build_student(teacher, TransformerPlan(sizes_of(teacher, layers=2), [0, 3]), sentences, vectors)
    expected = student.encode([f"ship : {text}" for text in sentences[:5]])
    np.testing.assert_allclose(student.encode_query(sentences[:5]), expected, atol=1e-6)
    assert all(module.include_prompt for module in list_body(teacher) if isinstance(module, Pooling))
    assert not teacher[1].include_prompt


def test_the_floor_of_word_vectors_sees_the_prompts_that_its_head_was_solved_with(
    mpnet_dir: Path, sentences: list[str], tmp_path: Path
) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu", prompts={"document": "barn : "})
    prompted = [f"barn : {text}" for text in sentences]
    vectors = teacher.encode_document(sentences)
    (floor,) = make_floors(tmp_path, teacher, lambda *_: vectors, lambda _: (prompted, vectors))
    found = floor.encode(sentences[:9], "document")
    np.testing.assert_array_equal(found, floor.encode(prompted[:9], "query"))  # which have no prompt
    assert not np.allclose(found, floor.encode(sentences[:9], "query"))


def test_another_model_as_the_start_gets_a_head_into_the_teachers_space(
    mpnet_dir: Path, teacher_dir: Path, sentences: list[str]
) -> None:
    teacher = SentenceTransformer(str(mpnet_dir), device="cpu")
    other = SentenceTransformer(str(teacher_dir), device="cpu")
    vectors = teacher.encode(sentences)
    student = add_head(list_body(other), teacher, sentences, vectors)
    assert [type(module).__name__ for module in student] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert student[0].model.config.model_type == "bert"
    assert (student.encode(sentences) * vectors).sum(1).mean() > (vectors @ vectors.mean(0)).mean()


def test_a_saved_student_needs_nothing_of_ours(teacher_dir: Path, sentences: list[str], tmp_path: Path) -> None:
    teacher = SentenceTransformer(str(teacher_dir), device="cpu")
    vectors = teacher.encode(sentences)
    projection = fit_pca(vectors, 16)
    plan = TransformerPlan(sizes_of(teacher, hidden_size=16), [0, 3])
    student, _ = build_student(teacher, plan, sentences, vectors, projection=projection)
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


def test_plans_write_every_size_out(teacher_dir: Path) -> None:
    config = read_config(teacher_dir)
    pieces = config["vocab_size"]
    assert plan_transformer(config, 3) == TransformerPlan(Sizes(3, 32, 4, 64, pieces))
    assert plan_transformer(config, [1, 2]) == TransformerPlan(Sizes(2, 32, 4, 64, pieces), [1, 2])
    assert plan_transformer(config, 2, hidden_size=18).sizes == Sizes(2, 18, 3, 40, pieces)  # 36 neurons, to eights
    narrow = plan_transformer(
        config, 2, hidden_size=20, num_attention_heads=2, intermediate_size=9, vocabulary_size=230
    )
    assert narrow.sizes == Sizes(2, 20, 2, 9, 230)


@pytest.mark.parametrize(
    ("layers", "sizes", "message"),
    [
        (5, {}, "student.layers: 5; expected at most the teacher's 4"),
        ([0, 4], {}, "ascending numbers from 0 to 3"),
        ([1, 1], {}, "ascending numbers"),
        ([], {}, "ascending numbers"),
        (2, {"hidden_size": 33}, "student.hidden_size: 33; expected at most the teacher's 32"),
        (
            2,
            {"num_attention_heads": 3},
            "student.num_attention_heads: 3 heads; expected heads of equal size in hidden_size 32",
        ),
        (2, {"vocabulary_size": 9000}, "student.vocabulary_size: 9000; expected at most"),
    ],
)
def test_plans_that_cannot_be(teacher_dir: Path, layers: int | list[int], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_transformer(read_config(teacher_dir), layers, **sizes)


def test_layers_without_a_shared_bias_keep_heads_of_their_own(teacher_dir: Path, sentences: list[str]) -> None:
    """Two of four heads carry nothing: in the first layer the last two, in the others the first two."""
    teacher = SentenceTransformer(str(teacher_dir), device="cpu")
    with torch.no_grad():
        for number, layer in enumerate(teacher[0].model.encoder.layer):
            idle = slice(16, 32) if number == 0 else slice(0, 16)
            layer.attention.self.value.weight[idle] = 0
            layer.attention.self.value.bias[idle] = 0
    plan = TransformerPlan(sizes_of(teacher, hidden_size=24, num_attention_heads=2), [0, 3])
    student, _ = build_student(teacher, plan, sentences, teacher.encode(sentences))
    for layer in student[0].model.encoder.layer:
        written = layer.attention.self.value.weight.view(2, 12, 24).norm(dim=(1, 2))
        assert written.min() > 0.01 * written.max()
    assert written.min() > 0


@pytest.mark.parametrize("n_texts", [2, 5, 30])
def test_few_texts_still_give_a_student(teacher_dir: Path, sentences: list[str], n_texts: int) -> None:
    teacher = SentenceTransformer(str(teacher_dir), device="cpu")
    texts = sentences[:n_texts]
    student, layers = build_student(teacher, TransformerPlan(sizes_of(teacher)), texts, teacher.encode(texts))
    assert len(layers) == 2
    assert np.isfinite(student.encode(texts)).all()
