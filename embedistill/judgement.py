"""Compare models that are there already: any model with its teacher, and runs with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from embedistill.choices import Dtype, Encodes, IndexKind
from embedistill.corpus.records import Record, choose_kind, load_corpus
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.hardware import choose_dtype
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import UsageError
from embedistill.evaluation.comparison import compare_results
from embedistill.evaluation.loading import list_tasks, load_tasks
from embedistill.evaluation.scoring import TEACHER, Encoder, Result, load_results, save_results
from embedistill.evaluation.segments import (
    MISSPELT,
    Measure,
    count_characters,
    find_segments,
    judge_segments,
    make_distance_measure,
    make_piece_measure,
)
from embedistill.evaluation.tasks import AgreementTask, Task
from embedistill.evaluation.trial import (
    FIT_TEXTS,
    PCA,
    STUDENT,
    UNTRAINED,
    WORDS,
    Candidate,
    choose_texts,
    describe_details,
    find_contamination,
    find_disagreements,
    make_candidate,
    make_floors,
    measure_candidates,
    score_all,
)
from embedistill.files import read_json
from embedistill.report.document import Report, load_report, save_report
from embedistill.report.rendering import write_page
from embedistill.stages import list_versions
from embedistill.student.head import Matrix, project
from embedistill.student.saving import SPACE, load_projection
from embedistill.teacher import (
    LocatedModel,
    default_cache_dir,
    embed_cheaply,
    find_prompt,
    has_words,
    locate,
)

RESAMPLES = 10_000
SEED = 42
MARGIN = 0.03
"""What a student may lose, where nothing else is said."""
_GIVE_TEACHER = "give --teacher too"
_ROLES = {TEACHER, STUDENT, UNTRAINED, WORDS, PCA}


def evaluate(
    model: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    teacher: str | None = None,
    data: str | Path | None = None,
    baselines: Sequence[str] = (),
    margin: float | None = None,
    segment_margin: float | None = None,
    index: IndexKind = "flat",
    misspelt: bool = False,
    documents: Encodes = "student",
    floors: bool = True,
    dtype: Dtype = "float32",
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Report:
    """Score a model on tasks and, with a teacher, say how much of it the model keeps.

    Args:
        model: A folder or a model id; of the folder of a run, its student.
        tasks: Names of tasks, or .jsonl files of one's own; default: all in `data`.
        teacher: A folder or a model id; its embeddings are cached.
        data: Folder with sts/NAME.jsonl, retrieval/NAME/ and more; default: the Hub, for STS sets.
        baselines: Models to compare beside it.
        margin: What may be lost; default: 0.03 where there is a teacher. Retention has a verdict.
        segment_margin: What a part of a task may lose; default: twice the margin.
        index: The FAISS index of retrieval tasks: flat, hnsw or ivfpq.
        misspelt: Score teacher and student also on the tasks with typing errors.
        documents: Who encodes the documents of retrieval tasks: the student, or, where an index stays as the teacher
            built it, the teacher; the student and its floors then search these with their own queries.
        floors: Score beside the student of a run what it has to be better than: itself untrained and the mean of the
            teacher's word vectors with a solved head; and the teacher at the student's dimension.
        dtype: Number format of the products of student, baselines and floors, where they run on a processor without
            padding: float32, as they are, bfloat16, or auto: bfloat16 where it is measured faster. All else of them
            is in fp32.
        out: Folder for the values of every item, report.json and report.html.
        cache_dir: Folder for models and teacher embeddings; default: `default_cache_dir()`.

    Raises:
        UsageError: There is no such model or task.
        EmbedistillError: The Hub does not answer.
    """
    for name, given in (("margin", margin), ("segment_margin", segment_margin)):
        _check_share(name, given)
        if given is not None and teacher is None:
            raise UsageError(name, "no teacher to keep anything of", "a teacher beside it", _GIVE_TEACHER)
    if documents == TEACHER and teacher is None:
        raise UsageError("documents: teacher", "no teacher", "one that encodes documents", _GIVE_TEACHER)
    _check_baselines(baselines)
    _check_out(out)
    cache = Path(cache_dir or default_cache_dir())
    loaded = _load_tasks(tasks, Path(data) if data else None, with_teacher=teacher is not None)
    run = Path(model) if (Path(model) / "model").is_dir() and (Path(model) / "run.json").is_file() else None
    local = LocalEncoder(_locate_teacher(teacher, run, cache), choose_dtype("auto")) if teacher else None
    vectors = CachedTeacher(local, cache / "embeddings").vectors if local else None
    student = locate(str(model), models_dir=cache / "models")
    located = {name: locate(name, models_dir=cache / "models") for name in baselines}
    records = load_corpus(run / "corpus.parquet")["train"] if run else []
    products = choose_dtype(dtype)
    candidates = _list_candidates(student, products, local, vectors)
    if local and vectors and floors and run:
        candidates += _list_floors(run, cache, local, vectors, records, products=products)
    candidates += [make_candidate(name, one, products=products) for name, one in located.items()]
    results = score_all(
        loaded,
        candidates,
        teacher=vectors,
        index=index,
        misspelt=misspelt,
        documents=documents,
        seed=SEED,
        versions=list_versions(),
    )
    if out:
        save_results(results, Path(out) / "results")
    texts = list(dict.fromkeys(text for record in records for text in record.texts))
    (compared,) = (one.model for one in candidates if one.role == STUDENT and one.model)
    report = judge(
        str(model),
        loaded,
        results,
        measures=choose_measures(compared, local and local.model, texts),
        margin=None if teacher is None else _choose_margin(margin),
        segment_margin=segment_margin,
        models=measure_candidates(candidates, choose_texts(loaded, documents)),
        contamination=find_contamination(loaded, texts),
    )
    if out:
        _write(report, Path(out))
    return report


def judge(
    name: str,
    tasks: Sequence[Task],
    results: Sequence[Result],
    *,
    measures: dict[str, Measure],
    margin: float | None,
    segment_margin: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    **further: Any,
) -> Report:
    """Make a report of results: comparisons, tests, segments, and where teacher and student differ most."""
    gate = _choose_gate(margin, segment_margin)
    plain = [result for result in results if not result.task.startswith(MISSPELT)]
    comparisons, differences = compare_results(plain, resamples=resamples, seed=seed, margin=margin)
    segments = find_segments(tasks, results, measures, student=STUDENT, seed=seed, margin=gate)
    return Report(
        name=name,
        comparisons=comparisons,
        margin=margin,
        differences=differences,
        segments=segments,
        segment_margin=gate,
        disagreements=find_disagreements(tasks, plain),
        details=describe_details(plain),
        **further,
    )


def choose_measures(
    student: SentenceTransformer, teacher: SentenceTransformer | None, trained: Sequence[str]
) -> dict[str, Measure]:
    """Return what tells texts apart: their length, how well the student's vocabulary fits, how near the corpus is."""
    measures: dict[str, Measure] = {"characters": count_characters}
    tokenizer = getattr(student.tokenizer, "backend_tokenizer", student.tokenizer)
    if isinstance(tokenizer, Tokenizer):
        measures["pieces a word"] = make_piece_measure(tokenizer)
    if teacher and trained and has_words(teacher):
        measures["distance from the corpus"] = make_distance_measure(partial(embed_cheaply, teacher), trained)
    return measures


def compare(
    *runs: str | Path,
    margin: float | None = None,
    segment_margin: float | None = None,
    out: str | Path | None = None,
) -> Report:
    """Compare the students of runs that have the same teacher, on the tasks that were scored on the same items.

    Args:
        runs: Folders of finished runs.
        margin: What may be lost; default: 0.03.
        segment_margin: What a part of a task may lose; default: twice the margin.
        out: Folder for report.json and report.html.

    Raises:
        UsageError: A folder is no finished run, or the runs have no task with the same items.
    """
    _check_share("margin", margin)
    _check_share("segment_margin", segment_margin)
    if not runs:
        raise UsageError("runs", "none", "the folder of one finished run at the very least")
    allowed = _choose_margin(margin)
    gate = _choose_gate(allowed, segment_margin)
    _check_out(out)
    folders = [Path(run) for run in runs]
    reports = [load_report(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError(", ".join(map(str, folders)), "one run twice", "runs that differ", "leave one out")
    results = [{(found.task, found.role): found for found in load_results(folder / "results")} for folder in folders]
    names = _distinct_names(folders)
    shared = _list_shared(results)
    if not shared:
        do = "compare runs of one teacher that were evaluated on the same tasks"
        raise UsageError(", ".join(str(folder) for folder in folders), "no task with the same items in all", do=do)
    chosen = [results[0][task, TEACHER] for task in shared]
    for name, found in zip(names, results, strict=True):
        chosen += [replace(found[task, STUDENT], role=name) for task in shared]
    models = [next(model for model in reports[0].models if model.role == TEACHER)]
    for name, report in zip(names, reports, strict=True):
        models.append(replace(next(model for model in report.models if model.role == STUDENT), role=name))
    comparisons, differences = compare_results(chosen, resamples=RESAMPLES, seed=SEED, margin=allowed)
    segments = [
        replace(segment, role=name)
        for name, own in zip(names, reports, strict=True)
        for segment in own.segments
        if segment.task in shared
    ]
    report = Report(
        " and ".join(names),
        models,
        comparisons,
        allowed,
        judged=names,
        differences=differences,
        segments=judge_segments(segments, gate),
        segment_margin=gate,
    )
    if out:
        _write(report, Path(out))
    return report


def _load_tasks(names: Sequence[str] | None, folder: Path | None, *, with_teacher: bool) -> list[Task]:
    """Load the named tasks, or all of a folder; only with a teacher is there something to agree with."""
    names = names or (list_tasks(folder) if folder else [])
    if not names:
        found = f"none in {folder}" if folder else "none, and no folder of them"
        raise UsageError("tasks", found, "names of tasks, or --data DIR for all of a folder")
    tasks = load_tasks(names, folder, skip_missing=False)
    agreement = [task.name for task in tasks if isinstance(task, AgreementTask)]
    if agreement and not with_teacher:
        raise UsageError(", ".join(agreement), "texts alone", "a teacher to agree with", _GIVE_TEACHER)
    return tasks


def _check_baselines(names: Sequence[str]) -> None:
    taken = [name for name in names if name in _ROLES]
    if taken:
        found, do = f"{taken[0]}, which models of an evaluation are called", f"give its path: ./{taken[0]}"
        raise UsageError("--baseline", found, "another name", do)


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise UsageError(name, str(value), "a share between 0 and 1, such as 0.03")


def _choose_margin(margin: float | None) -> float:
    return MARGIN if margin is None else margin


def _choose_gate(margin: float | None, segment_margin: float | None) -> float | None:
    """Return what a segment may lose: twice the margin, where nothing else is said."""
    return segment_margin if segment_margin is not None else margin and min(2 * margin, 0.99)


def _list_candidates(
    student: LocatedModel, products: torch.dtype, teacher: LocalEncoder | None, vectors: Encoder | None
) -> list[Candidate]:
    """Return the teacher, where there is one, and the student."""
    judged = make_candidate(STUDENT, student, _find_space(student.path, teacher.located if teacher else None), products)
    if not teacher or not vectors:
        return [judged]
    found = teacher.located
    return [Candidate(TEACHER, found.name, vectors, _same, teacher.model, found.path), judged]


def _list_floors(
    run: Path,
    cache: Path,
    teacher: LocalEncoder,
    vectors: Encoder,
    records: Sequence[Record],
    *,
    products: torch.dtype,
) -> list[Candidate]:
    """Return the floors of the student of a run, where it was made for this teacher, as far as they are kept."""
    space = _find_space(run / "model", teacher.located)
    if space is None:
        return []

    def sample(model: SentenceTransformer) -> tuple[list[str], Matrix]:
        fitted, kind = choose_kind(records)
        some = list(dict.fromkeys(record.document for record in fitted))
        some = [some[number] for number in np.random.default_rng(SEED).permutation(len(some))[:FIT_TEXTS]]
        return [find_prompt(model, kind) + text for text in some], vectors(some, kind)

    floors = make_floors(run / "model", teacher.model, vectors, sample)
    if (run / "untrained").is_dir():
        untrained = locate(str(run / "untrained"), models_dir=cache / "models")
        floors.insert(0, make_candidate(UNTRAINED, untrained, space, products))
    return floors


def _locate_teacher(name: str, run: Path | None, cache: Path) -> LocatedModel:
    """Find a teacher; it has the prompts that the recipe of a run gave it, if it is that run's."""
    located = locate(name, models_dir=cache / "models")
    recorded = read_json(run / "run.json")["stages"].get("encode", {}).get("teacher", {}) if run else {}
    same = recorded.get("weights_sha256") == located.weights_sha256
    return replace(located, prompts=recorded.get("prompts", {})) if same else located


def _check_out(out: str | Path | None) -> None:
    """Raise an error where a report would take the place of what is not a report's."""
    folder = Path(out or "")
    results = folder / "results"
    files = [path for path in results.rglob("*") if path.is_file()] if out else []
    others = [path.name for path in files if path.suffix != ".json" or path.parent.parent != results]
    if out and folder.exists() and not folder.is_dir():
        found = "a file"
    elif out and (folder / "run.json").is_file():
        found = "a run, whose own report would be lost"
    elif out and others:
        found = f"a folder results/ that is not of an evaluation: {', '.join(sorted(others)[:3])}"
    else:
        return
    raise UsageError(f"--out {out}", found, "a new folder, or that of an earlier evaluation", "choose another")


def _write(report: Report, folder: Path) -> None:
    save_report(report, folder)
    write_page(report, folder)


def _find_space(folder: Path, teacher: LocatedModel | None) -> Callable[[Matrix], Matrix] | None:
    """Return what maps the teacher's vectors into a student's space, where it was made for this teacher's."""
    space = read_json(folder / SPACE) if (folder / SPACE).is_file() else {}
    if teacher is None or space.get("weights_sha256") != teacher.weights_sha256:
        return None
    return partial(project, projection=load_projection(folder))


def _same(vectors: Matrix) -> Matrix:
    return vectors


def _list_shared(results: Sequence[Mapping[tuple[str, str], Result]]) -> list[str]:
    """Return the tasks that all runs, whose results are by task and role, have with the same items."""
    return [
        task
        for (task, role), teacher in results[0].items()
        if role == TEACHER
        and not task.startswith(MISSPELT)
        and all(_same_items(teacher, found.get((task, TEACHER))) for found in results)
        and len({found[task, STUDENT].details.get("documents") for found in results}) == 1  # whose they search
    ]


def _same_items(teacher: Result, other: Result | None) -> bool:
    """Say whether two results are of one teacher on the same items, searched in the same kind of index."""
    return other is not None and _identify(other) == _identify(teacher)


def _identify(result: Result) -> tuple[str, str, str]:
    return result.task_sha256, result.model, result.details.get("index", {}).get("kind", "")


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names) - _ROLES) == len(names) else [str(folder.absolute()) for folder in folders]
