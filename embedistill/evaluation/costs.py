"""What models cost: parameters, bytes, and how fast they are beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from embedistill.files import folder_bytes
from embedistill.progress import progress_bar


@dataclass(frozen=True)
class ModelFacts:
    """What a model costs.

    Attributes:
        role: teacher, student, untrained, or a baseline's name.
        name: Its id or path.
        parameters: How many.
        layers: Transformer layers, where it has any.
        embedding_size: Dimension of its embeddings.
        megabytes: On disk.
        texts_per_second: Measured beside the others in one run.
    """

    role: str
    name: str
    parameters: int
    layers: int | None
    embedding_size: int
    megabytes: float
    texts_per_second: float | None = None


def describe_model(
    role: str, name: str, model: SentenceTransformer, folder: Path, texts_per_second: float | None = None
) -> ModelFacts:
    """Return what a loaded model costs."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    return ModelFacts(
        role=role,
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=getattr(config, "num_hidden_layers", None),
        embedding_size=model.get_embedding_dimension() or 0,
        megabytes=round(folder_bytes(folder) / 1e6, 1),
        texts_per_second=texts_per_second,
    )


def measure_speed(
    encoders: Mapping[str, Callable[[Sequence[str]], Any]], texts: Sequence[str], rounds: int = 3
) -> dict[str, float]:
    """Return texts/s by model: the median of some rounds.

    The models take turns, so that a busy machine slows all alike.
    """
    seconds: dict[str, list[float]] = {role: [] for role in encoders}
    for encode in encoders.values():
        encode(texts[:8])
    with progress_bar("measuring speed", rounds * len(encoders), "passes") as advance:
        for _ in range(rounds):
            for role, encode in encoders.items():
                start = time.perf_counter()
                encode(texts)
                seconds[role].append(time.perf_counter() - start)
                advance(1)
    return {role: len(texts) / statistics.median(times) for role, times in seconds.items()}
