"""Tasks of the installed mteb, run by mteb's own evaluators, with their data from a folder where the Hub is not had.

A folder's data takes the place of what mteb would load, and everything after that is mteb's: samples, classifiers,
metrics, result files. What a folder has need not be what the Hub has, such as 4,927 of the 9,927 pairs of SICK-R, so
every result from a folder says so: its `dataset_revision` is no commit of the Hub but `local:` and a sha256 of the
files, or `local-other:` where mteb's statistics know another number of items. As many items need not be the same texts:
those of another copy may differ in their white space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedistill import hub
from embedistill.choices import Kind
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.loading import find_file, load_task
from embedistill.evaluation.scoring import Encoder
from embedistill.evaluation.tasks import ClassificationTask, ClusteringTask, PairTask, RetrievalTask, StsTask
from embedistill.files import fingerprint, sha256_file, write_text
from embedistill.progress import note

Vectors = npt.NDArray[np.float32]

SPLIT = "test"  # the one a folder has; of classification it has "train" too
_LOCAL, _OTHER = "local:", "local-other:"
_KINDS: dict[str | None, Kind] = {None: "plain", "query": "query", "document": "document"}
_BATCH = 1024  # texts a batch of mteb's loader; an encoder gets all of them at once
_DO = "name a folder that has its data"


class BenchmarkEncoder:
    """An `Encoder` as mteb wants one: queries and documents of retrieval by their kind, all other texts plain.

    Args:
        encode: The model; a text that comes more than once in one call of mteb is given to it once.
        mteb_model_meta: mteb's `ModelMeta`; mteb files results by its name and revision.
    """

    def __init__(self, encode: Encoder, mteb_model_meta: Any) -> None:
        self._encode = encode
        self.mteb_model_meta = mteb_model_meta

    def encode(self, inputs: Any, *, prompt_type: str | None = None, **_: Any) -> Vectors:
        """Return the unit vectors of the texts in a loader's batches, shape (n_texts, dim)."""
        texts = [text for batch in inputs for text in batch["text"]]
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return self._encode(list(rows), _KINDS[prompt_type])[[rows[text] for text in texts]]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Vectors:
        """Return the cosines of all of one with all of the other, shape (n_1, n_2)."""
        similarity: Vectors = np.asarray(embeddings1) @ np.asarray(embeddings2).T
        return similarity

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Vectors:
        """Return the cosine of each row with the same row of the other, shape (n,)."""
        similarity: Vectors = np.einsum("nd,nd->n", np.asarray(embeddings1), np.asarray(embeddings2))
        return similarity


def run_benchmark(
    names: Sequence[str],
    encode: Encoder,
    *,
    model_name: str,
    revision: str,
    embedding_size: int,
    results_dir: Path,
    folder: Path | None = None,
) -> dict[str, float]:
    """Run tasks of mteb and return their main scores, as mteb gives them (from 0 to 1; Spearman from -1).

    Result files are left in the layout of `mteb.ResultCache(results_dir)`. A task whose result is there, for this
    model, revision and data, is not run again. Constructing a task seeds `random`, numpy and torch: mteb does that.

    Args:
        names: Tasks by mteb's names.
        encode: The model.
        model_name: Its id or path; one without an organisation is filed as `local/NAME`.
        revision: What changes when the model does: a commit, or a sum of its weights and prompts.
        embedding_size: Dimension of its embeddings.
        results_dir: Where results are kept.
        folder: Where data lies, `sts/NAME.jsonl` and so on; a task that it has not is loaded from the Hub.

    Raises:
        UsageError: A name that mteb does not know; data that neither the folder nor the Hub has; a bad file.
        EmbedistillError: There is no folder and the Hub does not answer, or loading from it failed.
    """
    import mteb

    encoder = BenchmarkEncoder(encode, _describe_model(model_name, revision, embedding_size))
    cache = mteb.ResultCache(results_dir)
    for name in names:  # before hours of encoding
        _check_data(_get_task(name), folder, cache, encoder.mteb_model_meta)
    return {name: _score_task(_get_task(name), encoder, cache, folder) for name in names}


def list_benchmark_tasks(folder: Path) -> list[str]:
    """Return the names of the tasks of mteb that a folder has data for, whether as much as mteb's or not."""
    names = {name for layout in _LAYOUTS.values() for name in layout.name_tasks(folder)}
    return sorted(name for name in names if _is_known(name) and _find_files(_get_task(name), folder))


def write_submission(results_dir: Path, folder: Path, *, model_name: str, revision: str) -> list[Path]:
    """Write a model's results as `.eval_results/TASK.yaml`, the form that the Hub reads from a model's repository.

    The entries are mteb's, values from 0 to 100. Those of data from a folder name no revision of the data set, and say
    in their notes that it was a local copy; where that had another number of items than mteb's, none is written.

    Args:
        results_dir: As given to `run_benchmark`.
        folder: Of the model.
        model_name: As given to `run_benchmark`.
        revision: As given to `run_benchmark`.

    Returns:
        The files written.

    Raises:
        UsageError: There are no results of this model.
    """
    import mteb

    meta = _describe_model(model_name, revision, None)
    found = mteb.ResultCache(results_dir).load_results(models=[meta], include_remote=False).model_results
    results = sorted((result for model in found for result in model.task_results), key=lambda result: result.task_name)
    if not results:
        raise UsageError(str(results_dir), f"no results of {model_name} at {revision}", do="run the benchmark first")
    paths = []
    for result in results:
        if result.dataset_revision.startswith(_OTHER):
            note(f"Submission: {result.task_name} is left out, it was run on other data than mteb's")
            continue
        paths.append(folder / ".eval_results" / f"{result.task_name}.yaml")
        write_text(paths[-1], _to_submission(result))
    return paths


def _to_submission(result: Any) -> str:
    entries = result._to_hf_benchmark_result()  # mteb's own writer; what it has in public uploads at once
    if result.dataset_revision.startswith(_LOCAL):
        for entry in entries.root:
            entry.dataset.revision = None
            entry.notes = f"{entry.notes}, on a local copy of the data ({result.dataset_revision})"
    text: str = entries.to_yaml()
    return text


def _describe_model(name: str, revision: str, embedding_size: int | None) -> Any:
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    if not revision or "/" in revision:
        raise UsageError(f"revision of {name}", repr(revision), "a commit or a sum, fit for a folder's name")
    described = {
        "name": name if "/" in name else f"local/{name}",
        "revision": revision,
        "embed_dim": embedding_size,
        "similarity_fn_name": ScoringFunction.COSINE,
    }
    return ModelMeta.create_empty(overwrites=described)


def _get_task(name: str) -> Any:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise UsageError(f"task {name}", "not a task of mteb", do=str(error.args[0]).split(": ", 1)[-1]) from None


def _is_known(name: str) -> bool:
    try:
        return bool(_get_task(name))
    except UsageError:
        return False


def _check_data(task: Any, folder: Path | None, cache: Any, meta: Any) -> None:
    """Refuse a task that has neither a result nor data."""
    where = f"task {task.metadata.name}"
    if folder and not folder.is_dir():
        raise UsageError(str(folder), "no such folder", do="check the path")
    if _find_files(task, folder) or _is_done(task, cache.load_task_result(task.metadata.name, meta)):
        return
    if hub.reachable():
        return
    if folder is None:
        raise EmbedistillError(where, "the Hub does not answer", do=_DO)
    known = ", ".join(list_benchmark_tasks(folder)) or "none there"
    raise UsageError(where, f"not in {folder}, and the Hub does not answer", f"one of: {known}", _DO)


def _score_task(task: Any, encoder: BenchmarkEncoder, cache: Any, folder: Path | None) -> float:
    """Return a task's main score as its result file has it."""
    import mteb

    name, meta = task.metadata.name, encoder.mteb_model_meta
    if folder and (files := _find_files(task, folder)):
        _fill(task, folder, files)
    cached = cache.load_task_result(name, meta)
    if not _is_done(task, cached):
        # mteb takes a result of other data for one of these
        strategy = "only-missing" if _is_of_same_data(task, cached) else "always"
        quiet = {"batch_size": _BATCH, "show_progress_bar": False}
        options = {"cache": cache, "overwrite_strategy": strategy, "co2_tracker": False, "encode_kwargs": quiet}
        try:
            outcome = mteb.evaluate(encoder, task, show_progress_bar=False, **options)
        except OSError as error:
            if task.data_loaded:
                raise
            raise EmbedistillError(f"task {name}", str(error), do=f"check the network, or {_DO}") from error
        if outcome.exceptions:
            raise EmbedistillError(f"task {name}", outcome.exceptions[0].exception, do=_DO)
        cached = cache.load_task_result(name, meta)
    return float(cached.get_score())


def _is_of_same_data(task: Any, cached: Any) -> bool:
    return cached is not None and cached.dataset_revision == task.metadata.revision


def _is_done(task: Any, cached: Any) -> bool:
    return _is_of_same_data(task, cached) and not cached.get_missing_evaluations(task)


def _fill(task: Any, folder: Path, files: list[Path]) -> None:
    """Give a task the data of a folder as mteb's loader would leave it, and say whose data it is."""
    metadata = task.metadata
    task.dataset = _LAYOUTS[metadata.type].give(task, load_task(_find_set(task, folder)[0], folder))
    task.data_loaded = True
    counts, official = _count_items(task.dataset), metadata.descriptive_stats or {}
    theirs = {split: official.get(split, {}).get("num_samples", 0) for split in counts}
    revision = (_LOCAL if counts == theirs else _OTHER) + fingerprint([sha256_file(file) for file in files])[:16]
    task.metadata = metadata.model_copy(update={"dataset": {**metadata.dataset, "revision": revision}})
    verdict = "as many as mteb's" if counts == theirs else f"not mteb's {_say(theirs)}: compare with no other's figures"
    note(f"{metadata.name}: {_say(counts)} items from {files[0].parent}, {verdict}")


def _count_items(dataset: Any) -> dict[str, int]:
    """Count as mteb's statistics do."""
    if "default" in dataset:  # retrieval has a level more, and counts documents and queries
        return {split: len(data["corpus"]) + len(data["queries"]) for split, data in dataset["default"].items()}
    return {split: len(rows) for split, rows in dataset.items()}


def _say(counts: dict[str, int]) -> str:
    return " + ".join(f"{count:,}" for count in counts.values())


def _find_files(task: Any, folder: Path | None) -> list[Path]:
    """Return the files of a task's data in a folder: all that it needs, or none."""
    return _find_set(task, folder)[1]


def _find_set(task: Any, folder: Path | None) -> tuple[str, list[Path]]:
    """Return what the set of a task is called in a folder, and its files; none where one is missing."""
    layout = _LAYOUTS.get(task.metadata.type)
    if folder is None or layout is None or not _is_plain(task) or not layout.takes(task):
        return "", []
    name = task.metadata.name
    for stem in (name.removesuffix(suffix) for suffix in layout.suffixes if name.endswith(suffix)):
        files = [find_file(folder / file.format(stem)) for file in layout.files]
        if None not in files:
            return stem, [file for file in files if file]
    return "", []


def _is_plain(task: Any) -> bool:
    """Say whether one set of texts with a test part is all that a task needs."""
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    metadata = task.metadata
    if isinstance(task, AbsTaskAggregate) or metadata.is_multilingual:
        return False
    return list(metadata.modalities) == ["text"] and list(task.eval_splits) == [SPLIT]


def _give_sts(task: Any, own: StsTask) -> Any:
    first, second = task.column_names
    return _to_splits({SPLIT: {first: own.sentences1, second: own.sentences2, "score": own.scores}})


def _give_classification(task: Any, own: ClassificationTask) -> Any:
    numbers = {label: number for number, label in enumerate(sorted(set(own.fitted_labels)))}
    parts = {task.train_split: (own.fitted_texts, own.fitted_labels), SPLIT: (own.texts, own.labels)}
    text, label = task.input_column_name, task.label_column_name
    return _to_splits(
        {split: {text: texts, label: [numbers[one] for one in labels]} for split, (texts, labels) in parts.items()}
    )


def _give_clustering(task: Any, own: ClusteringTask) -> Any:
    return _to_splits({SPLIT: {task.input_column_name: own.texts, task.label_column_name: own.labels}})


def _give_pairs(task: Any, own: PairTask) -> Any:
    labels = [int(label) for label in own.labels]
    first, second, label = task.input1_column_name, task.input2_column_name, task.label_column_name
    return _to_splits({SPLIT: {first: own.sentences1, second: own.sentences2, label: labels}})


def _give_retrieval(_: Any, own: RetrievalTask) -> Any:
    import datasets

    documents = zip(own.document_ids, own.documents, strict=True)
    queries = zip(own.query_ids, own.queries, strict=True)
    split = {
        "corpus": datasets.Dataset.from_list([{"id": name, "title": "", "text": text} for name, text in documents]),
        "queries": datasets.Dataset.from_list([{"id": name, "text": text} for name, text in queries]),
        "relevant_docs": {
            query: {own.document_ids[number]: int(grade) for number, grade in judged.items()}
            for query, judged in zip(own.query_ids, own.relevance, strict=True)
        },
        "top_ranked": None,
    }
    return {"default": {SPLIT: split}}


def _to_splits(splits: dict[str, dict[str, Sequence[Any]]]) -> Any:
    import datasets

    lists = {split: {name: list(column) for name, column in columns.items()} for split, columns in splits.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split, columns in lists.items()})


def _is_of_single_texts(task: Any) -> bool:
    """Say whether a task trains on one part and is tested on the other, with one column of texts."""
    return isinstance(task.input_column_name, str) and not task.is_cross_validation


def _is_of_single_rows(task: Any) -> bool:
    """Say whether a task of clustering takes one text a row; the older ones take ready-made sets of them."""
    from mteb.abstasks.clustering import AbsTaskClustering

    return isinstance(task, AbsTaskClustering) and isinstance(task.input_column_name, str)


@dataclass(frozen=True)
class _Layout:
    """How the data of one type of task lies in a folder.

    Attributes:
        files: With {} for the name of the set; each may be .gz, and all are needed.
        give: From a task of mteb's and its data to what mteb's loader would leave in `task.dataset`.
        suffixes: What mteb's name may have after that of the set.
        takes: Which tasks of the type have their data in this form.
    """

    files: tuple[str, ...]
    give: Callable[[Any, Any], Any]
    suffixes: tuple[str, ...] = ("",)
    takes: Callable[[Any], bool] = lambda _: True

    def name_tasks(self, folder: Path) -> Iterator[str]:
        """Yield what mteb's tasks of the sets in a folder would be called."""
        before, after = self.files[0].split("{}")
        for path in [*folder.glob(f"{before}*{after}"), *folder.glob(f"{before}*{after}.gz")]:
            stem = path.relative_to(folder).as_posix().removeprefix(before).removesuffix(".gz").removesuffix(after)
            yield from (stem + suffix for suffix in self.suffixes)


_LAYOUTS = {
    "STS": _Layout(("sts/{}.jsonl",), _give_sts),
    "Retrieval": _Layout(
        ("retrieval/{}/corpus.jsonl", "retrieval/{}/queries.jsonl", "retrieval/{}/qrels/test.tsv"), _give_retrieval
    ),
    "Classification": _Layout(
        ("classification/{}.train.jsonl", "classification/{}.test.jsonl"),
        _give_classification,
        ("", "Classification"),
        _is_of_single_texts,
    ),
    "Clustering": _Layout(
        ("clustering/{}.jsonl",), _give_clustering, ("", ".v2", "Clustering", "Clustering.v2"), _is_of_single_rows
    ),
    "PairClassification": _Layout(("pairs/{}.jsonl",), _give_pairs, ("", "PC")),
}
