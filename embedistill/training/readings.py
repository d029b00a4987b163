"""How a student in training does on texts that are kept out of it: what is logged, kept and stopped by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_model, save_model
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embedistill.errors import LostError
from embedistill.files import read_json, remove, write_json, written_aside
from embedistill.progress import note

Criterion = Literal["cosine", "similarity"]
DEV, TRAINED = "dev_", "trained_"
"""How the names of readings begin in the log: on texts that are kept out of the training, or on some of its own."""

_COLLAPSED = 0.25  # of the spread or rank that the teacher or the untrained student has, whichever is less
_DIVERGED = 0.7  # of the untrained student's cosine, or similarity, to its teacher
_PATIENCE = 2  # readings that find a student lost before it is given up


@dataclass(frozen=True)
class Dev:
    """What a student in training is watched on.

    Attributes:
        texts: Texts, as the student sees them.
        vectors: The teacher's vectors of them, (n_texts, dim).
        score: Scores the student in another way; logged, and nothing else.
        kept_out: Whether they are texts that are not trained on. Others tell a student that is lost, and not the best.
    """

    texts: Sequence[str]
    vectors: npt.NDArray[np.float32]
    score: Callable[[SentenceTransformer], float] | None = None
    kept_out: bool = True

    def read(self, student: SentenceTransformer) -> Reading:
        """Encode the texts, and return how the student does; it is in training mode again afterwards."""
        vectors = student.encode(list(self.texts), prompt="", normalize_embeddings=True, show_progress_bar=False)
        student.train()
        return measure(vectors, self.vectors)

    def score_too(self, student: SentenceTransformer) -> dict[str, float]:
        """Return the other score by its name in the log, if there is one; the student is in training mode again."""
        scores = {"dev_score": self.score(student)} if self.score else {}
        student.train()
        return scores


@dataclass(frozen=True)
class Reading:
    """What is seen of a student at one step.

    Attributes:
        cosine: Mean cosine to the teacher's vector of the same text.
        similarity: Pearson correlation of the cosines of all pairs of texts with the teacher's.
        spread: 1 - the mean cosine of all pairs of texts; 0 where all have one vector.
        rank: Effective rank of the vectors: exp of the entropy of their singular values (Roy and Vetterli, 2007).
    """

    cosine: float
    similarity: float
    spread: float
    rank: float


def measure(vectors: npt.NDArray[np.float32], targets: npt.NDArray[np.float32]) -> Reading:
    """Compare unit vectors of a student with its teacher's of the same texts, at least three, both (n_texts, dim)."""
    if not np.isfinite(vectors).all():
        return Reading(*[math.nan] * 4)
    pairs = np.triu_indices(len(vectors), 1)
    own, wanted = (vectors @ vectors.T)[pairs], (targets @ targets.T)[pairs]
    values = np.linalg.svd(vectors, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return Reading(
        cosine=float((vectors * targets).sum(1).mean()),
        similarity=float(np.corrcoef(own, wanted)[0, 1]) if own.std() > 0 else 0.0,
        spread=float(1 - own.mean()),
        rank=float(np.exp(-(shares * np.log(shares)).sum())),
    )


def find_fault(now: Reading, untrained: Reading, teacher: Reading, criterion: Criterion = "cosine") -> str | None:
    """Return what went wrong with a student, in words, with the figures that tell it; None: nothing."""
    if math.isnan(now.cosine):
        return "gives vectors that are not finite"
    for name, what in (("spread", "texts have nearly one vector"), ("rank", "vectors fill a few directions only")):
        value, least = getattr(now, name), _COLLAPSED * min(getattr(untrained, name), getattr(teacher, name))
        if value < least:
            return f"collapsed, {what}: {name} {value:.3g}, where {getattr(untrained, name):.3g} was at the start"
    value, start = getattr(now, criterion), getattr(untrained, criterion)
    if value < start - (1 - _DIVERGED) * abs(start):
        return f"diverged: {criterion} to the teacher's {value:.3f}, where {start:.3f} was at the start"
    return None


@dataclass(eq=False)
class KeepBest(TrainerCallback):
    """Reads a student every so many steps, keeps its best weights in a folder, and stops where it is lost.

    Readings go to the trainer's log, and so into its checkpoints. The best step is the one nearest to the teacher by
    the criterion, step 0 among them only with `from_the_start`; on texts that it is trained on none is told. A student
    that is found lost by two readings in a row, or by the last one, is given up.
    """

    student: SentenceTransformer
    dev: Dev
    criterion: Criterion
    every: int
    dtype: torch.dtype
    folder: Path
    from_the_start: bool = True
    log: Callable[[dict[str, float]], None] = lambda entry: None
    _faults: int = 0

    @cached_property
    def _teacher(self) -> Reading:
        return measure(self.dev.vectors, self.dev.vectors)

    @property
    def _described(self) -> Path:
        return self.folder / "best.json"

    @property
    def _weights(self) -> Path:
        return self.folder / "best.safetensors"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the untrained student, where training does not go on from a checkpoint."""
        if state.global_step == 0:
            remove(self._described)
            self._read(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the student where it is time to."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._read(state, control)

    def _read(self, state: TrainerState, control: TrainerControl) -> None:
        reading = self._look()
        entry = {self._prefix + name: value for name, value in asdict(reading).items()}
        due = control.should_log
        self.log(entry | self.dev.score_too(self.student))
        control.should_log = due  # a log of ours is not the one that the trainer is due
        if self.dev.kept_out:
            self._keep_if_best(getattr(reading, self.criterion), state)
        self._stop_if_lost(reading, state)

    def _keep_if_best(self, score: float, state: TrainerState) -> None:
        best = read_json(self._described) if self._described.is_file() else None
        only_start = best and best["step"] == 0 and not self.from_the_start
        if math.isfinite(score) and (best is None or only_start or score > best["score"]):
            self._keep(score, state.global_step)

    def _look(self) -> Reading:
        with torch.autocast(self.student.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.dev.read(self.student)

    def _keep(self, score: float, step: int) -> None:
        with written_aside(self._weights) as path:
            save_model(self.student, str(path))
        write_json(self._described, {"score": score, "step": step})

    def _stop_if_lost(self, reading: Reading, state: TrainerState) -> None:
        first = next(entry for entry in state.log_history if f"{self._prefix}cosine" in entry)
        untrained = Reading(**{name: first[self._prefix + name] for name in asdict(reading)})
        fault = find_fault(reading, untrained, self._teacher, self.criterion)
        self._faults = self._faults + 1 if fault else 0
        if fault and (self._faults == _PATIENCE or state.global_step == state.max_steps):
            do = "lower training.learning_rate"
            if self.criterion != "cosine":
                do += ", or give training.objectives.embedding a weight"
            if self.dev.kept_out and self._described.is_file():
                do += f"; the weights of step {read_json(self._described)['step']}, the best, are in {self._weights}"
            raise LostError(f"training, step {state.global_step}", f"the student {fault}{_tell_terms(state)}", do=do)

    @property
    def _prefix(self) -> str:
        return DEV if self.dev.kept_out else TRAINED

    def restore(self) -> None:
        """Give the student its best weights back, where they were told."""
        if not self.dev.kept_out:
            return
        best = read_json(self._described)
        load_model(self.student, str(self._weights))
        note(f"Kept: the weights of step {best['step']:,}, {self.criterion} {best['score']:.4f} on texts kept out")
        if best["step"] == 0:
            note("No step was better than the untrained student: lower training.learning_rate, or train for longer")


def _tell_terms(state: TrainerState) -> str:
    """Return how the terms of the loss went, as far as they are logged."""
    logged = [entry for entry in state.log_history if "loss" in entry]
    if len(logged) < 2:
        return ""
    first, last = logged[0], logged[-1]
    others = {"loss", "grad_norm", "learning_rate", "epoch", "step", "temperature"}
    terms = ", ".join(f"{name} {first[name]:.3g} to {last[name]:.3g}" for name in last if name not in others)
    return f"; from step {first['step']} to {last['step']}: {terms}"
