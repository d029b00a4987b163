"""What accompanies a training: progress, the log, whole checkpoints, a stop where weights are lost, a stopwatch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embedistill.errors import EmbedistillError, LostError
from embedistill.files import remove, write_text
from embedistill.ranks import rank, world_size
from embedistill.training.objectives import DistillationLoss
from embedistill.training.readings import DEV, TRAINED

_COMPLETE = "complete"
_LOSS_STATE = "loss.safetensors"
_CALIBRATION_SECONDS = 10.0
_CALIBRATION_STEPS = 20  # of several processes, which have to stop at the same step


class Watch(TrainerCallback):
    """Progress, the log on disk, whole checkpoints, and a stop where the loss is lost."""

    def __init__(self, advance: Callable[[int], None], log_path: Path, loss: DistillationLoss, folder: Path) -> None:
        self.advance, self.log_path, self.loss, self.folder = advance, log_path, loss, folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from a checkpoint with what the loss itself had learnt."""
        self.advance(state.global_step)
        kept = self._checkpoint(state) / _LOSS_STATE
        if kept.is_file():
            self.loss.load_state_dict(load_file(kept), strict=False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the loss how far the training is."""
        self.loss.step, self.loss.progress = state.global_step + 1, state.global_step / max(1, state.max_steps - 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show that a step is done."""
        self.advance(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the log, unless it shows that something is not finite.

        Raises:
            EmbedistillError: It does.
        """
        entry = state.log_history[-1]
        if "loss" in entry and {"similarity", "reverse_similarity", "contrastive", "pairs"} & set(self.loss.weights):
            temperature = self.loss.temperature
            entry["temperature"] = float(temperature.detach() if isinstance(temperature, torch.Tensor) else temperature)
        last = {name: value for name, value in entry.items() if not name.startswith((DEV, TRAINED))}
        lost = [name for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)]
        if lost:
            raise self._not_finite(state, lost)
        if state.is_world_process_zero:
            write_text(self.log_path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark a checkpoint as whole, unless its weights are not finite.

        Raises:
            EmbedistillError: They are not.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.loss.parameters()):
            raise self._not_finite(state, ["weights"])  # before further ones take the place of the last good checkpoint
        if state.is_world_process_zero:
            if own := self.loss.own_state():
                save_file(own, self._checkpoint(state) / _LOSS_STATE)
            write_text(self._checkpoint(state) / _COMPLETE, "")

    def _checkpoint(self, state: TrainerState) -> Path:
        return self.folder / f"checkpoint-{state.global_step}"

    def _not_finite(self, state: TrainerState, logged: list[str]) -> EmbedistillError:
        """Return an error that names the step and what was the first to be lost in it."""
        step, names = self.loss.find_lost() or (state.global_step, logged)
        first = [name for name in names if name.endswith("vectors")][:1] or names  # of which the terms follow
        where, found = f"training, step {step}", f"{', '.join(first)} not finite"
        if "teacher" in first[0]:
            return EmbedistillError(where, found, do="embedistill cache verify finds what is damaged in the cache")
        return LostError(where, found, do="lower training.learning_rate, or set training.dtype=float32")


class Stopwatch(TrainerCallback):
    """Times steps after the first two, and stops when it has seen enough."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())
        long = self.times[-1] - self.times[min(1, len(self.times) - 1)] > _CALIBRATION_SECONDS
        if len(self.times) == _CALIBRATION_STEPS if world_size() > 1 else len(self.times) > 3 and long:
            control.should_training_stop = True

    @property
    def seconds_per_step(self) -> float:
        """The mean, without the first two."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that was written to its end, and remove those that were not."""
    for path in _list_checkpoints(folder):
        if not (path / _COMPLETE).is_file() and rank() == 0:
            remove(path)
    whole = [path for path in _list_checkpoints(folder) if (path / _COMPLETE).is_file()]
    return whole[-1] if whole else None


def _list_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
