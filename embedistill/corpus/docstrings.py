"""The docstrings of installed packages: a corpus of real English that every Python environment has.

Sources are parsed, never imported. A record's text is the qualified name and the prose of the docstring up to its first
section (parameters, examples); its query is the first sentence.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from embedistill.corpus.records import Record
from embedistill.errors import UsageError

_MAX_WORDS = 60
_TITLES = (
    "Parameters|Params|Args|Arguments|Keyword args|Keyword arguments|Returns?|Yields?|Raises|Examples?|Notes?|See Also"
    "|References|Attributes|Shape|Inputs?|Outputs?|Warnings?|Methods|Usage|Example usage|Inherited from"
)
_SECTION = re.compile(
    rf"^\s*(?:\.\. \w|>>> |```|(?:{_TITLES})\s*(?:::?\s*$|\n\s*[-=~]{{3,}}))", re.MULTILINE | re.IGNORECASE
)
_ROLE = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>]*>`_+|\[([^\]]+)\]\([^)]*\)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SKIPPED_FOLDERS = {"tests", "test", "testing", "vendor", "node_modules"}


def find_packages(names: list[str]) -> list[Distribution]:
    """Return the installed distributions of these names, or all of them where no name is given.

    Raises:
        UsageError: One of them is not installed.
    """
    if not names:
        return sorted(distributions(), key=lambda found: found.name.lower())
    packages = []
    for name in names:
        try:
            packages.append(distribution(name))
        except PackageNotFoundError:
            raise UsageError(
                "corpus.source", f"package {name!r} is not installed", do=f"pip install {name}, or take it off the list"
            ) from None
    return packages


def read_docstrings(package: Distribution) -> Iterator[Record]:
    """Yield a record for every public class, function and method of a package that has a docstring in prose."""
    source = package.name  # parsed from the metadata at every access
    for file in package.files or []:
        if file.suffix == ".py" and not any(_is_skipped(folder) for folder in file.parts[:-1]):
            module = ".".join(part for part in file.with_suffix("").parts if part != "__init__")
            for name, docstring in _documented(Path(str(file.locate())), module):
                record = _to_record(name, docstring, source)
                if record:
                    yield record


def _is_skipped(folder: str) -> bool:
    return folder in _SKIPPED_FOLDERS or (folder.startswith("_") and folder != "_core")  # numpy lives in numpy/_core


def _documented(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and broken files are no source of prose
        return
    yield from _walk(tree, module)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if not child.name.startswith("_"):
                docstring = ast.get_docstring(child)
                if docstring:
                    yield f"{name}.{child.name}", docstring
                if isinstance(child, ast.ClassDef):
                    yield from _walk(child, f"{name}.{child.name}")
            case ast.Expr(value=ast.Call() as call):
                yield from _added_docstring(call)


def _added_docstring(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Find what torch gives its compiled functions: add_docstr(torch.sum, "..." or "...".format(...))."""
    match call:
        case ast.Call(func=ast.Name(id="add_docstr"), args=[ast.Attribute() as target, documentation, *_]):
            if isinstance(documentation, ast.Call) and isinstance(documentation.func, ast.Attribute):
                documentation = documentation.func.value
            if isinstance(documentation, ast.Constant) and isinstance(documentation.value, str):
                yield ast.unparse(target), inspect.cleandoc(documentation.value)


def _to_record(name: str, docstring: str, source: str) -> Record | None:
    section = _SECTION.search(docstring)
    prose = docstring[: section.start()] if section else docstring
    prose = re.sub(r"^\S+\(.*?\) -> .*$", "", prose, count=1, flags=re.MULTILINE)  # torch puts the signature first
    prose = _LINK.sub(lambda found: found[1] or found[2], _ROLE.sub(r"\1", prose)).replace("`", "").replace("*", "")
    words = prose.split()[:_MAX_WORDS]
    if len(words) < 4 or not prose.isascii() or "{" in prose:
        return None
    sentences = _SENTENCE_END.split(" ".join(words), maxsplit=1)
    long_enough = len(sentences) == 2 and len(sentences[0].split()) >= 4 and len(sentences[1].split()) >= 8
    return Record(f"{name}: {' '.join(words)}", source, sentences[0] if long_enough else None)
