"""What models cost: parameters, bytes, and how fast they are beside each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from embedistill.errors import EmbedistillError
from embedistill.files import folder_bytes
from embedistill.progress import progress_bar

_SINGLE = 32  # texts that are encoded one at a time
_START = """
import json, re, sys, time
from pathlib import Path

def find_peak():
    status = Path("/proc/self/status")  # getrusage counts what the process was before it became this one
    if status.is_file():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

from sentence_transformers import SentenceTransformer
imported = time.perf_counter()
model = SentenceTransformer(sys.argv[1], device="cpu", local_files_only=True)
texts = json.load(sys.stdin)
model.encode(texts[:1])
first = time.perf_counter()
model.encode(texts)
print(json.dumps({"cold_start_seconds": first - imported, "peak_megabytes": find_peak()}))
"""


@dataclass(frozen=True)
class Speed:
    """How fast a model encodes, measured beside others.

    Attributes:
        texts_per_second: In batches, the median of some rounds.
        p50_ms: Median time of one text alone.
        p95_ms: 95th percentile of it.
    """

    texts_per_second: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Start:
    """What a new process needs for a model, on processors.

    Attributes:
        cold_start_seconds: From the folder to the first vector, the import of the libraries left out.
        peak_megabytes: Of the process, libraries and all, when it has encoded a batch; None on Windows.
    """

    cold_start_seconds: float
    peak_megabytes: float | None


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
        p50_ms: Median time of one text alone.
        p95_ms: 95th percentile of it.
        cold_start_seconds: From the folder to the first vector.
        peak_megabytes: Of a process that has encoded a batch with it.
    """

    role: str
    name: str
    parameters: int
    layers: int | None
    embedding_size: int
    megabytes: float
    texts_per_second: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    cold_start_seconds: float | None = None
    peak_megabytes: float | None = None


def describe_model(
    role: str,
    name: str,
    model: SentenceTransformer,
    folder: Path,
    *,
    speed: Speed | None = None,
    start: Start | None = None,
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
        **({} if speed is None else vars(speed)),
        **({} if start is None else vars(start)),
    )


def measure_speed(
    encoders: Mapping[str, Callable[[Sequence[str]], Any]], texts: Sequence[str], rounds: int = 3
) -> dict[str, Speed]:
    """Measure models on the same texts, in batches and one text at a time.

    The models take turns, so that a busy machine slows all alike.
    """
    together: dict[str, list[float]] = {role: [] for role in encoders}
    alone: dict[str, list[float]] = {role: [] for role in encoders}
    for encode in encoders.values():
        encode(texts[:8])
    with progress_bar("measuring speed", rounds * len(encoders), "passes") as advance:
        for number in range(rounds):
            for role, encode in encoders.items():
                together[role].append(_time(encode, texts))
                alone[role] += [_time(encode, [text]) for text in texts[number:_SINGLE:rounds]]
                advance(1)
    speeds = {}
    for role in encoders:
        p50, p95 = (1000 * float(seconds) for seconds in np.percentile(alone[role], [50, 95]))
        speeds[role] = Speed(len(texts) / float(np.median(together[role])), p50, p95)
    return speeds


def measure_start(folder: Path, texts: Sequence[str]) -> Start:
    """Measure a model in a process of its own.

    Raises:
        EmbedistillError: The process failed.
    """
    command = [sys.executable, "-c", _START, str(folder)]
    done = subprocess.run(command, input=json.dumps(list(texts)), capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        found = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EmbedistillError(f"model {folder}", found[0], do="check that SentenceTransformer(path) loads it")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def _time(encode: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start
