"""Files that are whole or not there: write aside, fsync, rename. And fingerprints of what was written."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedistill.errors import EmbedistillError

PART = ".part"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to; on success it takes the place of `path`.

    A reader, or a run that was killed, never sees a part of it: of a file the old content or the new; of a folder the
    old one, for a moment none, and the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        yield part
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            _sync(file)
        if path.is_dir():
            remove(path)
        part.replace(path)
        _sync(path.parent)
    finally:
        remove(part)


def make_folder(path: Path) -> None:
    """Make a folder that a power cut does not take away with what is written to it."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with written_aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        EmbedistillError: It is damaged: what `write_json` wrote is whole.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        do = "restore it, or make anew what it is part of"
        raise EmbedistillError(str(path), f"damaged: {error}", "JSON", do) from None


def fingerprint(content: Any) -> str:
    """Return the sha256 of a JSON value in canonical form: equal values, equal fingerprints."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder, links followed, what other runtimes need left out."""
    files = (file for file in folder.rglob("*") if not {"onnx", "openvino"} & set(file.relative_to(folder).parts))
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder is out of the way before its first file is gone."""
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def is_jsonl(name: str) -> bool:
    """Say whether a name is that of a .jsonl file, compressed or not."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
