"""A teacher with its cache: every text is encoded once, ever."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from embedistill.cache.shards import Encoded
from embedistill.cache.store import EmbeddingCache, Rows
from embedistill.choices import Kind, Storage
from embedistill.encoding.hardware import measure_products
from embedistill.encoding.local import Effort
from embedistill.errors import EmbedistillError
from embedistill.progress import note, progress_bar
from embedistill.teacher import Embeddings

_WORTH_MEASURING = 1000


class Encoder(Protocol):
    """What makes vectors of texts: a model here, or one behind an endpoint."""

    window: int
    dtype: torch.dtype

    def describe(self, kind: Kind, storage: Storage) -> dict[str, Any]:
        """Return everything that changes a vector."""

    def check_same(self, folder: Path) -> None:
        """Make sure that it is the teacher that filled a cache, as far as the key does not tell."""

    def prepare(self, texts: Sequence[str], kind: Kind) -> Any:
        """Do what can be done ahead, in another thread."""

    def run(self, prepared: Any, advance: Callable[[int], None]) -> tuple[Encoded, Effort]:
        """Encode what was prepared, telling `advance` how many texts are done."""


class CachedTeacher:
    """A teacher that encodes every text once: what its cache holds is read from there.

    Args:
        encoder: The teacher.
        cache_dir: Folder of the caches of all teachers.
        storage: Number format to keep vectors in.
    """

    def __init__(self, encoder: Encoder, cache_dir: Path, storage: Storage = "float16") -> None:
        self.encoder, self._cache_dir, self._storage = encoder, cache_dir, storage
        self._caches: dict[str, EmbeddingCache] = {}
        self._by_kind: dict[Kind, EmbeddingCache] = {}

    def cache(self, kind: Kind = "plain") -> EmbeddingCache:
        """Return the cache of texts of a kind; kinds with the same prompt share one."""
        if kind not in self._by_kind:
            cache = EmbeddingCache(self._cache_dir, self.encoder.describe(kind, self._storage))
            self.encoder.check_same(cache.folder)
            self._by_kind[kind] = self._caches.setdefault(cache.key, cache)
        return self._by_kind[kind]

    def encode_missing(self, texts: Iterable[str], kind: Kind = "plain") -> int:
        """Encode the texts that the cache lacks, each once, and return how many that were.

        Any number of texts is encoded in the memory of two windows. A kill loses at most the window at work, and the
        next call goes on with the same window. Another process at work on the same cache is waited for.
        """
        cache, encoder, effort = self.cache(kind), self.encoder, Effort()
        total = len(cache.missing(texts)) if isinstance(texts, Sequence) else None
        start = time.perf_counter()
        with ExitStack() as stack:
            windows = iter_missing(cache, texts, encoder.window)
            first = next(windows, None)
            if first is None:
                return 0
            stack.enter_context(cache.writing())
            windows = map(cache.missing, chain([first], windows))  # another process may have been at work
            advance = stack.enter_context(progress_bar("teacher encodes", total, "texts"))
            ahead = stack.enter_context(ThreadPoolExecutor(1))
            at_work: tuple[Sequence[str], Future[Any]] | None = None
            for window in filter(None, windows):
                following = (window, ahead.submit(encoder.prepare, window, kind))
                if at_work:
                    effort += self._finish(cache, *at_work, advance)
                at_work = following
            if at_work:
                effort += self._finish(cache, *at_work, advance)
        if effort.texts:
            effort = replace(effort, seconds=time.perf_counter() - start)
            peak = measure_products()[encoder.dtype] if effort.flops and effort.texts >= _WORTH_MEASURING else None
            kept = f"kept as {cache.storage}, cosine to fp32 {cache.worst_cosine():.6f} at worst"
            note(f"Teacher: {describe_effort(effort, peak)}; {kept}")
        return effort.texts

    def vectors(self, texts: Sequence[str], kind: Kind = "plain") -> Embeddings:
        """Return the vectors of texts, shape (n_texts, dim), encoding those that the cache lacks."""
        self.encode_missing(texts, kind)
        return self.cache(kind).lookup(texts)

    def open_targets(self, texts: Mapping[Kind, Sequence[str]]) -> Callable[[Rows], Embeddings]:
        """Return what reads vectors (n, dim) by number, counted through the texts of all kinds in turn.

        Raises:
            EmbedistillError: A text has no vector.
        """
        caches = [self.cache(kind) for kind in texts]
        rows = [cache.locate(some) for cache, some in zip(caches, texts.values(), strict=True)]
        ends = np.cumsum([len(some) for some in rows])

        def read(numbers: Rows) -> Embeddings:
            vectors = np.empty((len(numbers), caches[0].dim), np.float32)
            kinds = np.searchsorted(ends, numbers, side="right")
            for kind in np.unique(kinds):
                here = kinds == kind
                start = ends[kind] - len(rows[kind])
                vectors[here] = caches[kind].read(rows[kind][numbers[here] - start])
            return vectors

        return read

    def _finish(
        self, cache: EmbeddingCache, texts: Sequence[str], prepared: Future[Any], advance: Callable[[int], None]
    ) -> Effort:
        encoded, effort = self.encoder.run(prepared.result(), advance)
        check_finite(texts, encoded)
        cache.add(texts, encoded)
        return effort


def iter_missing(cache: EmbeddingCache, texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the distinct texts without a vector, in order, `size` at a time.

    What is yielded may be stored up to two windows later: it is not yielded again.
    """
    window: dict[str, None] = {}
    at_work: deque[set[str]] = deque(maxlen=2)
    iterator = iter(texts)
    while chunk := list(islice(iterator, size)):
        for text in cache.missing(chunk):
            if any(text in earlier for earlier in at_work):
                continue
            window[text] = None
            if len(window) == size:
                at_work.append(set(window))
                yield list(window)
                window = {}
    if window:
        yield list(window)


def describe_effort(effort: Effort, peak: float | None) -> str:
    """Say what an encoding took; `peak` is the flop/s that the machine's products reach."""
    parts = [f"{effort.texts:,} texts in {effort.seconds:,.1f} s", f"{effort.texts / effort.seconds:,.1f} texts/s"]
    if effort.tokens:
        parts += [f"{effort.tokens / effort.seconds:,.0f} tokens/s", f"padding {effort.waste:.1%}"]
    if peak:
        rate = effort.flops / effort.seconds
        parts.append(f"{rate / 1e9:,.0f} GFLOP/s, {rate / peak:.0%} of what this machine's products reach")
    return ", ".join(parts)


def check_finite(texts: Sequence[str], encoded: Encoded) -> None:
    """Stop where most vectors are not finite: then it is the number format, not a text."""
    broken = np.flatnonzero(~np.isfinite(encoded.norms))
    if len(broken) * 2 > len(texts):
        found = f"{len(broken)} of {len(texts)} vectors are not finite, the first of {texts[broken[0]]!r:.80}"
        raise EmbedistillError("teacher", found, do="set teacher.dtype=float32, or choose another teacher")
