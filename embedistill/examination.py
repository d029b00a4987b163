"""The tasks of a run: what teacher and student are compared on, and what a student in training is watched on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import cast

from sentence_transformers import SentenceTransformer

from embedistill.corpus.records import Record, choose_kind
from embedistill.errors import UsageError
from embedistill.evaluation.loading import check_folder, check_names, load_task, load_tasks, save_sts
from embedistill.evaluation.scoring import score_model
from embedistill.evaluation.tasks import AgreementTask, StsTask, Task, list_texts, make_known_item_task
from embedistill.files import fingerprint, is_jsonl
from embedistill.recipe import AGREEMENT, KNOWN_ITEM, Recipe
from embedistill.stages import Stages
from embedistill.teacher import encode

_OWN = (AGREEMENT, KNOWN_ITEM)  # tasks that are made of the corpus


def check_sets(recipe: Recipe) -> None:
    """Make sure that the sets that a recipe names can be read, as far as they are in a folder or in a file.

    Raises:
        UsageError: There is no such set, or something is wrong in it.
    """
    section, data = recipe.evaluation, _open_data(recipe)
    here = [name for name in section.tasks if name not in _OWN and (data or is_jsonl(name))]
    load_tasks(here, data, skip_missing=section.missing == "skip")
    dev_task = recipe.training.dev_task
    if dev_task and (data or is_jsonl(dev_task)):
        _load_watched(dev_task, data)


class Examination:
    """The tasks that a recipe names.

    Args:
        recipe: The recipe.
        folder: Of its run, where sets of the Hub are kept.
        stages: Of its run, which keep what was found.

    Raises:
        UsageError: The folder of the sets is not there.
    """

    def __init__(self, recipe: Recipe, folder: Path, stages: Stages) -> None:
        self._section, self._dev_task = recipe.evaluation, recipe.training.dev_task
        self._folder, self._stages = folder, stages
        self.data = _open_data(recipe)

    def check(self) -> None:
        """Make sure that the sets can be had, those of the Hub too, and that a student can be watched on its own.

        Raises:
            UsageError: There is no such set, or something is wrong in it.
            EmbedistillError: The Hub does not answer.
        """
        _ = self.names, self.watched

    @cached_property
    def names(self) -> list[str]:
        """The named tasks whose data could be had when the run was first made."""
        section = self._section
        asked = fingerprint([section.tasks, section.data, section.missing])[:12]
        names: list[str] = self._stages.choose(f"tasks {asked}", self._find, until="corpus")
        return names

    @cached_property
    def texts(self) -> set[str]:
        """All texts of the named tasks and of the one that is watched, which no corpus may have."""
        tasks = [*self._tasks, *self.watched]
        return {text for task in tasks for some in list_texts(task).values() for text in some}

    @cached_property
    def watched(self) -> list[Task]:
        """The task that a student in training is scored on, if there is one."""
        return [_load_watched(self._dev_task, self.data)] if self._dev_task else []

    def score(self, student: SentenceTransformer) -> float:
        """Return a student's first metric on the task that is watched."""
        (result,) = score_model(self.watched, partial(encode, student), role="student", model="")
        return next(iter(result.metrics.values()))

    def list_tasks(self, held_out: Sequence[Record]) -> dict[str, Task]:
        """Return the tasks by what the recipe calls them, in its order, those made of held-out records among them.

        Raises:
            UsageError: One cannot be made of the records and has to be, or none is left.
        """
        named: dict[str, Task | None] = dict(zip(self.names, self._tasks, strict=True))
        compared, kind = choose_kind(held_out)
        sources = {"source": [record.source for record in compared]}
        columns = sources if len(set(sources["source"])) > 1 else {}
        named[AGREEMENT] = AgreementTask(AGREEMENT, [record.document for record in compared], columns, kind)
        pairs = [(record.query, record.document) for record in held_out if record.query]
        documents = [record.document for record in held_out if record.kind == "document"]
        named[KNOWN_ITEM] = make_known_item_task(KNOWN_ITEM, pairs, documents)
        wanted = {name: named.get(name) for name in self._section.tasks}
        found = {name: task for name, task in wanted.items() if task is not None}
        lost = [name for name in wanted if name not in found]
        if not found or (lost and self._section.missing == "error"):
            do = f"{KNOWN_ITEM} needs held-out records with a query: set corpus.query_column, or take it off the list"
            raise UsageError("evaluation.tasks", f"{', '.join(lost)} cannot be had", "data for each of them", do)
        check_names(task.name for task in found.values())  # a file may be called as a task of our own
        return found

    @cached_property
    def _tasks(self) -> list[Task]:
        return load_tasks(self.names, self.data or self._folder / "data", skip_missing=False)

    def _find(self) -> list[str]:
        """Return the named tasks that can be had; those of the Hub are kept with the run, to go on without it."""
        section = self._section
        names, found_names = [], []
        for name in section.tasks:
            found = load_tasks([name], self.data, skip_missing=section.missing == "skip") if name not in _OWN else []
            if found and self.data is None and not is_jsonl(name):
                save_sts(cast(StsTask, found[0]), self._folder / "data")
            names += [name] * len(found)
            found_names += [task.name for task in found]
        check_names(found_names)
        return names


def _open_data(recipe: Recipe) -> Path | None:
    data = Path(recipe.evaluation.data) if recipe.evaluation.data else None
    if data:
        check_folder(data)
    return data


def _load_watched(name: str, data: Path | None) -> Task:
    try:
        task = load_task(name, data)
    except UsageError as error:
        of_hub = "of those of the Hub there are test sets alone; another: --data DIR"
        do = error.do if data or is_jsonl(name) else of_hub
        raise UsageError(f"training.dev_task: {name}", error.found, error.expected, do) from None
    if isinstance(task, AgreementTask):
        expected = "pairs with a score or a label, or queries with documents"
        raise UsageError(f"training.dev_task: {name}", "texts alone", expected, "leave it out: these are watched")
    return task
