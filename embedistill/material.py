"""The material of a run: its corpus, the texts that are trained on, and the teacher's vectors of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from embedistill.choices import Fault, Kind
from embedistill.corpus.records import Record, Split, load_corpus
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.targets import find_faults
from embedistill.errors import UsageError
from embedistill.files import read_json
from embedistill.progress import note
from embedistill.student.head import Matrix
from embedistill.teacher import find_prompt
from embedistill.teaching import texts_by_kind

CORPUS, TARGETS = "corpus.parquet", "targets.json"
_SAMPLE_TEXTS = 20_000
_DEV_SHARE, _FEWEST_DEV = 20, 8
_EXAMPLES = 10


class Material:
    """What a run is taught on. It is read from the run's folder when it is first asked for.

    Args:
        folder: The run's, which has its corpus and, once the teacher has encoded it, the faults of its vectors.
        teacher: The cached teacher.
        drop: Faults of vectors that keep their texts out of training.
        n_watched: How many texts are kept out of training, at most a twentieth, to watch the student on.
        seed: Of the draws.
    """

    def __init__(
        self, folder: Path, teacher: CachedTeacher, *, drop: Sequence[Fault], n_watched: int, seed: int
    ) -> None:
        self._folder, self._teacher = folder, teacher
        self._drop, self._n_watched, self._seed = list(drop), n_watched, seed

    @cached_property
    def corpus(self) -> dict[Split, list[Record]]:
        """The records by what they are for."""
        return load_corpus(self._folder / CORPUS)

    @cached_property
    def encoded(self) -> dict[Kind, list[str]]:
        """The distinct texts that the teacher encodes for training, by kind."""
        return texts_by_kind(self.corpus["train"])

    @property
    def trained(self) -> dict[Kind, list[str]]:
        """Those of them that the student is trained on."""
        return self._usable[0]

    @property
    def watched(self) -> dict[Kind, list[str]]:
        """Those of them that are kept out of training, to watch the student on."""
        return self._usable[1]

    @cached_property
    def _usable(self) -> tuple[dict[Kind, list[str]], dict[Kind, list[str]]]:
        dropped = {kind: set(numbers) for kind, numbers in read_json(self._folder / TARGETS)["dropped"].items()}
        usable = [
            (kind, text)
            for kind, texts in self.encoded.items()
            for number, text in enumerate(texts)
            if number not in dropped[kind]
        ]
        n_dev = min(self._n_watched, len(usable) // _DEV_SHARE)
        n_dev = n_dev if n_dev >= _FEWEST_DEV else 0
        dev = set(np.random.default_rng(self._seed).permutation(len(usable))[:n_dev].tolist())
        trained: dict[Kind, list[str]] = {kind: [] for kind in self.encoded}
        watched: dict[Kind, list[str]] = {kind: [] for kind in self.encoded}
        for number, (kind, text) in enumerate(usable):
            (watched if number in dev else trained)[kind].append(text)
        return trained, watched

    def check_targets(self) -> dict[str, Any]:
        """Count the faults of the vectors, with examples, and say which texts are not trained on.

        Raises:
            UsageError: Fewer than two texts are left to train on.
        """
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        dropped: dict[Kind, list[int]] = {}
        for kind, texts in self.encoded.items():
            faults = find_faults(self._teacher.cache(kind), texts)
            counts.update({fault: len(numbers) for fault, numbers in faults.items()})
            for fault, numbers in faults.items():
                examples.setdefault(fault, []).extend(texts[number][:200] for number in numbers[:_EXAMPLES])
            dropped[kind] = sorted({int(number) for fault in self._drop for number in faults[fault]})
        kept = sum(len(texts) - len(dropped[kind]) for kind, texts in self.encoded.items())
        note(f"Targets: {kept:,} kept; " + ", ".join(f"{count:,} {fault}" for fault, count in counts.items()))
        if kept < 2:
            found = f"{kept} texts left to train on"
            raise UsageError("encoding.drop", found, "two at the very least", f"see {self._folder / TARGETS}")
        return {"counts": counts, "examples": examples, "rules": self._drop, "dropped": dropped}

    def sample(self, model: SentenceTransformer) -> tuple[list[str], Matrix]:
        """Return some training texts as a model sees them, in random order, and the teacher's vectors of them."""
        inputs, vectors = [], []
        share = _SAMPLE_TEXTS / sum(len(texts) for texts in self.trained.values())
        for kind, texts in self.trained.items():
            some = texts[: math.ceil(share * len(texts))]
            inputs += [find_prompt(model, kind) + text for text in some]
            vectors.append(self._teacher.vectors(some, kind))
        order = np.random.default_rng(self._seed).permutation(len(inputs))
        return [inputs[number] for number in order], np.concatenate(vectors)[order]
