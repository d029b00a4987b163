"""A student made from the teacher's own weights: fewer layers, and a head that is solved, not drawn at random."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn

from embedistill.errors import UsageError
from embedistill.files import read_json, write_json
from embedistill.teacher import encode_with_progress

ARCHITECTURES = ("bert", "mpnet", "roberta", "xlm-roberta", "camembert")
PROJECTION = "teacher_projection.npy"

Matrix = npt.NDArray[np.float32]


def check_plan(teacher_folder: Path, layers: int | list[int], embedding_size: int | None) -> list[int]:
    """Check what a student shall keep against its teacher, and return the layers, counted from 0.

    `layers` as a number keeps the lower ones and the last.

    Raises:
        UsageError: The architecture is not supported, or has no such layers, or no such dimension.
    """
    config = read_json(teacher_folder / "config.json") if (teacher_folder / "config.json").is_file() else {}
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        do = "choose a teacher of one of these"
        raise UsageError(f"teacher {teacher_folder}", f"architecture {architecture!r}", ", ".join(ARCHITECTURES), do)
    depth, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    if embedding_size and embedding_size > width:
        raise UsageError("student.embedding_size", str(embedding_size), f"at most the teacher's {width}")
    if isinstance(layers, int):
        if layers > depth:
            raise UsageError("student.layers", str(layers), f"at most the teacher's {depth}")
        return [*range(layers - 1), depth - 1]
    if not layers or any(not 0 <= layer < depth for layer in layers) or sorted(set(layers)) != layers:
        raise UsageError("student.layers", str(layers), f"ascending numbers from 0 to {depth - 1}")
    return layers


def fit_pca(vectors: Matrix, size: int) -> Matrix:
    """Return the uncentred PCA of vectors (n_texts, dim) as a matrix (dim, size), its columns orthonormal.

    Uncentred, it keeps inner products as well as `size` dimensions can, and needs no bias. The sign of a column is the
    one that makes its largest entry positive, so that the same vectors give the same matrix.
    """
    _, eigenvectors = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    columns = eigenvectors[:, ::-1][:, :size]
    largest = columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])]
    signed: Matrix = (columns * np.sign(largest)).astype(np.float32)
    return signed


def project(vectors: Matrix, projection: Matrix | None) -> Matrix:
    """Map teacher vectors (n_texts, dim) into the student's space, to unit length; None leaves them as they are."""
    if projection is None:
        return vectors
    mapped = vectors @ projection
    unit: Matrix = mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def build_student(
    teacher: SentenceTransformer, layers: list[int], texts: Sequence[str], targets: Matrix
) -> SentenceTransformer:
    """Build a student of some of the teacher's layers, with a head solved by ridge regression.

    Args:
        teacher: The teacher in fp32; it is left as it is.
        layers: Which of its layers to keep, counted from 0.
        texts: Texts to solve the head on, as the model sees them: with their prompts.
        targets: Their vectors in the student's space, shape (n_texts, embedding_size).

    Returns:
        A plain SentenceTransformer of built-in modules: transformer, the teacher's pooling, Dense, Normalize.
    """
    modules: list[nn.Module] = [copy.deepcopy(teacher[0]), copy.deepcopy(teacher[1])]
    transformer: Any = modules[0]
    transformer.model = _drop_layers(transformer.model, layers)
    prompts = {"prompts": teacher.prompts, "default_prompt_name": teacher.default_prompt_name}
    body = SentenceTransformer(modules=modules, device=str(teacher.device))
    pooled = encode_with_progress(body, "student", texts, unit=False)
    weight = torch.from_numpy(solve_ridge(pooled, targets).T.copy())
    head = Dense(pooled.shape[1], targets.shape[1], bias=False, activation_function=nn.Identity(), init_weight=weight)
    student = SentenceTransformer(modules=[*modules, head, Normalize()], device=str(teacher.device), **prompts)
    student.max_seq_length = teacher.max_seq_length
    return student


def solve_ridge(inputs: Matrix, targets: Matrix, ridge: float = 1e-3) -> Matrix:
    """Return the matrix W (n_in, n_out) that minimises |inputs W - targets|^2 + lambda |W|^2.

    lambda is `ridge` times the mean eigenvalue of inputs^T inputs, so that it does not depend on the inputs' scale.
    """
    gram = inputs.T.astype(np.float64) @ inputs
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram, inputs.T.astype(np.float64) @ targets).astype(np.float32)


def save_student(student: SentenceTransformer, folder: Path, projection: Matrix | None, space: dict[str, Any]) -> None:
    """Save a student so that SentenceTransformer(folder) loads it, with the map from its teacher's space beside it.

    Args:
        student: The model.
        folder: An existing folder.
        projection: The PCA that the student's space is, shape (teacher dim, dim); None: the teacher's own space.
        space: What the student's space is, for `embedistill.json`.
    """
    student.save(str(folder), create_model_card=False)
    write_json(folder / "embedistill.json", {**space, "projection": PROJECTION if projection is not None else None})
    if projection is not None:
        np.save(folder / PROJECTION, projection, allow_pickle=False)
    saved = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    if saved != count_layers(student):
        raise RuntimeError(f"{folder}: saved as {saved} layers, has {count_layers(student)}")


def load_projection(folder: Path) -> Matrix | None:
    """Return the PCA beside a saved student, shape (teacher dim, dim); None: it is in the teacher's own space."""
    path = folder / PROJECTION
    return np.load(path, allow_pickle=False) if path.is_file() else None


def count_layers(student: SentenceTransformer) -> int:
    """Return the number of transformer layers."""
    transformer: Any = student[0]
    return len(transformer.model.encoder.layer)


def _drop_layers(model: Any, layers: list[int]) -> Any:
    """Keep some layers of a BERT-like model; a position bias that MPNet's layers share stays as it is."""
    model.encoder.layer = nn.ModuleList(model.encoder.layer[layer] for layer in layers)
    model.config.num_hidden_layers = len(layers)
    return model
