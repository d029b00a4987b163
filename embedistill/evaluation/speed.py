"""How fast models are beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def measure_speed(
    encoders: Mapping[str, Callable[[Sequence[str]], Any]], texts: Sequence[str], rounds: int = 3
) -> dict[str, float]:
    """Return texts/s by model: the median of some rounds, the models taking turns so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {role: [] for role in encoders}
    for encode in encoders.values():
        encode(texts[:8])
    for _ in range(rounds):
        for role, encode in encoders.items():
            start = time.perf_counter()
            encode(texts)
            seconds[role].append(time.perf_counter() - start)
    return {role: len(texts) / statistics.median(times) for role, times in seconds.items()}
