"""Score a model as the leaderboard of mteb does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from embedistill.encoding.local import LocalEncoder, encode_here
from embedistill.errors import UsageError
from embedistill.evaluation.benchmark import list_benchmark_tasks, run_benchmark, write_submission
from embedistill.files import fingerprint
from embedistill.teacher import default_cache_dir, locate


def benchmark(
    model: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path = "mteb",
    cache_dir: str | Path | None = None,
) -> dict[str, float]:
    """Run tasks of mteb with mteb's own evaluators, and return their main scores.

    Args:
        model: A folder or a model id; of the folder of a run, its student.
        tasks: Their names in mteb; default: all that `data` has data for.
        data: Folder as `evaluate` takes it; what it has not comes from the Hub.
        out: Folder of mteb's result cache, and of `.eval_results/`, the files that the Hub reads from a model's own.
        cache_dir: Folder for models; default: `default_cache_dir()`.

    Raises:
        UsageError: There is no such model, task or data.
        EmbedistillError: The Hub does not answer.
    """
    folder = Path(data) if data else None
    names = tasks or (list_benchmark_tasks(folder) if folder else [])
    if not names:
        raise UsageError("tasks", "none, and no folder with data", "names of mteb's tasks, or --data DIR")
    located = locate(str(model), models_dir=Path(cache_dir or default_cache_dir()) / "models")
    encoder = LocalEncoder(located, torch.float32)
    name = Path(model).absolute().name if Path(model).is_dir() else str(model)
    revision = fingerprint([located.weights_sha256, located.settings_sha256])[:16]
    scores = run_benchmark(
        names,
        partial(encode_here, encoder, name),
        model_name=name,
        revision=revision,
        embedding_size=encoder.model.get_embedding_dimension() or 0,
        results_dir=Path(out),
        folder=folder,
    )
    write_submission(Path(out), Path(out), model_name=name, revision=revision)
    return scores
