"""The recipe: what to distil, from what, into what. Strict models, YAML with line numbers, key=value overrides.

A recipe has a closed vocabulary. All that is wrong with one is said at once, before anything is loaded or downloaded.
This module imports no torch, so that checking a recipe takes a fraction of a second.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from embedistill.errors import RecipeError, UsageError
from embedistill.files import fingerprint

_SHIPPED = Path(__file__).parent / "recipes"
RECIPES = _SHIPPED if _SHIPPED.is_dir() else _SHIPPED.parents[1] / "recipes"  # in a wheel, or in a checkout
REMOTE_SOURCES = ("hf:", "docstrings:")
AGREEMENT = "agreement"
KNOWN_ITEM = "known-item"

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
Storage = Literal["float32", "float16", "bfloat16", "int8"]
Fault = Literal["not-finite", "zero-norm", "cut", "equal", "outlier"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TeacherSection(_Section):
    """The model to distil."""

    model: str = Field(description="A folder, or a model id such as sentence-transformers/all-mpnet-base-v2.")
    revision: str | None = Field(None, description="Commit, tag or branch of the model on the Hub.")
    api: str | None = Field(
        None,
        description="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1, that has the model.",
    )
    api_key_variable: str = Field("OPENAI_API_KEY", description="Environment variable with the endpoint's key.")
    dtype: Dtype = Field(
        "auto", description="float32, bfloat16, or auto: bfloat16 where its matrix products are measured faster."
    )


class EncodingSection(_Section):
    """How the teacher's embeddings are made, kept, and judged."""

    storage: Storage = Field("float16", description="Number format in the cache: float32, float16, bfloat16 or int8.")
    drop: list[Fault] = Field(
        ["not-finite", "zero-norm"],
        description="Faults of a vector that keep its text from training: not-finite, zero-norm, cut (its text was "
        "longer than the teacher sees), equal (another text has the same vector), outlier (its neighbours are far). "
        "All are counted and reported.",
    )
    engine: Literal["local", "ray"] = Field("local", description="local, or ray: a Ray cluster encodes.")
    workers: Count = Field(1, description="Workers of the Ray cluster.")
    cores: Count = Field(1, description="Cores of a Ray worker.")
    gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="GPUs of a Ray worker, or a share of one.")
    store: str | None = Field(
        None,
        description="Where Ray workers keep the cache: s3://..., or a folder all see; default: the cache's folder.",
    )

    @field_validator("drop")
    @classmethod
    def _drops_what_cannot_be_trained_on(cls, drop: list[Fault]) -> list[Fault]:
        if not {"not-finite", "zero-norm"} <= set(drop):
            raise ValueError("not-finite and zero-norm among them: such a vector cannot be trained on")
        return drop


class SelectSection(_Section):
    """Which records of the corpus are used."""

    size: Count | None = Field(None, description="At most this many records, training and held out; default: all.")
    by: Literal["random"] = Field("random", description="How they are selected: random.")


class CorpusSection(_Section):
    """The texts to distil on."""

    source: str = Field(
        description="A .txt, .csv or .jsonl file (.gz too), a .parquet file, a folder of them, "
        "hf:org/dataset[:config][:split], or docstrings:[package,package]."
    )
    text_column: str = Field("text", description="Column with the text.")
    query_column: str | None = Field(
        None, description="Column with a short text that should find the text: a title, a question. Trained on as well."
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="A row whose text is missing, no string or too long: error, or skip and count it."
    )
    min_characters: Count = Field(3, description="Shorter texts are left out.")
    max_characters: Count = Field(100_000, description="A longer text is a bad row.")
    select: SelectSection = SelectSection()
    holdout: Share = Field(0.05, description="Share of the records that is never trained on, for evaluation.")


class StudentSection(_Section):
    """What the teacher is distilled into."""

    layers: Count | list[int] = Field(
        description="How many of the teacher's layers to keep: the lower ones and the last; or which, from 0."
    )
    embedding_size: Count | None = Field(
        None, description="Dimension of the student's embeddings: PCA of the teacher's; default: the teacher's own."
    )


class ObjectivesSection(_Section):
    """Weights of the terms of the loss."""

    embedding: Annotated[float, Field(ge=0)] = Field(1.0, description="1 - cosine to the teacher's embedding.")
    similarity: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="KL divergence of the student's in-batch similarities from the teacher's.",
    )

    @model_validator(mode="after")
    def _has_a_term(self) -> ObjectivesSection:
        if not self.embedding and not self.similarity:
            raise ValueError("one weight above 0")
        return self


class TrainingSection(_Section):
    """How the student is trained."""

    epochs: Positive = Field(3.0, description="Passes over the training texts, at most.")
    minutes: Positive | None = Field(None, description="Time for training, at most; the schedule is fitted to it.")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="Texts a step.")
    learning_rate: Positive = Field(2e-4, description="Peak learning rate; linear warm-up, cosine decay to zero.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="Share of the steps that warms up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    objectives: ObjectivesSection = ObjectivesSection()
    temperature: Positive = Field(0.05, description="Temperature of the similarity term.")
    checkpoint_steps: Count = Field(100, description="Steps between checkpoints: what a kill can cost.")
    dtype: Dtype = Field("auto", description="As teacher.dtype, for the student's training.")


class EvaluationSection(_Section):
    """What teacher and student are compared on."""

    tasks: list[Annotated[str, Field(pattern=r"^\w[\w.-]*$")]] = Field(
        [AGREEMENT, KNOWN_ITEM],
        min_length=1,
        description=f"{AGREEMENT} (with the teacher, on held-out texts), {KNOWN_ITEM} (FAISS retrieval of held-out "
        "records by their query), or names of STS and retrieval sets: STSBenchmark, STS12, SICK-R, SciFact, ...",
    )
    data: str | None = Field(None, description="Folder with sts/NAME.jsonl and retrieval/NAME/; default: the Hub.")
    missing: Literal["error", "skip"] = Field(
        "error", description="A task whose data cannot be had: error, or skip and say so."
    )
    baselines: list[str] = Field([], description="Models to measure beside teacher and student.")
    margin: Share | None = Field(
        None,
        description="PASS when retention is surely above 1 - margin, FAIL when below; default: no verdict.",
    )
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples of an interval.")


class SearchSection(_Section):
    """The FAISS index of the corpus that a run ends with."""

    question: str = Field(description="Answered from the index when the run is done.")
    results: Count = Field(3, description="How many results are shown.")


class Recipe(_Section):
    """A whole recipe. `load_recipe` makes one of a name or a file."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = Field(description="Name of the run's folder under runs/.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of selection, batches and bootstrap.")
    teacher: TeacherSection
    corpus: CorpusSection
    student: StudentSection
    encoding: EncodingSection = EncodingSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    search: SearchSection | None = Field(None, description="Build a FAISS index of the corpus and answer a question.")

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        if name in {".", ".."}:
            raise ValueError("must name a folder")
        return name

    @model_validator(mode="after")
    def _runs_where_it_can(self) -> Recipe:
        if self.teacher.api and self.encoding.engine != "local":
            raise ValueError(
                "teacher.api with encoding.engine=ray: an endpoint spreads its work by itself; use engine=local"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """The sha256 of all its settings."""
        return fingerprint(self.model_dump())


def load_recipe(recipe: str | Path, *overrides: str) -> Recipe:
    """Load a recipe by name or file, with `key=value` overrides such as "training.minutes=30".

    Relative paths in it are taken from the current folder and made absolute. A recipe whose settings were overridden is
    named after them, so that its run has a folder of its own.

    Raises:
        RecipeError: One or more settings are wrong; its message has a line for each, with file and line number.
        UsageError: There is no such recipe or file.
    """
    path = find_recipe(recipe)
    tree, lines, problems = _read_yaml(path)
    for override in overrides:
        problems += _apply(override, tree, lines)
    try:
        loaded = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += _merge([_explain(detail, lines, path) for detail in error.errors()])
    if problems:
        raise RecipeError(problems)
    loaded = _with_absolute_paths(loaded)
    if overrides and not any(override.startswith("name=") for override in overrides):
        return loaded.model_copy(update={"name": f"{loaded.name}-{loaded.fingerprint[:8]}"})
    return loaded


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe that is given as a path or by the name of a shipped one.

    Raises:
        UsageError: There is no such file or recipe.
    """
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise UsageError(str(path), "no such file", do="check the path, or see: embedistill recipes list")
        return path
    shipped = RECIPES / f"{recipe}.yaml"
    if not shipped.is_file():
        names = [found.stem for found in list_recipes()]
        raise UsageError(
            f"recipe {str(recipe)!r}",
            "no such recipe",
            f"a .yaml file or one of: {', '.join(names)}",
            _suggest(str(recipe), names),
        )
    return shipped


def list_recipes() -> list[Path]:
    """Return the files of the recipes that are shipped."""
    return sorted(RECIPES.glob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every default written out: loading it gives the same recipe."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, for a reference table."""

    key: str
    default: str
    description: str


def list_settings(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting a recipe may have, with default and description."""
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner:
            yield from list_settings(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else str(field.default)
            yield Setting(prefix + name, default, field.description or "")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    options = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `no` is a word, `1:30` is no number, `2e-5` is one."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(str(node.value).replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(str(node.value).replace("_", "")))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something other than a string."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

_Location = tuple[str | int, ...]


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[_Location, str], list[UsageError]]:
    """Return the tree of a YAML file, where each of its keys stands, and the duplicate keys as problems."""
    lines: dict[_Location, str] = {(): f"{path}:1"}
    problems: list[UsageError] = []
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None:
            _locate(root, (), path, lines, problems)
        tree = loader.construct_document(root) if root is not None else None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}:byte {error.start}", "not UTF-8", "a YAML file", "save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        found = f"not YAML: {getattr(error, 'problem', None) or error}"
        raise UsageError(where, found, do="mend the line; an example: embedistill recipes show quickstart") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else type(tree).__name__
        raise UsageError(f"{path}:1", found, "a mapping of settings", "an example: embedistill recipes show quickstart")
    return tree, lines, problems


def _locate(
    node: yaml.Node, place: _Location, path: Path, lines: dict[_Location, str], problems: list[UsageError]
) -> None:
    children: list[tuple[str | int, int, yaml.Node]] = []
    match node:
        case yaml.MappingNode():
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UsageError(f"{path}:{key.start_mark.line + 1}", "a key that is no word", "key: value")
            children = [(key.value, key.start_mark.line + 1, value) for key, value in node.value]
        case yaml.SequenceNode():
            children = [(index, item.start_mark.line + 1, item) for index, item in enumerate(node.value)]
    first: dict[str | int, int] = {}
    for name, line, child in children:
        inner, where = (*place, name), f"{path}:{line}"
        if name in first:
            problems.append(UsageError(where, f"{name}: a second time (first in line {first[name]})", do="keep one"))
        first.setdefault(name, line)
        lines[inner] = where
        _locate(child, inner, path, lines, problems)


def _apply(override: str, tree: dict[str, Any], lines: dict[_Location, str]) -> list[UsageError]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [UsageError(f"override {override!r}", "no value", "key=value, such as training.minutes=30")]
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        value = text
    *folders, name = place = tuple(key.split("."))
    for folder in folders:
        if not isinstance(tree.setdefault(folder, {}), dict):
            tree[folder] = {}
        tree = tree[folder]
    tree[name] = value
    for depth in range(1, len(place) + 1):
        lines[place[:depth]] = lines.get(place[:depth], f"override {override!r}")
    lines[place] = f"override {override!r}"
    return []


def _explain(detail: ErrorDetails, lines: dict[_Location, str], path: Path) -> UsageError:
    place = detail["loc"]
    known = [place[:depth] for depth in range(len(place), -1, -1) if place[:depth] in lines]
    where = lines[known[0]] if known else str(path)
    key = ".".join(str(part) for part in (known[0] if known and known[0] else place))
    match detail["type"]:
        case "extra_forbidden":
            names = list(_fields_at(place[:-1]))
            return UsageError(
                where, f"{key}: unknown key", f"one of: {', '.join(names)}", _suggest(str(place[-1]), names)
            )
        case "missing":
            key = ".".join(str(part) for part in place)
            return UsageError(where, f"{key}: missing", do="set it; what it means: embedistill recipes settings")
        case _:
            wrong = re.sub(r"^(Input should be|Value error,) ", "", detail["msg"])
            return UsageError(where, f"{key}: {detail['input']!r}", wrong) if key else UsageError(where, wrong)


def _merge(problems: list[UsageError]) -> list[UsageError]:
    """Make one problem of a value that fits none of several types."""
    merged: dict[tuple[str, str], UsageError] = {}
    for problem in problems:
        first = merged.setdefault((problem.where, problem.found), problem)
        if first is not problem:
            expected = f"{first.expected} or {problem.expected}"
            merged[problem.where, problem.found] = UsageError(problem.where, problem.found, expected, problem.do)
    return list(merged.values())


def _fields_at(place: Sequence[str | int]) -> dict[str, FieldInfo]:
    section: type[BaseModel] = Recipe
    for part in place:
        inner = _section_of(section.model_fields[str(part)]) if str(part) in section.model_fields else None
        section = inner or section
    return section.model_fields


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    source, data, store = recipe.corpus.source, recipe.evaluation.data, recipe.encoding.store
    if not source.startswith(REMOTE_SOURCES):
        source = str(Path(source).expanduser().absolute())
    if store is not None and "://" not in store:
        store = str(Path(store).expanduser().absolute())
    if data is not None:
        data = str(Path(data).expanduser().absolute())
    model, *baselines = (
        str(Path(name).expanduser().absolute())
        if Path(name).expanduser().is_dir() and not (recipe.teacher.api and name == recipe.teacher.model)
        else name
        for name in (recipe.teacher.model, *recipe.evaluation.baselines)
    )
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"model": model}),
            "corpus": recipe.corpus.model_copy(update={"source": source}),
            "encoding": recipe.encoding.model_copy(update={"store": store}),
            "evaluation": recipe.evaluation.model_copy(update={"data": data, "baselines": baselines}),
        }
    )
