"""Compare models that are there already: any model with its teacher, and runs with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sentence_transformers import SentenceTransformer

from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.hardware import choose_dtype
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import UsageError
from embedistill.evaluation.comparison import compare_results
from embedistill.evaluation.costs import ModelFacts, describe_model
from embedistill.evaluation.scoring import Encoder, Result, load_results, score_model
from embedistill.evaluation.tasks import load_tasks
from embedistill.report.document import Report, load_report
from embedistill.stages import list_versions
from embedistill.teacher import default_cache_dir, encode_with_progress, load, locate

RESAMPLES = 10_000
SEED = 42


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    teacher: str | None = None,
    data: str | Path | None = None,
    margin: float | None = None,
    cache_dir: str | Path | None = None,
) -> Report:
    """Score a model on tasks and, with a teacher, say how much of it the model keeps.

    Args:
        model: A folder or a model id.
        tasks: Names of STS sets and of retrieval sets.
        teacher: A folder or a model id; its embeddings are cached.
        data: Folder with sts/NAME.jsonl and retrieval/NAME/; default: the Hub.
        margin: With it, retention has a verdict.
        cache_dir: Folder for models and teacher embeddings; default: `default_cache_dir()`.

    Raises:
        UsageError: There is no such model or task.
        EmbedistillError: The Hub does not answer.
    """
    _check_margin(margin)
    if margin is not None and teacher is None:
        raise UsageError("margin", "no teacher to keep anything of", "a teacher beside it", "give --teacher too")
    cache = Path(cache_dir or default_cache_dir())
    loaded = load_tasks(tasks, Path(data) if data else None, skip_missing=False)
    names = {"teacher": teacher, "student": str(model)} if teacher else {"student": str(model)}
    facts: list[ModelFacts] = []
    results: list[Result] = []
    for role, name in names.items():
        located = locate(name, models_dir=cache / "models")
        if role == "teacher":
            local = LocalEncoder(located, choose_dtype("auto"))
            scored: SentenceTransformer = local.model
            encoder: Encoder = CachedTeacher(local, cache / "embeddings").vectors
        else:
            scored = load(located)
            encoder = partial(encode_with_progress, scored, role)
        facts.append(describe_model(role, name, scored, located.path))
        results += score_model(loaded, encoder, role=role, model=name, versions=list_versions())
    comparisons = compare_results(results, resamples=RESAMPLES, seed=SEED, margin=margin)
    return Report(str(model), facts, comparisons, margin)


def compare(*runs: str | Path, margin: float | None = None) -> Report:
    """Compare the students of runs that have the same teacher, on the tasks that were scored on the same items.

    Args:
        runs: Folders of finished runs.
        margin: With it, retention has a verdict.

    Raises:
        UsageError: A folder is no finished run, or the runs have no task with the same items.
    """
    _check_margin(margin)
    folders = [Path(run) for run in runs]
    reports = [load_report(folder) for folder in folders]
    results = [{(found.task, found.role): found for found in load_results(folder / "results")} for folder in folders]
    names = _distinct_names(folders)
    teachers = {task: found for (task, role), found in results[0].items() if role == "teacher"}
    shared = [
        task
        for task, teacher in teachers.items()
        if all(_same_items(teacher, found.get((task, "teacher"))) for found in results)
    ]
    if not shared:
        do = "compare runs of one teacher that were evaluated on the same tasks"
        raise UsageError(", ".join(str(folder) for folder in folders), "no task with the same items in all", do=do)
    chosen = [teachers[task] for task in shared]
    for name, found in zip(names, results, strict=True):
        chosen += [replace(found[task, "student"], role=name) for task in shared]
    models = [next(model for model in reports[0].models if model.role == "teacher")]
    for name, report in zip(names, reports, strict=True):
        models.append(replace(next(model for model in report.models if model.role == "student"), role=name))
    comparisons = compare_results(chosen, resamples=RESAMPLES, seed=SEED, margin=margin)
    return Report(" and ".join(names), models, comparisons, margin, judged=names)


def _check_margin(margin: float | None) -> None:
    if margin is not None and not 0 < margin < 1:
        raise UsageError("margin", str(margin), "a share between 0 and 1, such as 0.03")


def _same_items(teacher: Result, other: Result | None) -> bool:
    return other is not None and (other.task_sha256, other.model) == (teacher.task_sha256, teacher.model)


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
