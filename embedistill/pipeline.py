"""The straight line: corpus -> teacher -> cache -> student -> training -> evaluation -> report -> search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from embedistill import ranks
from embedistill.architectures import ARCHITECTURES, read_config, read_sizes
from embedistill.choices import Dtype, Kind
from embedistill.construction import Construction
from embedistill.corpus.filtering import make_filter
from embedistill.corpus.preparation import prepare
from embedistill.corpus.reading import describe_source
from embedistill.corpus.records import save_corpus
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.hardware import choose_dtype, find_device, find_training_device
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import UsageError
from embedistill.evaluation.costs import ModelFacts
from embedistill.evaluation.loading import describe_tasks
from embedistill.evaluation.scoring import TEACHER, load_results, save_results
from embedistill.evaluation.tasks import Task
from embedistill.evaluation.trial import (
    STUDENT,
    UNTRAINED,
    Candidate,
    choose_texts,
    find_contamination,
    make_candidate,
    make_floors,
    measure_candidates,
    score_all,
)
from embedistill.examination import Examination
from embedistill.files import folder_bytes, read_json, remove, write_json
from embedistill.judgement import choose_measures, judge
from embedistill.material import CORPUS, TARGETS, Material
from embedistill.precomputation import encode_missing
from embedistill.progress import note
from embedistill.recipe import AFTERWARDS, LIVE, AssistantSection, Recipe, dump_recipe
from embedistill.report.document import REPORT, Report, load_report, save_report
from embedistill.report.rendering import PAGE, write_page
from embedistill.search import INDEX, build_index
from embedistill.sources import check_corpus, read_records
from embedistill.stages import Stage, Stages, check_space, hold_folder, list_versions
from embedistill.student.head import Matrix, project
from embedistill.student.saving import SPACE, load_projection
from embedistill.teacher import LocatedModel, default_cache_dir, embed_cheaply, load, locate
from embedistill.teaching import (
    check_training,
    list_inputs,
    list_lessons,
    make_batching,
    make_loss,
    make_schedule,
)
from embedistill.training.loop import train
from embedistill.training.readings import Dev

ASSISTANT, TRAINED_ASSISTANT = "assistant-untrained", "assistant"
CHECKPOINTS = "checkpoints"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_DISPOSABLE = ("corpus", "encode")  # what the teacher encoded is in the cache, whatever becomes of the run
_WATCHED, _FEWEST_WATCHED = 128, 8  # training texts of a kind; texts in all
_MODEL_COPIES = 4  # a student of half its teacher's size twice, and two checkpoints with their optimiser states


@dataclass(frozen=True)
class Run:
    """A run: its folder, its student once it is trained, and its report once it is evaluated."""

    folder: Path

    @cached_property
    def report(self) -> Report:
        """How much was kept, and what it cost."""
        return load_report(self.folder)

    @cached_property
    def student(self) -> SentenceTransformer:
        """The student, a plain SentenceTransformer."""
        if not (self.folder / "model").is_dir():
            do = "embedistill run RECIPE goes on to it"
            raise UsageError(str(self.folder), "no student yet", "a run whose training is done", do)
        return SentenceTransformer(str(self.folder / "model"), local_files_only=True)


def distill(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    until: Stage | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Distil a teacher as a recipe says; a run that was stopped goes on where it was.

    Args:
        recipe: From `load_recipe`.
        run_dir: Folder of the run; default: runs/<name>.
        cache_dir: Folder for models and teacher embeddings, shared by runs; default: `default_cache_dir()`.
        until: Last stage to run: corpus, encode, student (an assistant's training among it) or training; the same call
            without it goes on from there. Default: all there are.
        callbacks: Of transformers' trainer, beside our own, in every training of the run.

    Raises:
        EmbedistillError: Something is wrong with the recipe's data, teacher or folder; it says what to do.
    """
    if until not in {None, *get_args(Stage)}:
        raise UsageError("until", repr(until), "corpus, encode, student or training", "leave it out for a whole run")
    folder = Path(run_dir or Path("runs") / recipe.name)
    cache = Path(cache_dir or default_cache_dir())
    if ranks.rank() > 0:
        for message in ranks.follow():
            _Line(recipe, folder, cache, callbacks).teach(**message)
        return Run(folder)
    with hold_folder(folder, dump_recipe(recipe), _DISPOSABLE, AFTERWARDS):
        line = _Line(recipe, folder, cache, callbacks)
        for stage in line.go():
            if stage == until:
                break
        ranks.announce(line.announced)
    return Run(folder)


class _Line:
    """The stages of one run. What a stage needs of an earlier one is read from disk when it is first asked for."""

    def __init__(
        self, recipe: Recipe, folder: Path, cache_dir: Path, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self.recipe, self.folder, self.cache_dir, self.callbacks = recipe, folder, cache_dir, callbacks
        self.stages = Stages(folder, recipe.seed)
        self.examination = Examination(recipe, folder, self.stages)
        self.announced = 0
        check_corpus(recipe.corpus)
        self.examination.check()
        if recipe.teacher.api:
            found = "a teacher behind an endpoint, whose weights a student cannot be cut out of"
            do = "its embeddings can be had: embedistill encode"
            raise UsageError("teacher.api", found, "teacher.model: a folder or a model id", do)
        teacher = recipe.teacher
        self.located = self._locate(teacher.model, teacher.revision, teacher.prompts)
        self.start = None if recipe.student.origin in {"teacher", "static"} else self._locate(recipe.student.origin)
        self.construction = Construction(recipe, self.stages, self.located, self.start)
        self.baselines = {name: self._locate(name) for name in recipe.evaluation.baselines}
        dtype = self._choose_dtype("teacher", recipe.teacher.dtype)
        self.teacher = CachedTeacher(
            LocalEncoder(self.located, dtype), cache_dir / "embeddings", recipe.encoding.storage
        )
        drop, n_watched = recipe.encoding.drop, recipe.training.dev_size
        self.material = Material(folder, self.teacher, drop=drop, n_watched=n_watched, seed=recipe.seed)

    def _locate(
        self, name: str, revision: str | None = None, prompts: Mapping[Kind, str] | None = None
    ) -> LocatedModel:
        return locate(name, revision, models_dir=self.cache_dir / "models", prompts=prompts)

    def _choose_dtype(self, role: str, wanted: Dtype) -> torch.dtype:
        device = find_device() if role == "teacher" else find_training_device()
        name = self.stages.choose(f"{role}_dtype", lambda: str(choose_dtype(wanted, device)).removeprefix("torch."))
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def go(self) -> Iterator[Stage]:
        """Run the stages that are not done, and yield the names of those that a run may end with, when they are."""
        recipe, run = self.recipe, self.stages.run
        corpus = run("corpus", self.read, [describe_source(recipe.corpus.sources)], [CORPUS])
        yield "corpus"
        teacher = [self.located.weights_sha256, self.located.settings_sha256]
        encoded = run("encode", self.encode, [corpus, *teacher], [TARGETS])
        yield "encode"
        if recipe.student.via:
            begun = run("assistant", self.build_assistant, [encoded], [ASSISTANT])
            encoded = run("assistant training", self.train_assistant, [begun], [TRAINED_ASSISTANT])
            remove(self.folder / CHECKPOINTS)
        started = [self.start.weights_sha256, self.start.settings_sha256] if self.start else []
        built = run("student", self.build, [encoded, *started], ["untrained"])
        yield "student"
        trained = run("training", self.train, [built], ["model", "training_log.jsonl"])
        remove(self.folder / CHECKPOINTS)  # when it is on record that they are not needed: a kill may come before
        yield "training"
        compared: list[Any] = [found.weights_sha256 for found in self.baselines.values()]
        asked = recipe.evaluation.model_dump()
        judged = [asked.pop(name) for name in ("margin", "segment_margin", "resamples")]
        compared += [asked, describe_tasks(self.examination.names, self.examination.data)]
        scored = run("evaluation", self.evaluate, [trained, *compared], ["results"])
        run("report", self.report, [scored, judged], [REPORT, PAGE])
        if recipe.search:
            run("index", self.index, [trained], [INDEX])

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks by what the recipe calls them."""
        return self.examination.list_tasks(self.material.corpus["holdout"])

    def read(self) -> dict[str, Any]:
        section = self.recipe.corpus
        splits, funnel = prepare(
            read_records(section),
            find_rule=make_filter(section.min_characters, damaged=section.drop_damaged, language=section.language),
            size=section.select.size,
            by=section.select.by,
            embed=partial(embed_cheaply, load(self.located)) if section.select.by == "diversity" else None,
            near_duplicates=section.near_duplicates == "keep",
            holdout=section.holdout,
            seed=self.recipe.seed,
            evaluation_texts=self.examination.texts,
        )
        note(f"Corpus: {funnel}")
        save_corpus(self.folder / CORPUS, splits)
        return {"funnel": funnel.counts, "examples": funnel.examples}

    def encode(self) -> dict[str, Any]:
        corpus, texts, plan = self.material.corpus, self.material.encoded, self.construction.plan
        self.examination.list_tasks(corpus["holdout"])  # says what cannot be had, before anything is encoded
        cache, size = self.teacher.cache(next(iter(texts))), self.recipe.student.embedding_size
        if size and size > cache.dim:
            raise UsageError(
                "student.embedding_size", str(size), f"at most the {cache.dim} of the teacher's embeddings"
            )
        prefixes = self.recipe.training.matryoshka
        if max(prefixes, default=0) > (size or cache.dim):
            found, expected = str(max(prefixes)), f"at most the {size or cache.dim} dimensions of the student"
            raise UsageError("training.matryoshka", found, expected)
        config = read_config(self.located.path) if plan else {}
        sizes = [plan.sizes, read_sizes(config)] if plan else []
        widths, layers = [one.hidden_size for one in sizes], [one.layers for one in sizes]
        architectures = [ARCHITECTURES[config["model_type"]]] if plan else []
        check_training(self.recipe.training, corpus["train"], widths, layers, architectures)
        n_missing = sum(len(self.teacher.cache(kind).missing(some)) for kind, some in texts.items())
        check_space(self.folder, _MODEL_COPIES * folder_bytes(self.located.path))
        check_space(self.cache_dir, _BYTES[cache.storage] * cache.dim * n_missing)
        encoded = sum(encode_missing(self.recipe, self.teacher, some, kind) for kind, some in texts.items())
        checked = self.material.check_targets()
        write_json(self.folder / TARGETS, checked)
        return {
            "teacher": {**asdict(self.located), "path": str(self.located.path)},
            "cache_keys": {kind: self.teacher.cache(kind).key for kind in texts},
            "texts": sum(len(some) for some in texts.values()),
            "encoded": encoded,
            "faults": {fault: count for fault, count in checked["counts"].items() if count},
        }

    def build_assistant(self) -> dict[str, Any]:
        plan = self.construction.assistant_plan
        return self.construction.build(load(self.located), plan, self.material, self.folder / ASSISTANT)

    def train_assistant(self) -> None:
        via = cast(AssistantSection, self.recipe.student.via)
        self._train(ASSISTANT, TRAINED_ASSISTANT, via.share)

    def build(self) -> dict[str, Any]:
        source = self._load(TRAINED_ASSISTANT) if self.recipe.student.via else load(self.located)
        self.construction.forecast()
        self._choose_dtype("student", self.recipe.training.dtype)
        return self.construction.build(source, self.construction.plan, self.material, self.folder / "untrained")

    def train(self) -> None:
        via = self.recipe.student.via
        self._train("untrained", "model", 1 - via.share if via else 1.0)
        for made in ("results", REPORT, PAGE, INDEX):  # of a student that was here before
            remove(self.folder / made)

    def _train(self, name: str, trained: str, share: float) -> None:
        """Train a model on the cache for a share of the time, and save it under another name."""
        for kind, texts in self.material.trained.items():
            encode_missing(self.recipe, self.teacher, texts, kind)  # nothing, unless the cache was pruned
        log = "training_log" if trained == "model" else f"{trained}_log"
        dtype = str(self._choose_dtype("student", self.recipe.training.dtype)).removeprefix("torch.")
        task: dict[str, Any] = {"name": name, "share": share, "work": self.stages.current[:12], "log": log}
        task["dtype"] = dtype  # measured once, for all processes
        ranks.announce(self.announced, **task)
        self.announced += 1
        student = self.teach(**task)
        layers = read_json(self.folder / name / SPACE)["layers"]
        self.construction.save(student, self.folder / trained, load_projection(self.folder / name), layers)

    def teach(self, name: str, share: float, work: str, log: str, dtype: str) -> SentenceTransformer:
        """Train a model in all phases of the recipe; the processes of torchrun do this together."""
        student, described = self._load(name), read_json(self.folder / name / SPACE)
        projection = load_projection(self.folder / name)
        for number, (on, part, section) in enumerate(self.recipe.training.phases):
            targets = self.teacher.open_targets(self.material.trained)
            lessons = list_lessons(
                student, self.material.corpus["train"], self.material.trained, targets, projection=projection, on=on
            )
            live = load(self.located) if LIVE & set(section.objectives.used) else None
            train(
                student,
                lessons.inputs,
                lessons.targets,
                loss=make_loss(section, student, live, described["layers"]),
                batching=make_batching(section, student, lessons, self.recipe.seed),
                schedule=make_schedule(section, share * part, self.recipe.seed, getattr(torch, dtype)),
                work_dir=self.folder / CHECKPOINTS / work / str(number),
                log_path=self.folder / (f"{log}.jsonl" if number == 0 else f"{log}-{number}.jsonl"),
                dev=self._open_dev(student, projection),
                partners=lessons.partners[:, 0],
                kin=lessons.kin,
                is_first=number == 0,
                callbacks=self.callbacks,
            )
        return student

    def _open_dev(self, student: SentenceTransformer, projection: Matrix | None) -> Dev | None:
        """Return what a student in training is watched on: texts that are kept out, else some that it is trained on."""
        watched = self.material.watched
        kept_out = any(watched.values())
        if not kept_out:
            watched = {kind: texts[:_WATCHED] for kind, texts in self.material.trained.items()}
        if sum(map(len, watched.values())) < _FEWEST_WATCHED:
            return None
        vectors = [self.teacher.vectors(texts, kind) for kind, texts in watched.items() if texts]
        targets = project(np.concatenate(vectors), projection)
        score = self.examination.score if self.examination.watched else None
        return Dev(list_inputs(student, watched), targets, score, kept_out)

    def evaluate(self) -> dict[str, Any]:
        named, section = self.tasks, self.recipe.evaluation
        tasks = list(named.values())
        candidates = self._list_candidates()
        results = score_all(
            tasks,
            candidates,
            teacher=self.teacher.vectors,
            index=section.index,
            misspelt=section.misspelt,
            documents=section.documents,
            seed=self.recipe.seed,
            versions=list_versions(),
        )
        save_results(results, self.folder / "results")
        models = {one.role: one.model for one in candidates if one.model}
        trained = (text for some in self.material.encoded.values() for text in some)
        texts = choose_texts(tasks, section.documents)
        return {
            "models": [asdict(facts) for facts in measure_candidates(candidates, texts)],
            "order": [[result.task, result.role] for result in results],
            "skipped": sorted(set(section.tasks) - set(named)),
            "planned": self.construction.compare_forecast(models),
            "contamination": find_contamination(tasks, trained),
        }

    def _list_candidates(self) -> list[Candidate]:
        """Return the teacher, the student and what it is compared with: floors below it, and the baselines."""
        teacher, name = load(self.located), self.located.name
        space = partial(project, projection=load_projection(self.folder / "model"))
        candidates = [Candidate(TEACHER, name, self.teacher.vectors, lambda same: same, teacher, self.located.path)]
        for role, part in ((STUDENT, "model"), (UNTRAINED, "untrained")):
            candidates.append(make_candidate(role, self._locate(str(self.folder / part)), space))
        candidates += make_floors(self.folder / "model", teacher, self.teacher.vectors, self.material.sample)
        return candidates + [make_candidate(name, located) for name, located in self.baselines.items()]

    def report(self) -> None:
        section, facts = self.recipe.evaluation, self.stages.facts("evaluation")
        tasks = list(self.tasks.values())
        results = load_results(self.folder / "results")
        results.sort(key=lambda result: facts["order"].index([result.task, result.role]))
        trained = [text for texts in self.material.encoded.values() for text in texts]
        faults = self.stages.facts("encode")["faults"]
        report = judge(
            self.recipe.name,
            tasks,
            results,
            measures=choose_measures(self._load("model"), load(self.located), trained),
            margin=section.margin,
            segment_margin=section.segment_margin,
            resamples=section.resamples,
            seed=self.recipe.seed,
            models=[ModelFacts(**model) for model in facts["models"]],
            corpus=self.stages.facts("corpus")["funnel"] | {f"vectors {name}": count for name, count in faults.items()},
            examples=self.stages.facts("corpus")["examples"]
            | {f"vectors {name}": texts for name, texts in read_json(self.folder / TARGETS)["examples"].items()},
            seconds=self.stages.seconds,
            skipped=facts["skipped"],
            planned=facts["planned"],
            contamination=facts["contamination"],
        )
        save_report(report, self.folder)
        write_page(report, self.folder)

    def index(self) -> None:
        records = [record for split in self.material.corpus.values() for record in split]
        texts, sources = [record.text for record in records], [record.source for record in records]
        model = self._load("model", self._choose_dtype("student", self.recipe.training.dtype))
        build_index(model, self.folder / "model", texts, sources, self.folder / INDEX)

    def _load(self, name: str, dtype: torch.dtype = torch.float32) -> SentenceTransformer:
        return SentenceTransformer(str(self.folder / name), model_kwargs={"dtype": dtype}, local_files_only=True)
