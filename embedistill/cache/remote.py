"""Shards at another place: a shared folder, or whatever fsspec has an address for, such as s3://bucket/embeddings.

A shard never changes and its name is the sha256 of its bytes, so copying what one place lacks makes two the same.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from embedistill.cache.shards import SUFFIX, list_shards
from embedistill.cache.store import MANIFEST
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import sha256_file, written_aside
from embedistill.progress import progress_bar

_AT_ONCE = 8


def pull(url: str, key: str, folder: Path) -> int:
    """Copy the shards that a folder lacks from `<url>/<key>`, and return how many.

    Args:
        url: Folder of all encodings: a path, or an address that fsspec knows.
        key: The encoding.
        folder: Folder of that encoding here.

    Raises:
        EmbedistillError: The place cannot be reached, or a shard there is not what was written.
        UsageError: No such kind of address is known.
    """
    files, place = _open(f"{url}/{key}")

    def fetch(name: str) -> None:
        with written_aside(folder / name) as part:
            files.get_file(f"{place}/{name}", str(part))
            if (found := sha256_file(part)) != Path(name).stem:
                do = "delete it there and run again: its texts are encoded again"
                raise EmbedistillError(f"shard {url}/{key}/{name}", f"sha256 {found}", "that of its name", do)

    with _reaching(url):
        there = [name for name in _list_names(files, place) if name.endswith(SUFFIX)]
        here = {name + SUFFIX for name in list_shards(folder)}
        return _copy_all("fetching", fetch, [name for name in there if name not in here])


def push(url: str, key: str, folder: Path) -> int:
    """Copy the shards that `<url>/<key>` lacks from a folder, its manifest too, and return how many shards.

    Args:
        url: Folder of all encodings: a path, or an address that fsspec knows.
        key: The encoding.
        folder: Folder of that encoding here.

    Raises:
        EmbedistillError: The place cannot be reached.
        UsageError: No such kind of address is known.
    """
    files, place = _open(f"{url}/{key}")
    with _reaching(url):
        there = set(_list_names(files, place))
    if MANIFEST not in there:
        send_file(folder / MANIFEST, f"{url}/{key}/{MANIFEST}")
    lacking = [name + SUFFIX for name in list_shards(folder) if name + SUFFIX not in there]
    return _copy_all("sending", lambda name: send_file(folder / name, f"{url}/{key}/{name}"), lacking)


def send_file(file: Path, url: str) -> None:
    """Copy a file to a path or an address, where it is whole or not at all.

    Raises:
        EmbedistillError: The place cannot be reached.
        UsageError: No such kind of address is known.
    """
    files, place = _open(url)
    with _reaching(url):
        if isinstance(files, LocalFileSystem):
            with written_aside(Path(place)) as part:
                shutil.copyfile(file, part)
        else:
            files.put_file(str(file), place)  # an object appears when all of it is there


def remove_folder(url: str) -> None:
    """Remove a folder and all that is in it, if it is there.

    Raises:
        EmbedistillError: The place cannot be reached.
    """
    files, place = _open(url)
    files.invalidate_cache()
    with _reaching(url), suppress(FileNotFoundError):
        files.rm(place, recursive=True)


def _open(url: str) -> tuple[Any, str]:
    try:
        files, place = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        do = "install the package of that kind of address, or give a folder that all nodes see"
        raise UsageError(url, str(error), "a path or an address that fsspec knows", do) from error
    return files, str(place)


def _list_names(files: Any, place: str) -> list[str]:
    files.invalidate_cache()  # others write there
    try:
        return sorted(str(path).rsplit("/", 1)[-1] for path in files.ls(place, detail=False))
    except FileNotFoundError:
        return []


def _copy_all(label: str, copy: Callable[[str], None], names: Sequence[str]) -> int:
    if names:
        with progress_bar(label, len(names), "shards") as advance, ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(copy, names):
                advance(1)
    return len(names)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every kind of address has errors of its own
        of_this_disk = isinstance(error, OSError) and (error.filename or error.errno in {errno.ENOSPC, errno.EDQUOT})
        if of_this_disk or isinstance(error, EmbedistillError):
            raise
        do = "check the address and the rights there; what is written is kept, so run the same command again"
        raise EmbedistillError(url, f"{type(error).__name__}: {error}", do=do) from error
