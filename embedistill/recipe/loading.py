"""Load a recipe and say all that is wrong with it at once, before anything is loaded or downloaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from embedistill.errors import RecipeError, UsageError
from embedistill.files import is_jsonl
from embedistill.recipe.notation import Dumper, Location, apply_override, read_yaml
from embedistill.recipe.sections import AFTERWARDS, Recipe
from embedistill.recipe.training import CourseSection

_SHIPPED = Path(__file__).parents[1] / "recipes"
RECIPES = _SHIPPED if _SHIPPED.is_dir() else _SHIPPED.parents[1] / "recipes"  # in a wheel, or in a checkout
REMOTE_SOURCES = ("hf:", "docstrings:")


def load_recipe(recipe: str | Path, *overrides: str) -> Recipe:
    """Load a recipe by name or file, with `key=value` overrides such as "training.minutes=30".

    Relative paths in it are taken from the current folder and made absolute. A recipe whose settings were overridden is
    named after them, so that its run has a folder of its own; those of `evaluation` and `search`, which a finished run
    may be given anew, do not count.

    Raises:
        RecipeError: One or more settings are wrong; its message has a line for each, with file and line number.
        UsageError: There is no such recipe or file.
    """
    path = find_recipe(recipe)
    tree, lines, problems = read_yaml(path)
    for override in overrides:
        problems += apply_override(override, tree, lines)
    try:
        loaded = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += _merge([_explain(detail, lines, path) for detail in error.errors()])
    if problems:
        raise RecipeError(problems)
    loaded = _with_absolute_paths(loaded)
    changed = {override.partition("=")[0].split(".")[0].strip() for override in overrides}
    if "name" not in changed and changed - set(AFTERWARDS):
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
    return yaml.dump(recipe.model_dump(by_alias=True), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, for a reference table."""

    key: str
    default: str
    description: str


def list_settings(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting a recipe may have, with default and description."""
    for name, field in _fields_of(section).items():
        inner = _section_of(field)
        if inner and inner is not CourseSection:
            yield from list_settings(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        shown = default.start if isinstance(default, CourseSection) else default
        yield Setting(prefix + name, str(shown), field.description or "")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    options = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _explain(detail: ErrorDetails, lines: dict[Location, str], path: Path) -> UsageError:
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
            if not key:
                return UsageError(where, wrong)
            if detail["type"] == "value_error" and isinstance(detail["input"], dict):
                inside = {line: str(inner[-1]) for inner, line in lines.items() if inner[: len(place)] == place}
                changed = {line: name for line, name in inside.items() if not line.startswith(f"{path}:")}
                named = [line for line, name in changed.items() if name in wrong] or list(changed)
                return UsageError(" and ".join(named) or where, f"{key}: its settings together", wrong)
            return UsageError(where, f"{key}: {detail['input']!r}", wrong)


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
        field = _fields_of(section).get(str(part))
        section = (_section_of(field) if field else None) or section
    return _fields_of(section)


def _fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the name that a recipe calls them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    data, store = recipe.evaluation.data, recipe.encoding.store
    given = recipe.corpus.source
    source = _absolute_source(given) if isinstance(given, str) else [_absolute_source(one) for one in given]
    if store is not None and "://" not in store:
        store = str(Path(store).expanduser().absolute())
    if data is not None:
        data = str(Path(data).expanduser().absolute())
    tasks = [_absolute_task(name) for name in recipe.evaluation.tasks]
    dev_task = recipe.training.dev_task and _absolute_task(recipe.training.dev_task)
    pairs = str(Path(recipe.corpus.pairs).expanduser().absolute()) if recipe.corpus.pairs else None
    model, origin, *baselines = (
        str(Path(name).expanduser().absolute())
        if Path(name).expanduser().is_dir() and not (recipe.teacher.api and name == recipe.teacher.model)
        else name
        for name in (recipe.teacher.model, recipe.student.origin, *recipe.evaluation.baselines)
    )
    if recipe.student.origin in {"teacher", "static"}:
        origin = recipe.student.origin
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"model": model}),
            "corpus": recipe.corpus.model_copy(update={"source": source, "pairs": pairs}),
            "student": recipe.student.model_copy(update={"origin": origin}),
            "encoding": recipe.encoding.model_copy(update={"store": store}),
            "training": recipe.training.model_copy(update={"dev_task": dev_task}),
            "evaluation": recipe.evaluation.model_copy(update={"data": data, "baselines": baselines, "tasks": tasks}),
        }
    )


def _absolute_task(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if is_jsonl(name) else name


def _absolute_source(source: str) -> str:
    return source if source.startswith(REMOTE_SOURCES) else str(Path(source).expanduser().absolute())
