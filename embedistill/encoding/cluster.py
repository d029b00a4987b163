"""Encode on many machines with Ray Data: the windows of the local engine, each encoded by whichever worker is free.

The driver writes the texts of each window to a work folder at a place that all nodes reach; workers write shards there.
No text and no vector goes through Ray, and a shard that is there is never encoded again.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import torch

from embedistill.cache.remote import pull, push, remove_folder, send_file
from embedistill.cache.shards import SUFFIX, write_shard
from embedistill.cache.store import MANIFEST, EmbeddingCache, hash_texts
from embedistill.choices import Kind
from embedistill.encoding.cached import check_finite, describe_effort, iter_missing
from embedistill.encoding.local import Effort, LocalEncoder
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import read_json, write_text
from embedistill.progress import note, progress_bar
from embedistill.teacher import default_cache_dir, locate

_RUNNING = ".running"
_TEXTS = "texts.json"
_TRIES = 5


@dataclass(frozen=True)
class TeacherSpec:
    """Where a worker finds the teacher. Which one it has to be, and how it encodes, is in the cache's manifest.

    Attributes:
        name: A model id, or a folder that every node sees.
        revision: Commit, tag or branch on the Hub.
        models_dir: Folder for models that come out of wheels; None: in the cache folder of each node.
        window: Texts that are encoded together and stored together.
        prompts: What stands before texts of a kind, in place of what the teacher's configuration says.
    """

    name: str
    revision: str | None = None
    models_dir: str | None = None
    window: int = LocalEncoder.window
    prompts: Mapping[Kind, str] = field(default_factory=dict)


def encode_on_ray(
    texts: Iterable[str],
    kind: Kind,
    cache: EmbeddingCache,
    spec: TeacherSpec,
    *,
    store: str | None,
    workers: int,
    cores: int = 1,
    gpus: float = 0,
) -> int:
    """Encode the texts that the cache and the store lack, each once, on a Ray cluster, and return how many that were.

    What was encoded is in both afterwards. Shards are kept whatever happens to this process, the workers or the nodes:
    the next call encodes only what is lacking. Here, memory is some 250 bytes a text.

    Args:
        texts: Any number of texts.
        kind: What they are.
        cache: Where vectors are read from here.
        spec: Where workers find the teacher.
        store: Folder of all encodings that all nodes reach, a path or an address that fsspec knows; None: the cache's.
        workers: How many encode at the same time.
        cores: Cores of each.
        gpus: GPUs of each, or a share of one.

    Raises:
        UsageError: Ray is not installed, or the store's kind of address is not known.
        EmbedistillError: A worker has another teacher or cannot encode, or the store or the cluster cannot be reached.
    """
    url = _absolute(store or str(cache.folder.parent))
    pull(url, cache.key, cache.folder)
    push(url, cache.key, cache.folder)
    cache.refresh()
    windows = iter_missing(cache, _distinct(texts), spec.window)
    first = next(windows, None)
    if first is None:
        return 0
    ray = _import_ray()
    with cache.writing(), _work_folder(cache, url) as work:
        lacking = map(cache.missing, chain([first], windows))  # another process may have been at work
        tasks = _write_windows(filter(None, lacking), work)
        spec = replace(spec, name=_absolute(spec.name) if Path(spec.name).is_dir() else spec.name)
        manifest = read_json(cache.folder / MANIFEST)
        worker = {"spec": spec, "kind": kind, "manifest": manifest, "target": f"{url}/{cache.key}", "cores": cores}
        resources = {"num_cpus": cores, "num_gpus": gpus or None}
        effort, windows_of = _run(ray, tasks, worker, workers, resources) if tasks else (Effort(), {})
        pull(url, cache.key, cache.folder)
        cache.refresh()
    if effort.texts:
        spread = ", ".join(f"{n:,} by {node}" for node, n in sorted(windows_of.items()))
        kept = f"kept as {cache.storage}, cosine to fp32 {cache.worst_cosine():.6f} at worst"
        note(f"Teacher: {describe_effort(effort, None)}; windows: {spread}; {kept}")
    return effort.texts


@dataclass(frozen=True)
class Worker:
    """What encodes windows on a node; it loads the teacher once.

    Attributes:
        spec: Where to find the teacher.
        kind: What the texts are.
        manifest: Of the cache: what the teacher has to be.
        target: Folder of the shards, a path or an address.
        cores: Cores to use.
    """

    spec: TeacherSpec
    kind: Kind
    manifest: Mapping[str, Any]
    target: str
    cores: int

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a window; what goes wrong is returned, for Ray cannot carry every exception."""
        done = {"node": _name_node(), "failure": "", **asdict(Effort())}
        try:
            return {**done, **asdict(self._encode(task["item"]))}
        except EmbedistillError as error:
            failure = [error.where, error.found, error.expected, error.do]
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the run, and is said there
            do = "what is encoded is kept, so run the same command again"
            failure = [f"texts {task['item']}", f"{type(error).__name__}: {error}", "", do]
        return {**done, "failure": json.dumps(failure)}

    @functools.cached_property
    def _encoder(self) -> LocalEncoder:
        wanted = self.manifest
        models_dir = Path(self.spec.models_dir or default_cache_dir() / "models")
        located = locate(self.spec.name, self.spec.revision, models_dir=models_dir, prompts=self.spec.prompts)
        encoder = LocalEncoder(replace(located, name=wanted["teacher"]), getattr(torch, wanted["compute_dtype"]))
        found = encoder.describe(self.kind, wanted["storage_dtype"])
        for name in wanted:
            if found.get(name) != wanted[name]:
                do = "give all nodes the same model and the same versions"
                raise EmbedistillError(f"model {located.path}", f"{name} {found.get(name)}", str(wanted[name]), do)
        return encoder

    def _encode(self, task: str) -> Effort:
        _count_try(task)
        torch.set_num_threads(self.cores)
        with fsspec.open(f"{task}/{_TEXTS}", "r", encoding="utf-8") as stream:
            texts: list[str] = json.load(stream)
        encoder = self._encoder
        encoded, effort = encoder.run(encoder.prepare(texts, self.kind))
        check_finite(texts, encoded)
        with tempfile.TemporaryDirectory() as folder:
            name = write_shard(Path(folder), hash_texts(texts).tobytes(), encoded, self.manifest["storage_dtype"])
            send_file(Path(folder, name + SUFFIX), f"{self.target}/{name}{SUFFIX}")
        return effort


def _run(
    ray: Any, tasks: Mapping[str, int], worker: Mapping[str, Any], workers: int, resources: Mapping[str, Any]
) -> tuple[Effort, Mapping[str, int]]:
    """Have windows encoded; return what it took by the driver's clock, and how many windows each node encoded."""
    effort, windows_of, start = Effort(), Counter[str](), time.perf_counter()
    with (
        _connected(ray),
        progress_bar("teacher encodes", sum(tasks.values()), "texts") as advance,
        closing(_start(ray, list(tasks), worker, min(workers, len(tasks)), resources)) as results,
    ):
        for result in results:
            if result["failure"]:
                where, *rest = json.loads(result["failure"])
                raise EmbedistillError(f"node {result['node']}: {where}", *rest)
            effort += Effort(**{name: result[name] for name in asdict(effort)})
            windows_of[result["node"]] += 1
            advance(result["texts"])
    return replace(effort, seconds=time.perf_counter() - start), windows_of


def _start(
    ray: Any, tasks: Sequence[str], worker: Mapping[str, Any], workers: int, resources: Mapping[str, Any]
) -> Generator[dict[str, Any], None, None]:
    """Return what workers return, in the order in which windows are done."""
    there = ray.cluster_resources()
    wanted = {"CPU": workers * resources["num_cpus"], "GPU": workers * (resources["num_gpus"] or 0)}
    for name, number in wanted.items():
        if number > there.get(name, 0):
            found = f"the cluster has {there.get(name, 0):g} {name}s, and {workers} workers want {number:g}"
            note(f"Ray: {found}; those without wait for nodes to join")
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1  # a window takes as long as it takes
    pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
    done = dataset.map(Worker, fn_constructor_kwargs=dict(worker), compute=pool, **resources)
    results: Generator[dict[str, Any], None, None] = iter(done.iter_rows())
    return results


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Be connected to the cluster that $RAY_ADDRESS names or that runs here, else to one that is started here."""
    started, log = not ray.is_initialized(), logging.getLogger("ray.data")
    level = log.level
    try:
        if started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        log.setLevel(logging.ERROR)
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        do = "see Ray's logs; what is encoded is kept, so run the same command again"
        raise EmbedistillError("Ray", f"{type(error).__name__}: {error}", do=do) from error
    finally:
        log.setLevel(level)
        if started:
            ray.shutdown()


@contextmanager
def _work_folder(cache: EmbeddingCache, url: str) -> Iterator[str]:
    """Yield a folder for texts, gone afterwards; after a kill, its address is in the cache, and it goes now."""
    running = cache.folder / _RUNNING
    if running.is_file():
        _sweep(running.read_text(encoding="utf-8"))
    work = f"{url}/{cache.key}/work-{secrets.token_hex(4)}"
    write_text(running, work)
    try:
        yield work
    finally:
        if _sweep(work):
            running.unlink(missing_ok=True)


def _sweep(work: str) -> bool:
    try:
        remove_folder(work)
    except (EmbedistillError, OSError) as error:
        note(f"Texts of a run are left behind until the next: {error}")
        return False
    return True


def _write_windows(windows: Iterable[Sequence[str]], work: str) -> dict[str, int]:
    """Write the texts of each window to a folder of its own, and return how many are in each."""
    tasks = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, window in enumerate(windows):
            task, file = f"{work}/{number}", Path(folder, _TEXTS)
            file.write_text(json.dumps(window), encoding="utf-8")
            send_file(file, f"{task}/{_TEXTS}")
            tasks[task] = len(window)
    return tasks


def _count_try(task: str) -> None:
    """Stop where a window was begun too often: Ray would try for ever a window that kills its worker."""
    files, place = fsspec.url_to_fs(task)
    files.pipe_file(f"{place}/try-{secrets.token_hex(4)}", b"")
    files.invalidate_cache()
    if len(files.ls(place, detail=False)) - 1 > _TRIES:
        found = f"{_TRIES} workers began them and died"
        raise EmbedistillError(f"texts {task}", found, do="see whether they need more memory than a worker has")


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        digest = hash_texts([text]).tobytes()[:16]
        if digest not in seen:
            seen.add(digest)
            yield text


def _absolute(place: str) -> str:
    return place.rstrip("/") if "://" in place else str(Path(place).expanduser().absolute())


def _name_node() -> str:
    ray = _import_ray()
    return f"{platform.node()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError("engine ray", str(error), "Ray Data", "pip install 'embedistill[ray]'") from error
    return ray
