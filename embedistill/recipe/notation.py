"""How a recipe is written: YAML whose every key knows its line, and key=value overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from embedistill.errors import UsageError


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


class Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something other than a string."""


Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

Location = tuple[str | int, ...]


def parse(text: str) -> Any:
    """Return what some YAML stands for."""
    return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str], list[UsageError]]:
    """Return the tree of a YAML file, where each of its keys stands, and the duplicate keys as problems."""
    lines: dict[Location, str] = {(): f"{path}:1"}
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
    node: yaml.Node, place: Location, path: Path, lines: dict[Location, str], problems: list[UsageError]
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


def apply_override(override: str, tree: dict[str, Any], lines: dict[Location, str]) -> list[UsageError]:
    """Set one key of a tree, and return what is wrong with the override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [UsageError(f"override {override!r}", "no value", "key=value, such as training.minutes=30")]
    try:
        value = parse(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        value = text  # with a colon in it, such as a prompt
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
