"""A run's folder: whose it is, what it was made with, and which of its stages are done."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import filelock

from embedistill.errors import RecipeError, UsageError
from embedistill.files import PART, fingerprint, read_json, remove, write_json, write_text
from embedistill.progress import note
from embedistill.recipe import dump_recipe, load_recipe
from embedistill.recipe.notation import parse

Stage = Literal["corpus", "encode", "student", "training"]
"""One that a run may end with."""

SCHEMA_VERSION = 1
RECIPE = "recipe.yaml"
_LOCK = ".lock"
_PACKAGES = ("embedistill", "sentence-transformers", "transformers", "torch", "datasets", "faiss-cpu", "numpy")


class Stages:
    """Runs the stages of a run, each once: one whose output is there and whose inputs did not change is not run again.

    What happened is in `run.json`: versions, hardware, and of each stage the fingerprint of its inputs, its seconds,
    and whether it was `resumed`: then the seconds are those of the last process alone.

    Args:
        folder: The run's folder, held by `hold_folder`.
        seed: Of the run, for `run.json`.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self._path = folder / "run.json"
        self.current = ""  # fingerprint of the inputs of the stage at work
        if self._path.is_file():
            self.record: dict[str, Any] = read_json(self._path)
        else:
            self.record = {
                "schema_version": SCHEMA_VERSION,
                "seed": seed,
                "versions": list_versions(),
                "hardware": describe_hardware(),
                "git_commit": _git_commit(),
                "chosen": {},
                "stages": {},
            }

    def run(
        self, name: str, work: Callable[[], Mapping[str, Any] | None], inputs: Sequence[Any], outputs: Sequence[str]
    ) -> str:
        """Run a stage where it has to be, record what `work` returns, and return the fingerprint of its inputs.

        Args:
            name: Of the stage.
            work: Makes the outputs; it may return facts worth keeping.
            inputs: Whatever the outputs depend on, as JSON.
            outputs: Names of files or folders in the run's folder.
        """
        key = fingerprint([name, *inputs])
        done = self.record["stages"].get(name, {})
        if done.get("key") == key and all((self.folder / output).exists() for output in outputs):
            note(f"{name}: done earlier")
            return key
        self.record["stages"].pop(name, None)  # while it is at work, its outputs are nobody's
        resumed = self.record.get("begun") == key
        self.record["begun"] = key
        write_json(self._path, self.record)
        start = time.perf_counter()
        self.current = key
        facts = work() or {}
        seconds = round(time.perf_counter() - start, 2)
        self.record["stages"][name] = {"key": key, "seconds": seconds, "resumed": resumed, **facts}
        del self.record["begun"]
        write_json(self._path, self.record)
        return key

    def choose(self, name: str, decide: Callable[[], Any], *, until: str = "") -> Any:
        """Return what was decided when the run was first made, so that it goes on as it began; a JSON value.

        Until the stage named is done, it is decided anew by each process.
        """
        if name not in self.record["chosen"] or (until and until not in self.record["stages"]):
            self.record["chosen"][name] = decide()
            write_json(self._path, self.record)
        return self.record["chosen"][name]

    def facts(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a stage."""
        return dict(self.record["stages"][name])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage; of one that was stopped and went on, those since then, and it says so."""
        stages = self.record["stages"].items()
        return {f"{name}, since it went on" if stage["resumed"] else name: stage["seconds"] for name, stage in stages}


@contextmanager
def hold_folder(
    folder: Path, recipe: str, disposable: Sequence[str] = (), changeable: tuple[str, ...] = ()
) -> Iterator[None]:
    """Make a run's folder, or take up the one that this recipe began, and keep other processes out of it.

    Args:
        folder: The run's folder.
        recipe: The resolved recipe as YAML.
        disposable: Stages that cost little to run again: a run that has no other may have its recipe changed.
        changeable: How the settings begin that may be changed at any time; the stages that depend on them run again.

    Raises:
        UsageError: It holds another recipe's run, or other files, or another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(
            str(folder), "another process is at work in it", do="wait, or choose another --run-dir"
        ) from None
    with lock:
        for part in folder.glob(f".*{PART}"):
            remove(part)
        _claim(folder, recipe, disposable, changeable)
        yield


def check_space(folder: Path, needed: int) -> None:
    """Raise an error where a folder's disk has fewer bytes free than are needed."""
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        do = "free some space, or choose another disk with --run-dir and --cache-dir"
        raise UsageError(str(folder), f"{free / 1e9:.1f} GB free", f"{needed / 1e9:.1f} GB", do)


def list_versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def describe_hardware() -> dict[str, Any]:
    """Return the machine, as far as a result depends on it."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpus": gpus}


def _claim(folder: Path, recipe: str, disposable: Sequence[str], changeable: tuple[str, ...]) -> None:
    path = folder / RECIPE
    if not path.is_file():
        others = sorted(file.name for file in folder.iterdir() if file.name != _LOCK)
        if others:
            do = "choose an empty or new folder with --run-dir"
            raise UsageError(str(folder), f"no run of ours, but {', '.join(others[:3])}", "a new folder or a run's", do)
        write_text(path, recipe)
        return
    there, wanted = (_flatten(parse(text)) for text in (_complete(path), recipe))
    changed = [key for key in sorted(there | wanted) if there.get(key) != wanted.get(key)]
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if changed and not set(record.get("stages", {})) - set(disposable):
        remove(folder / "run.json")
        write_text(path, recipe)
    elif all(key.startswith(changeable) for key in changed):
        write_text(path, recipe)
    else:
        found = "; ".join(f"{key} {there.get(key)!r}, now {wanted.get(key)!r}" for key in changed[:5])
        do = "choose another --run-dir or name (what the teacher encoded is shared), or delete this one"
        raise UsageError(str(folder), f"the run of another recipe: {found}", "the same recipe", do)


def _complete(path: Path) -> str:
    """Return a run's recipe with the settings that came with later versions, which it has by default."""
    try:
        return dump_recipe(load_recipe(path))
    except RecipeError:  # one of its settings is no more
        return path.read_text(encoding="utf-8")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _git_commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None
