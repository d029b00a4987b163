"""Which texts a student sees in which step, and what of the teacher comes with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from tokenizers import Tokenizer

from embedistill.corpus.selection import find_centres
from embedistill.errors import UsageError
from embedistill.student.head import Matrix, fit_pca, project

Rows = npt.NDArray[np.int64]
Run = tuple[Rows, np.random.Generator]
Targets = Callable[[Rows], Matrix]
"""From row numbers (batch,) to the teacher's vectors in the student's space (batch, dim)."""

_RUN_BATCHES = 8
_COUNTED, _REPEATS = 20_000, 8
_SAMPLE = 1_000
_FIRST_SHARE = 0.2  # of the texts, the easiest, at the first step of a curriculum
_PCA_SAMPLE, _SHORT, _CHUNK = 20_000, 128, 8192
_CLUSTERED = 50_000  # texts from which on neighbours are looked for in the nearest clusters only


@dataclass(frozen=True)
class Batching:
    """How texts are put into batches.

    Attributes:
        size: Texts of a batch, at most.
        tokens: Tokens of a batch, at most, as estimated from its characters, unless it has a text for each part and no
            more; None: no bound.
        seed: Seed of the order.
        parts: Each batch comes in so many of the same size: a part a process, or a part after the other.
        companions: Rows of texts that are put into the batch of each text, in the place of others, (n_texts, any
            number), -1: none.
        neighbours: The same, of which one is drawn by chance.
        difficulty: Of each text, (n_texts,): easy texts come first, Platanios et al. (2019); None: any order.
    """

    size: int
    tokens: int | None = None
    seed: int = 0
    parts: int = 1
    companions: Rows | None = None
    neighbours: Rows | None = None
    difficulty: Matrix | None = None


class BudgetSampler(DefaultBatchSampler):
    """The batches of a whole training: texts by chance, as many as fit into the budgets of texts and tokens.

    Texts of like length are not put together, which would save padding: such batches pull a student now to short texts,
    now to long ones, and undo what it knows (`eval/LOG.md`). Padding is saved in the forward pass.

    Every epoch is a new permutation. With difficulties there are no epochs: at a share p of the steps, texts are drawn
    from the sqrt(f^2 + p (1 - f^2)) of all that are easiest, f being a fifth.

    Args:
        dataset: The texts, by row.
        lengths: Tokens of each text, shape (n_texts,).
        batching: How to batch.
        steps: How many batches there are in all; each comes in as many parts as asked for.
        settings: What sentence-transformers' samplers are made with.
    """

    def __init__(self, dataset: Dataset, *, lengths: Matrix, batching: Batching, steps: int, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.batch_size = None  # batches differ in size, which accelerate has to know
        self.lengths, self.batching, self.steps = lengths, batching, steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each part of each batch.

        Raises:
            UsageError: No batch within the budgets has a text for each part.
        """
        self._done = 0
        for batch in cut_batches(self._runs(), self.lengths, self.batching):
            yield from batch
            self._done += 1
            if self._done == self.steps:
                return

    def __len__(self) -> int:
        """Return how many parts there are in all."""
        return self.steps * self.batching.parts

    def _runs(self) -> Iterator[Run]:
        """Yield rows in random order: an epoch's, or, in a curriculum, those of some batches."""
        by_ease = None if self.batching.difficulty is None else np.argsort(self.batching.difficulty, kind="stable")
        for number in itertools.count():
            random = np.random.default_rng([self.batching.seed, number])
            if by_ease is None:
                yield random.permutation(len(self.lengths)), random
            else:
                share = math.sqrt(_FIRST_SHARE**2 + self._done / self.steps * (1 - _FIRST_SHARE**2))
                allowed = by_ease[: max(2, math.ceil(share * len(by_ease)))]
                yield random.permutation(allowed)[: self._count_texts(allowed) * _RUN_BATCHES], random

    def _count_texts(self, rows: Rows) -> int:
        """Return how many of some texts fit into a batch, for each of its parts one at the very least."""
        fitting = (self.batching.tokens or math.inf) / max(1.0, float(self.lengths[rows].mean()))
        return max(self.batching.parts, int(min(self.batching.size, fitting)))


def cut_batches(runs: Iterable[Run], lengths: Matrix, batching: Batching) -> Iterator[list[list[int]]]:
    """Yield batches of rows within the budgets, no row twice in one, each in its parts.

    What a run of rows leaves over begins the next run's first batch, unless the whole run is less than a batch.

    Args:
        runs: Rows in their order, and the generator to draw their neighbours with.
        lengths: Tokens of each text, shape (n_texts,).
        batching: The budgets, and which texts join others.

    Raises:
        UsageError: No batch of a run has a text for each part.
    """
    filling = _Filling(lengths, batching)
    for rows, random in runs:
        is_held = np.isin(rows, list(filling.held))
        yielded = False
        for row in [*rows[~is_held].tolist(), *rows[is_held].tolist()]:
            if row in filling.held:
                continue  # it has joined another
            joined = list(dict.fromkeys([row, *_accompany(row, batching, random)]))
            while filling.is_over(joined) and (batch := filling.take()):
                yield batch
                yielded = True
            filling.add(joined)
        if not yielded:
            batch = filling.take()
            if not batch:
                found = f"no batch of {batching.parts} texts or more, for {batching.parts} parts"
                raise UsageError("training.batch_size, batch_tokens", found, do="raise them, or use fewer processes")
            yield batch


def count_batches(lengths: Matrix, batching: Batching) -> float:
    """Return how many batches an epoch comes to on average, as some texts tell."""
    random = np.random.default_rng(batching.seed)
    some = random.permutation(len(lengths))[:_COUNTED]
    repeats = max(1, min(_REPEATS, _COUNTED // len(some)))
    n_batches = sum(1 for _ in cut_batches([(some, random)] * repeats, lengths, batching))
    return n_batches / repeats * len(lengths) / len(some)


class _Filling:
    """A batch that is being filled: groups of a text and those that joined it."""

    def __init__(self, lengths: Matrix, batching: Batching) -> None:
        self._lengths, self._batching = lengths, batching
        self._keep([])

    def _keep(self, groups: list[list[int]]) -> None:
        self._groups, self.held = groups, {row for group in groups for row in group}
        self._tokens = float(self._lengths[list(self.held)].sum()) if groups else 0.0

    def is_over(self, rows: list[int]) -> bool:
        """Say whether it would be beyond its budgets with some rows more."""
        fresh = [row for row in rows if row not in self.held]
        tokens = self._tokens + float(self._lengths[fresh].sum())
        too_many = len(self.held) + len(fresh) > self._batching.size
        return too_many or (self._batching.tokens is not None and tokens > self._batching.tokens)

    def add(self, rows: list[int]) -> None:
        """Put a group into it."""
        fresh = [row for row in rows if row not in self.held]
        self._groups.append(fresh)
        self.held.update(fresh)
        self._tokens += float(self._lengths[fresh].sum())

    def take(self) -> list[list[int]]:
        """Take a batch out, in its parts, and keep what is over; nothing where there is too little for all parts."""
        batch, rest = _split(self._groups, self._batching)
        if batch:
            self._keep(rest)
        return _deal(batch, self._batching.parts) if batch else []


def _split(groups: list[list[int]], batching: Batching) -> tuple[list[list[int]], list[list[int]]]:
    """Return groups of a batch that come to a multiple of the parts, and those that are over.

    Of two, four or eight parts, one or more: batches that have eight texts for each are the same for one process. Where
    texts have companions, each part has room for whole pairs.
    """
    n_texts, n_parts = sum(map(len, groups)), batching.parts
    common = next(number for number in (8, 4, 2, 1) if n_texts >= 8 * number or number == 1)
    multiples = [common, n_parts] if common % n_parts == 0 else [n_parts]
    if batching.companions is not None:
        multiples = [2 * multiples[0], *multiples]
    for multiple in multiples:
        for wanted in range(n_texts // multiple * multiple, 0, -multiple):
            over = set[int]()
            excess = n_texts - wanted
            for number in range(len(groups) - 1, -1, -1):
                if len(groups[number]) <= excess:
                    over.add(number)
                    excess -= len(groups[number])
            if not excess:
                kept = [group for number, group in enumerate(groups) if number not in over]
                return kept, [groups[number] for number in sorted(over)]
    rows = [[row] for group in groups for row in group]
    cut = len(rows) // n_parts * n_parts
    return rows[:cut], rows[cut:]


def _deal(groups: list[list[int]], n_parts: int) -> list[list[int]]:
    """Return parts of the same size; a group stays together where one has room for it."""
    size = sum(map(len, groups)) // n_parts
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    for group in sorted(groups, key=len, reverse=True):
        emptiest = min(parts, key=len)
        whole = len(emptiest) + len(group) <= size
        for some in [group] if whole else [[row] for row in group]:
            min(parts, key=len).extend(some)
    return parts


def _accompany(row: int, batching: Batching, random: np.random.Generator) -> list[int]:
    """Return the rows that join a row's batch."""
    found = [] if batching.companions is None else batching.companions[row].tolist()
    if batching.neighbours is not None:
        found.append(int(random.choice(batching.neighbours[row])))
    return [one for one in found if one >= 0]


def count_tokens(student: SentenceTransformer, texts: Sequence[str]) -> Matrix:
    """Return the tokens of texts as the student sees them, estimated from their characters, shape (n_texts,)."""
    characters = np.array([len(text) for text in texts], np.float32)
    tokenizer = getattr(student, "tokenizer", None)
    sample = list(texts[:: max(1, len(texts) // _SAMPLE)])
    if isinstance(tokenizer, Tokenizer):  # a static student's
        n_tokens = sum(len(found.ids) for found in tokenizer.encode_batch(sample, add_special_tokens=False))
    elif callable(tokenizer):
        n_tokens = sum(len(ids) for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        return characters
    estimated = characters * (n_tokens / max(1, sum(map(len, sample)))) + 2
    limit = student.max_seq_length
    return np.minimum(estimated, limit).astype(np.float32) if limit else estimated


def find_neighbours(vectors: Matrix, n_neighbours: int) -> Rows:
    """Return the rows of the nearest other vectors by cosine, shape (n_texts, n_neighbours); -1 where there are fewer.

    By an exact search, or, from 50,000 vectors on, in the nearest 16 of sqrt(n_texts) clusters.

    Args:
        vectors: Unit vectors, (n_texts, dim).
        n_neighbours: How many of each.
    """
    flat = faiss.IndexFlatIP(vectors.shape[1])
    index: Any = flat
    if len(vectors) >= _CLUSTERED:
        index = faiss.IndexIVFFlat(flat, vectors.shape[1], int(math.sqrt(len(vectors))), faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:: max(1, len(vectors) // _CLUSTERED)])
        index.nprobe = 16
    index.add(vectors)
    _, found = index.search(vectors, n_neighbours + 1)
    itself = found == np.arange(len(vectors))[:, None]
    itself[~itself.any(1), -1] = True  # equal vectors can push a text out of its own list
    rows: Rows = found[~itself].reshape(len(vectors), n_neighbours).astype(np.int64)
    return rows


def shorten(targets: Targets, n_texts: int) -> Matrix:
    """Return unit vectors of at most 128 dimensions that have nearly the similarities of the teacher's, all in memory.

    The uncentred PCA of a sample: all-mpnet-base-v2 keeps 99.5 % of its STS figures in 128 dimensions.
    """
    sample = targets(np.linspace(0, n_texts - 1, min(n_texts, _PCA_SAMPLE)).astype(np.int64))
    projection = fit_pca(sample, _SHORT) if sample.shape[1] > _SHORT else None
    starts = range(0, n_texts, _CHUNK)
    return np.concatenate(
        [project(targets(np.arange(start, min(start + _CHUNK, n_texts))), projection) for start in starts]
    )


def spread_from_centres(vectors: Matrix) -> Matrix:
    """Return how far each of some unit vectors (n_texts, dim) is from the nearest of sqrt(n_texts) k-means centres.

    1 - cosine, shape (n_texts,).
    """
    centres = find_centres(vectors, max(1, int(math.sqrt(len(vectors)))))
    found: Matrix = 1 - centres.search(vectors, 1)[0][:, 0]
    return found


@dataclass(kw_only=True)
class TargetCollator(SentenceTransformerDataCollator):
    """Tokenise the texts of a batch, and put what the loss needs of the teacher in place of their row numbers."""

    targets: Targets
    partners: Rows | None = None
    kin: Rows | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the trainer's batch.

        Its labels are the teacher's vectors (batch, dim), the place in the batch of each text's positive, (batch,), -1
        where it has none, and who is kin, (batch,).
        """
        batch: dict[str, Any] = super().__call__(features)
        rows = batch["label"].numpy()
        batch["label"] = {
            "vectors": torch.from_numpy(self.targets(rows)),
            "positives": torch.from_numpy(self._find_positives(rows)),
            "kin": torch.from_numpy(rows if self.kin is None else self.kin[rows]),
        }
        return batch

    def _find_positives(self, rows: Rows) -> Rows:
        if self.partners is None:
            return np.full(len(rows), -1)
        places = {row: place for place, row in enumerate(rows.tolist())}
        return np.array([places.get(row, -1) for row in self.partners[rows].tolist()], np.int64)
