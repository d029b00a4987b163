"""The straight line: corpus -> teacher -> cache -> student -> training -> evaluation -> report -> search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from embedistill import ranks
from embedistill.architectures import Sizes, read_config, read_sizes, with_sizes
from embedistill.corpus.filtering import make_filter
from embedistill.corpus.preparation import prepare
from embedistill.corpus.reading import describe_source
from embedistill.corpus.records import Record, Split, load_corpus, save_corpus
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.hardware import choose_dtype, find_device, find_training_device
from embedistill.encoding.local import LocalEncoder
from embedistill.encoding.targets import find_faults
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
from embedistill.files import folder_bytes, read_json, remove, write_json, written_aside
from embedistill.forecast import Forecast, compare_forecast, forecast
from embedistill.judgement import choose_measures, judge
from embedistill.outlook import check_pieces, plan_section, plan_student
from embedistill.precomputation import encode_missing, read_records
from embedistill.progress import note
from embedistill.recipe import AFTERWARDS, LIVE, AssistantSection, Dtype, Recipe, dump_recipe
from embedistill.report.document import REPORT, Report, load_report, save_report
from embedistill.report.rendering import write_page
from embedistill.search import INDEX, build_index
from embedistill.stages import Stage, Stages, check_space, hold_folder, list_versions
from embedistill.student.building import add_head, build_student, list_body
from embedistill.student.head import Matrix, fit_pca, project
from embedistill.student.planning import TransformerPlan
from embedistill.student.saving import load_projection, save_student
from embedistill.student.static import build_static
from embedistill.teacher import (
    Kind,
    LocatedModel,
    default_cache_dir,
    embed_cheaply,
    find_prompt,
    load,
    locate,
)
from embedistill.teaching import (
    check_training,
    list_inputs,
    list_lessons,
    make_batching,
    make_loss,
    make_schedule,
    texts_by_kind,
)
from embedistill.training.loop import train
from embedistill.training.readings import Dev

_FIT_TEXTS = 5_000
_SAMPLE_TEXTS = 20_000
TARGETS = "targets.json"
ASSISTANT, TRAINED_ASSISTANT = "assistant-untrained", "assistant"
_EXAMPLES = 10
_DEV_SHARE, _FEWEST_DEV = 20, 8
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_DISPOSABLE = ("corpus", "encode")  # what the teacher encoded is in the cache, whatever becomes of the run
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
        return SentenceTransformer(str(self.folder / "model"), local_files_only=True)


def distill(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    until: Stage | None = None,
) -> Run:
    """Distil a teacher as a recipe says; a run that was stopped goes on where it was.

    Args:
        recipe: From `load_recipe`.
        run_dir: Folder of the run; default: runs/<name>.
        cache_dir: Folder for models and teacher embeddings, shared by runs; default: `default_cache_dir()`.
        until: Last stage to run; the same call without it goes on from there. Default: all of them.

    Raises:
        EmbedistillError: Something is wrong with the recipe's data, teacher or folder; it says what to do.
    """
    folder = Path(run_dir or Path("runs") / recipe.name)
    cache = Path(cache_dir or default_cache_dir())
    if ranks.rank() > 0:
        for message in ranks.follow():
            _Line(recipe, folder, cache).teach(**message)
        return Run(folder)
    with hold_folder(folder, dump_recipe(recipe), _DISPOSABLE, AFTERWARDS):
        line = _Line(recipe, folder, cache)
        for stage in line.go():
            if stage == until:
                break
        ranks.announce(line.announced)
    return Run(folder)


class _Line:
    """The stages of one run. What a stage needs of an earlier one is read from disk when it is first asked for."""

    def __init__(self, recipe: Recipe, folder: Path, cache_dir: Path) -> None:
        self.recipe, self.folder, self.cache_dir = recipe, folder, cache_dir
        self.stages = Stages(folder, recipe.seed)
        self.examination = Examination(recipe, folder, self.stages)
        self.announced = 0
        if recipe.teacher.api:
            found = "a teacher behind an endpoint, whose weights a student cannot be cut out of"
            do = "its embeddings can be had: embedistill encode"
            raise UsageError("teacher.api", found, "teacher.model: a folder or a model id", do)
        teacher = recipe.teacher
        self.located = self._locate(teacher.model, teacher.revision, teacher.prompts)
        self.assistant_plan, self.plan = self._plan()
        self.start = None if recipe.student.origin in {"teacher", "static"} else self._locate(recipe.student.origin)
        self.baselines = {name: self._locate(name) for name in recipe.evaluation.baselines}
        dtype = self._choose_dtype("teacher", recipe.teacher.dtype)
        self.teacher = CachedTeacher(
            LocalEncoder(self.located, dtype), cache_dir / "embeddings", recipe.encoding.storage
        )

    def _locate(
        self, name: str, revision: str | None = None, prompts: Mapping[Kind, str] | None = None
    ) -> LocatedModel:
        return locate(name, revision, models_dir=self.cache_dir / "models", prompts=prompts)

    def _plan(self) -> tuple[TransformerPlan | None, TransformerPlan | None]:
        """Check the sizes of the assistant and the student against what they are made of."""
        section = self.recipe.student
        if section.origin not in {"teacher", "static"}:
            return None, None
        config = read_config(self.located.path)
        check_pieces(section, AutoTokenizer.from_pretrained(self.located.path, local_files_only=True))
        if section.origin == "static":
            return None, None
        if section.budgets:
            name = f"sizes {self.located.weights_sha256[:12]}"
            sizes = Sizes(**self.stages.choose(name, lambda: self._choose_sizes(config)))
            note(f"Student: {sizes.layers} x {sizes.hidden_size}, {sizes.vocabulary_size:,} pieces")
            return None, TransformerPlan(sizes)
        assistant = plan_section(config, section.via, "student.via") if section.via else None
        config = with_sizes(config, assistant.sizes) if assistant else config
        return assistant, plan_section(config, section, "student")

    def _choose_sizes(self, config: dict[str, Any]) -> dict[str, int]:
        return asdict(plan_student(self.recipe.student, config, load(self.located)).sizes)

    def _choose_dtype(self, role: str, wanted: Dtype) -> torch.dtype:
        device = find_device() if role == "teacher" else find_training_device()
        name = self.stages.choose(f"{role}_dtype", lambda: str(choose_dtype(wanted, device)).removeprefix("torch."))
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def go(self) -> Iterator[Stage]:
        """Run the stages that are not done, and yield the names of those that a run may end with, when they are."""
        recipe, run = self.recipe, self.stages.run
        corpus = run("corpus", self.read, [describe_source(recipe.corpus.sources)], ["corpus.parquet"])
        yield "corpus"
        teacher = [self.located.weights_sha256, self.located.settings_sha256]
        encoded = run("encode", self.encode, [corpus, *teacher], [TARGETS])
        yield "encode"
        if recipe.student.via:
            begun = run("assistant", self.build_assistant, [encoded], [ASSISTANT])
            encoded = run("assistant training", self.train_assistant, [begun], [TRAINED_ASSISTANT])
        started = [self.start.weights_sha256, self.start.settings_sha256] if self.start else []
        built = run("student", self.build, [encoded, *started], ["untrained"])
        yield "student"
        trained = run("training", self.train, [built], ["model", "training_log.jsonl"])
        yield "training"
        compared: list[Any] = [found.weights_sha256 for found in self.baselines.values()]
        asked = recipe.evaluation.model_dump()
        judged = [asked.pop(name) for name in ("margin", "segment_margin", "resamples")]
        compared += [asked, describe_tasks(self.examination.names, self.examination.data)]
        scored = run("evaluation", self.evaluate, [trained, *compared], ["results"])
        run("report", self.report, [scored, judged], [REPORT, "report.html"])
        if recipe.search:
            run("index", self.index, [trained], [INDEX])

    @cached_property
    def corpus(self) -> dict[Split, list[Record]]:
        return load_corpus(self.folder / "corpus.parquet")

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks by what the recipe calls them."""
        return self.examination.list_tasks(self.corpus["holdout"])

    @cached_property
    def encoded_texts(self) -> dict[Kind, list[str]]:
        """The distinct texts that the teacher encodes for training, by kind."""
        return texts_by_kind(self.corpus["train"])

    @cached_property
    def _usable_texts(self) -> tuple[dict[Kind, list[str]], dict[Kind, list[str]]]:
        """Those of them whose vectors can be trained on: to train on, and to watch the student on."""
        dropped = {kind: set(numbers) for kind, numbers in read_json(self.folder / TARGETS)["dropped"].items()}
        usable = [
            (kind, text)
            for kind, texts in self.encoded_texts.items()
            for number, text in enumerate(texts)
            if number not in dropped[kind]
        ]
        n_dev = min(self.recipe.training.dev_size, len(usable) // _DEV_SHARE)
        n_dev = n_dev if n_dev >= _FEWEST_DEV else 0
        dev = set(np.random.default_rng(self.recipe.seed).permutation(len(usable))[:n_dev].tolist())
        trained: dict[Kind, list[str]] = {kind: [] for kind in self.encoded_texts}
        watched: dict[Kind, list[str]] = {kind: [] for kind in self.encoded_texts}
        for number, (kind, text) in enumerate(usable):
            (watched if number in dev else trained)[kind].append(text)
        return trained, watched

    @property
    def training_texts(self) -> dict[Kind, list[str]]:
        return self._usable_texts[0]

    @property
    def dev_texts(self) -> dict[Kind, list[str]]:
        return self._usable_texts[1]

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
        save_corpus(self.folder / "corpus.parquet", splits)
        return {"funnel": funnel.counts, "examples": funnel.examples}

    def encode(self) -> dict[str, Any]:
        self.examination.list_tasks(self.corpus["holdout"])  # says what cannot be had, before anything is encoded
        cache, size = self.teacher.cache("document"), self.recipe.student.embedding_size
        if size and size > cache.dim:
            raise UsageError(
                "student.embedding_size", str(size), f"at most the {cache.dim} of the teacher's embeddings"
            )
        prefixes = self.recipe.training.matryoshka
        if max(prefixes, default=0) > (size or cache.dim):
            found, expected = str(max(prefixes)), f"at most the {size or cache.dim} dimensions of the student"
            raise UsageError("training.matryoshka", found, expected)
        sizes = [self.plan.sizes, read_sizes(read_config(self.located.path))] if self.plan else []
        widths, layers = [one.hidden_size for one in sizes], [one.layers for one in sizes]
        check_training(self.recipe.training, self.corpus["train"], widths, layers)
        n_texts = sum(len(texts) for texts in self.encoded_texts.values())
        n_missing = sum(len(self.teacher.cache(kind).missing(texts)) for kind, texts in self.encoded_texts.items())
        check_space(self.folder, _MODEL_COPIES * folder_bytes(self.located.path))
        check_space(self.cache_dir, _BYTES[cache.storage] * cache.dim * n_missing)
        encoded = sum(
            encode_missing(self.recipe, self.teacher, texts, kind) for kind, texts in self.encoded_texts.items()
        )
        checked = self._check_targets()
        write_json(self.folder / TARGETS, checked)
        return {
            "teacher": {**asdict(self.located), "path": str(self.located.path)},
            "cache_keys": {kind: self.teacher.cache(kind).key for kind in self.encoded_texts},
            "texts": n_texts,
            "encoded": encoded,
            "faults": {fault: count for fault, count in checked["counts"].items() if count},
        }

    def _check_targets(self) -> dict[str, Any]:
        """Count the faults of the vectors, with examples, and say which texts are not trained on."""
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        dropped: dict[Kind, list[int]] = {}
        for kind, texts in self.encoded_texts.items():
            faults = find_faults(self.teacher.cache(kind), texts)
            counts.update({fault: len(numbers) for fault, numbers in faults.items()})
            for fault, numbers in faults.items():
                examples.setdefault(fault, []).extend(texts[number][:200] for number in numbers[:_EXAMPLES])
            dropped[kind] = sorted({int(number) for fault in self.recipe.encoding.drop for number in faults[fault]})
        kept = sum(len(texts) - len(dropped[kind]) for kind, texts in self.encoded_texts.items())
        note(f"Targets: {kept:,} kept; " + ", ".join(f"{count:,} {fault}" for fault, count in counts.items()))
        if kept < 2:
            found = f"{kept} texts left to train on"
            raise UsageError("encoding.drop", found, "two at the very least", f"see {self.folder / TARGETS}")
        return {"counts": counts, "examples": examples, "rules": self.recipe.encoding.drop, "dropped": dropped}

    def build_assistant(self) -> dict[str, Any]:
        return self._build(load(self.located), cast(TransformerPlan, self.assistant_plan), ASSISTANT)

    def train_assistant(self) -> None:
        via = cast(AssistantSection, self.recipe.student.via)
        self._train(ASSISTANT, TRAINED_ASSISTANT, via.share)

    def build(self) -> dict[str, Any]:
        source = self._load(TRAINED_ASSISTANT) if self.recipe.student.via else load(self.located)
        self.stages.choose(f"forecast {self.located.weights_sha256[:12]}", self._forecast)
        return self._build(source, self.plan, "untrained")

    def _build(self, source: SentenceTransformer, plan: TransformerPlan | None, name: str) -> dict[str, Any]:
        """Build an untrained model out of a source, and save it."""
        section = self.recipe.student
        inputs, vectors = self._sample(source)
        size = section.embedding_size
        projection = fit_pca(vectors, size) if size and size < vectors.shape[1] else None
        counted = list_inputs(source, self.training_texts)
        layers: list[int] | None = None
        if plan:
            student, layers = build_student(source, plan, inputs, vectors, projection=projection, counted=counted)
        else:
            texts, targets = inputs[:_FIT_TEXTS], project(vectors[:_FIT_TEXTS], projection)
            if self.start:
                student = add_head(list_body(load(self.start)), source, texts, targets)
            else:
                pieces = section.vocabulary_size
                student = build_static(source, texts, targets, vocabulary_size=pieces, counted=counted)
        self._save(student, self.folder / name, projection, layers)
        return {"layers": layers}

    def _forecast(self) -> list[dict[str, Any]]:
        """Return what teacher and student will cost; nothing where the student is not of planned sizes."""
        if not self.plan:
            return []
        teacher = load(self.located)
        size = self.recipe.student.embedding_size or teacher.get_embedding_dimension() or 0
        return [asdict(one) for one in forecast(teacher, {"student": self.plan.sizes}, size)]

    def _compare_forecast(self, models: dict[str, SentenceTransformer]) -> list[dict[str, Any]]:
        """Return what was planned beside what is measured; nothing where nothing was."""
        rows = self.stages.choose(f"forecast {self.located.weights_sha256[:12]}", self._forecast)
        planned = TypeAdapter(list[Forecast]).validate_python(rows)
        return compare_forecast(planned, models) if planned else []

    def _sample(self, model: SentenceTransformer) -> tuple[list[str], Matrix]:
        """Return some training texts as the model sees them, in random order, and the teacher's vectors of them."""
        inputs, vectors = [], []
        share = _SAMPLE_TEXTS / sum(len(texts) for texts in self.training_texts.values())
        for kind, texts in self.training_texts.items():
            some = texts[: math.ceil(share * len(texts))]
            inputs += [find_prompt(model, kind) + text for text in some]
            vectors.append(self.teacher.vectors(some, kind))
        order = np.random.default_rng(self.recipe.seed).permutation(len(inputs))
        return [inputs[number] for number in order], np.concatenate(vectors)[order]

    def train(self) -> None:
        via = self.recipe.student.via
        self._train("untrained", "model", 1 - via.share if via else 1.0)

    def _train(self, name: str, trained: str, share: float) -> None:
        """Train a model on the cache for a share of the time, and save it under another name."""
        for kind, texts in self.training_texts.items():
            encode_missing(self.recipe, self.teacher, texts, kind)  # nothing, unless the cache was pruned
        log = "training_log" if trained == "model" else f"{trained}_log"
        dtype = str(self._choose_dtype("student", self.recipe.training.dtype)).removeprefix("torch.")
        task: dict[str, Any] = {"name": name, "share": share, "work": self.stages.current[:12], "log": log}
        task["dtype"] = dtype  # measured once, for all processes
        ranks.announce(self.announced, **task)
        self.announced += 1
        student = self.teach(**task)
        layers = read_json(self.folder / name / "embedistill.json")["layers"]
        self._save(student, self.folder / trained, load_projection(self.folder / name), layers)
        remove(self.folder / "checkpoints")

    def teach(self, name: str, share: float, work: str, log: str, dtype: str) -> SentenceTransformer:
        """Train a model in all phases of the recipe; the processes of torchrun do this together."""
        student, described = self._load(name), read_json(self.folder / name / "embedistill.json")
        projection = load_projection(self.folder / name)
        for number, (on, part, section) in enumerate(self.recipe.training.phases):
            targets = self.teacher.open_targets(self.training_texts)
            lessons = list_lessons(
                student, self.corpus["train"], self.training_texts, targets, projection=projection, on=on
            )
            live = load(self.located) if LIVE & set(section.objectives.used) else None
            train(
                student,
                lessons.inputs,
                lessons.targets,
                loss=make_loss(section, student, live, described["layers"]),
                batching=make_batching(section, student, lessons, self.recipe.seed),
                schedule=make_schedule(section, share * part, self.recipe.seed, getattr(torch, dtype)),
                work_dir=self.folder / "checkpoints" / work / str(number),
                log_path=self.folder / (f"{log}.jsonl" if number == 0 else f"{log}-{number}.jsonl"),
                dev=self._open_dev(student, projection),
                partners=lessons.partners[:, 0],
                is_first=number == 0,
            )
        return student

    def _open_dev(self, student: SentenceTransformer, projection: Matrix | None) -> Dev | None:
        if not any(self.dev_texts.values()):
            return None
        vectors = [self.teacher.vectors(texts, kind) for kind, texts in self.dev_texts.items() if texts]
        score = self.examination.score if self.examination.watched else None
        return Dev(list_inputs(student, self.dev_texts), project(np.concatenate(vectors), projection), score)

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
        trained = (text for texts in self.encoded_texts.values() for text in texts)
        return {
            "models": [asdict(facts) for facts in measure_candidates(candidates, choose_texts(tasks))],
            "order": [[result.task, result.role] for result in results],
            "skipped": sorted(set(section.tasks) - set(named)),
            "planned": self._compare_forecast(models),
            "contamination": find_contamination(tasks, trained),
        }

    def _list_candidates(self) -> list[Candidate]:
        """Return the teacher, the student and what it is compared with: floors below it, and the baselines."""
        teacher, name = load(self.located), self.located.name
        space = partial(project, projection=load_projection(self.folder / "model"))
        candidates = [Candidate(TEACHER, name, self.teacher.vectors, lambda same: same, teacher, self.located.path)]
        for role, part in ((STUDENT, "model"), (UNTRAINED, "untrained")):
            candidates.append(make_candidate(role, self._locate(str(self.folder / part)), space))
        candidates += make_floors(self.folder / "model", teacher, self.teacher.vectors, self._sample)
        return candidates + [make_candidate(name, located) for name, located in self.baselines.items()]

    def report(self) -> None:
        section, facts = self.recipe.evaluation, self.stages.facts("evaluation")
        tasks = list(self.tasks.values())
        results = load_results(self.folder / "results")
        results.sort(key=lambda result: facts["order"].index([result.task, result.role]))
        trained = [text for texts in self.encoded_texts.values() for text in texts]
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
        records = [record for split in self.corpus.values() for record in split]
        texts, sources = [record.text for record in records], [record.source for record in records]
        model = self._load("model", self._choose_dtype("student", self.recipe.training.dtype))
        build_index(model, self.folder / "model", texts, sources, self.folder / INDEX)

    def _load(self, name: str, dtype: torch.dtype = torch.float32) -> SentenceTransformer:
        return SentenceTransformer(str(self.folder / name), model_kwargs={"dtype": dtype}, local_files_only=True)

    def _save(
        self, student: SentenceTransformer, folder: Path, projection: Matrix | None, layers: list[int] | None
    ) -> None:
        space = {
            "teacher": self.located.name,
            "weights_sha256": self.located.weights_sha256,
            "from": self.recipe.student.origin,
            "layers": layers,
        }
        with written_aside(folder) as part:
            part.mkdir()
            save_student(student, part, projection, space)
