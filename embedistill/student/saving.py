"""A student on disk: a plain model folder, with what its space is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from embedistill.architectures import ARCHITECTURES, find_layers
from embedistill.files import read_json, write_json
from embedistill.student.head import Matrix

PROJECTION = "teacher_projection.npy"
SPACE = "embedistill.json"


def save_student(student: SentenceTransformer, folder: Path, projection: Matrix | None, space: dict[str, Any]) -> None:
    """Save a student so that SentenceTransformer(folder) loads it, with the map from its teacher's space beside it.

    Args:
        student: The model.
        folder: An existing folder.
        projection: The PCA that the student's space is, shape (teacher dim, dim); None: the teacher's own space.
        space: What the student's space is, for embedistill.json.
    """
    student.save(str(folder), create_model_card=False)
    write_json(folder / SPACE, {**space, "projection": PROJECTION if projection is not None else None})
    if projection is not None:
        np.save(folder / PROJECTION, projection, allow_pickle=False)
    found = count_layers(student)
    if found is not None:
        config = read_json(folder / "config.json")
        saved = config[ARCHITECTURES[config["model_type"]].depth]
        if saved != found:
            raise RuntimeError(f"{folder}: saved as {saved} layers, has {found}")


def load_projection(folder: Path) -> Matrix | None:
    """Return the PCA beside a saved student, shape (teacher dim, dim); None: it is in the teacher's own space."""
    path = folder / PROJECTION
    return np.load(path, allow_pickle=False) if path.is_file() else None


def count_layers(student: SentenceTransformer) -> int | None:
    """Return the number of transformer layers; None where the architecture is not one that is cut."""
    transformer: Any = getattr(student[0], "model", None)
    known = transformer is not None and transformer.config.model_type in ARCHITECTURES
    return len(find_layers(transformer)) if known else None
