"""One call to SentenceTransformerTrainer: targets from the cache, batches within budgets, checkpoints that resume."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from safetensors.torch import load_model, save_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.nn import Embedding
from transformers import PrinterCallback, TrainerCallback

from embedistill.encoding.hardware import find_training_device
from embedistill.errors import EmbedistillError, LostError
from embedistill.files import read_json, remove, write_json, written_aside
from embedistill.progress import note, progress_bar
from embedistill.ranks import rank, world_size
from embedistill.training.batches import (
    Batching,
    BudgetSampler,
    Rows,
    TargetCollator,
    Targets,
    count_batches,
    count_tokens,
)
from embedistill.training.callbacks import Stopwatch, Watch, last_whole_checkpoint
from embedistill.training.objectives import DistillationLoss
from embedistill.training.optimiser import RowAdamW, scale_rates
from embedistill.training.packed import without_padding
from embedistill.training.readings import Criterion, Dev, KeepBest

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # its default is a folder of checkpoints, which are removed
_DEV_READINGS = 10  # of a training, where the recipe names no steps
_SCALE_RATE = 0.01  # of the logarithm of a learned temperature
_FEWEST_TEXTS = 4  # of a batch that is halved for want of memory, for terms that compare its texts


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in what steps a student is trained; the recipe's `training` section says more."""

    epochs: float
    minutes: float | None
    learning_rate: float
    warmup: float
    weight_decay: float
    checkpoint_steps: int
    seed: int
    dtype: torch.dtype = torch.float32
    steps: int | None = None
    dev_steps: int | None = None
    max_grad_norm: float = 1.0
    report_to: tuple[str, ...] = ()


def train(
    student: SentenceTransformer,
    texts: Sequence[str],
    targets: Targets,
    *,
    loss: DistillationLoss,
    batching: Batching,
    schedule: Schedule,
    work_dir: Path,
    log_path: Path,
    dev: Dev | None = None,
    partners: Rows | None = None,
    kin: Rows | None = None,
    is_first: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> SentenceTransformer:
    """Train a student in place on the teacher's vectors of its texts, and return it.

    A run that was killed goes on from its last whole checkpoint in `work_dir`, with the same batches. One that runs out
    of memory goes on with each batch in two halves. With texts to watch the student on, the weights that did best on
    them are returned. The untrained weights count too, unless this training follows another: what a second one is for,
    such as pairs, may cost some of what the student is read by. Processes that torchrun started train together, with
    the batches of one; the first alone writes.

    Args:
        student: The model to train; its dropout is switched off.
        texts: The training texts.
        targets: Gives the teacher's vectors by row of `texts`.
        loss: The terms, of this student.
        batching: How texts are put into batches.
        schedule: How long, how fast and in what steps.
        work_dir: Folder for checkpoints and for the number of steps that a time budget came to.
        log_path: File for the log, one JSON object a line.
        dev: Texts to watch the student on; of those that are not trained on, the best weights are kept.
        partners: Row of each text's positive, shape (n_texts,), -1: it has none; None: no text has.
        kin: A number of each text, shape (n_texts,), the same of texts that pairs link; None: no text is linked.
        is_first: Whether no other training of this student came before.
        callbacks: Of transformers' trainer, beside our own.

    Raises:
        LostError: The loss is not finite, or the student collapsed or diverged; or it did when this was tried before.
            Checkpoints and the best weights stay in `work_dir`.
        EmbedistillError: Memory does not hold four texts, or, for the term `embedding` alone, one.
    """
    lost = work_dir / "lost.json"
    if lost.is_file():
        raise LostError(**read_json(lost))  # the same steps come to the same end
    _switch_dropout_off(student)
    training = _Training(
        student=student,
        dataset=Dataset.from_dict({"text": list(texts), "label": np.arange(len(texts))}),
        collator=TargetCollator(student.preprocess, targets=targets, partners=partners, kin=kin),
        loss=loss,
        batching=batching,
        schedule=schedule,
        lengths=count_tokens(student, texts),
        work_dir=work_dir,
        log_path=log_path,
        dev=dev,
        is_first=is_first,
        callbacks=callbacks,
    )
    if find_training_device() == "cpu":
        student.to("cpu")  # where it is, for other accelerators, before the trainer moves it
    packed = nullcontext() if loss.internals else without_padding(student, schedule.dtype)
    with packed:
        while not training.done:
            try:
                training.run()
            except LostError as error:
                if rank() == 0:
                    write_json(lost, {"where": error.where, "found": error.found, "do": error.do})
                raise
            except (RuntimeError, MemoryError) as error:
                training.halve(error)
            gc.collect()  # what ran out of memory is held by its frames until here
        return training.finish()


@dataclass
class _Training:
    """One training: what it is made of, and the files by which it goes on."""

    student: SentenceTransformer
    dataset: Dataset
    collator: TargetCollator
    loss: DistillationLoss
    batching: Batching
    schedule: Schedule
    lengths: Any
    work_dir: Path
    log_path: Path
    dev: Dev | None
    is_first: bool
    callbacks: Sequence[TrainerCallback] = ()
    done: bool = False
    best: KeepBest | None = None
    rates: dict[str, float] = field(init=False)
    loss_state: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Take what a training begins with, and a run that goes on has as well."""
        self.rates = scale_rates(self.student, self.schedule.learning_rate)
        if self.loss.course is None:
            self.rates["^log_scale$"] = _SCALE_RATE
        self.loss_state = {name: value.clone() for name, value in self.loss.own_state().items()}
        if rank() == 0:
            with written_aside(self.untrained) as path:
                save_model(self.student, str(path))

    @property
    def plan(self) -> dict[str, int]:
        """The steps that were planned, once they are, and how often the batch was halved."""
        path = self.work_dir / "plan.json"
        found: dict[str, int] = read_json(path) if path.is_file() else {"halvings": 0}
        return found

    def keep_plan(self, **changes: int) -> None:
        """Write down a part of the plan; of several processes, the first does."""
        if rank() == 0:
            write_json(self.work_dir / "plan.json", self.plan | changes)

    @property
    def untrained(self) -> Path:
        return self.work_dir / "untrained.safetensors"

    def run(self) -> None:
        """Train to the end, or to an error, from the last checkpoint on."""
        steps = _agree(self.plan.get("steps", 0)) or _agree(self._plan_steps())
        self.keep_plan(steps=steps)
        checkpoint = last_whole_checkpoint(self.work_dir)
        with ExitStack() as stack:
            advance = stack.enter_context(progress_bar("Training", steps, "steps"))
            watch = Watch(advance, self.log_path, self.loss, self.work_dir)
            callbacks: list[TrainerCallback] = [watch, *self.callbacks]
            if self.dev and rank() == 0:
                every = self.schedule.dev_steps or math.ceil(steps / _DEV_READINGS)
                self.best = KeepBest(
                    self.student, self.dev, self._criterion, every, self.schedule.dtype, self.work_dir, self.is_first
                )
                callbacks.insert(0, self.best)
            if "tensorboard" in self.schedule.report_to and _TENSORBOARD not in os.environ:
                os.environ[_TENSORBOARD] = str(self.log_path.parent / "tensorboard")
                stack.callback(os.environ.pop, _TENSORBOARD, None)
            trainer = self._trainer(self.schedule, self.batching, steps, self.work_dir, callbacks)
            if self.best:
                self.best.log = trainer.log
            if checkpoint:
                note(f"Training goes on from {checkpoint.name}")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.done = True

    @property
    def _criterion(self) -> Criterion:
        return "cosine" if "embedding" in self.loss.weights else "similarity"

    def _trainer(
        self, schedule: Schedule, batching: Batching, steps: int, folder: Path, callbacks: list[TrainerCallback]
    ) -> SentenceTransformerTrainer:
        self.loss.model = self.student
        gc.collect()  # of an earlier trainer, its wrapper would go on to exchange gradients
        accumulation = 2 ** self.plan["halvings"]
        batching = replace(batching, parts=accumulation * world_size())
        trainer = _Trainer(
            model=self.student,
            args=_arguments(
                schedule,
                steps,
                folder,
                max_steps=steps,
                per_device_train_batch_size=batching.size,
                gradient_accumulation_steps=accumulation,
                learning_rate_mapping=self.rates,
                batch_sampler=partial(BudgetSampler, lengths=self.lengths, batching=batching, steps=steps),
            ),
            train_dataset=self.dataset,
            loss=self.loss,
            data_collator=self.collator,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def halve(self, error: Exception) -> None:
        """Have batches halved from here on, where an error was want of memory.

        Raises:
            EmbedistillError: Halves would be too small. Another error is raised again.
        """
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)) or world_size() > 1:
            raise error
        halvings = self.plan["halvings"] + 1
        n_texts = self._texts_a_batch()
        if n_texts // 2**halvings < (1 if set(self.loss.weights) == {"embedding"} else _FEWEST_TEXTS):
            do = "use shorter texts (corpus.max_characters), a smaller student, or a machine with more memory"
            raise EmbedistillError(
                "training", f"{n_texts // 2 ** (halvings - 1)} texts a batch, and out of memory", do=do
            ) from error
        self.keep_plan(halvings=halvings)
        note(f"Out of memory: batches of {n_texts} texts come in {2**halvings} parts from now on")
        self._start_over()

    def _texts_a_batch(self) -> int:
        """Return how many texts a batch has on average, within its budgets."""
        mean = len(self.lengths) / count_batches(self.lengths, self.batching)
        return min(self.batching.size, max(1, round(mean)))

    def _start_over(self) -> None:
        load_model(self.student, str(self.untrained))
        self.loss.load_state_dict(self.loss_state, strict=False)
        self.loss.forget_lost()
        self.student.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def finish(self) -> SentenceTransformer:
        """Give the student, in every process, the weights that did best."""
        if self.best:
            self.best.restore()
        if world_size() > 1 and torch.distributed.is_initialized():
            for value in self.student.state_dict().values():
                torch.distributed.broadcast(value, 0)
        return self.student

    def _plan_steps(self) -> int:
        """Return the steps of the epochs, or those asked for or fitting into the minutes where these are fewer."""
        schedule, an_epoch = self.schedule, count_batches(self.lengths, self.batching)
        passes = max(1, round(schedule.epochs * an_epoch))
        wanted = min(passes, schedule.steps or passes)
        if schedule.steps and passes < schedule.steps:
            note(f"Training: {schedule.epochs:g} epochs are {passes:,} steps of the {schedule.steps:,} asked for")
        if schedule.minutes is None or wanted < 4:
            return wanted
        stopwatch = Stopwatch()
        folder = self.work_dir / "calibration"
        in_any_order = replace(self.batching, difficulty=None)  # a curriculum begins with what is not like the rest
        self._trainer(replace(schedule, report_to=()), in_any_order, wanted, folder, [stopwatch]).train()
        self._start_over()
        if rank() == 0:
            remove(folder)
        step = stopwatch.seconds_per_step
        reading = _time_reading(self.student, self.dev) if self.dev else 0.0
        seconds = schedule.minutes * 60
        if schedule.dev_steps:
            fitting = (seconds - 2 * reading) / (step + reading / schedule.dev_steps)
        else:
            fitting = (seconds - (_DEV_READINGS + 1) * reading) / step
        steps = max(1, min(wanted, int(fitting)))
        if wanted < fitting:
            note(f"Training: {wanted:,} steps, all there are of {schedule.epochs:g} epochs, take less than the minutes")
        note(f"Training: {steps:,} steps of {step:.2f} s, {steps / an_epoch:.1f} epochs")
        if fitting < 1:
            note(f"Readings of {reading:.1f} s take all of the time: lower training.dev_size, or leave out dev_task")
        return steps


class _Trainer(SentenceTransformerTrainer):
    """One that moves tables by the rows that are used, and writes no training texts into a card."""

    def get_optimizer_cls_and_kwargs(
        self, args: SentenceTransformerTrainingArguments, model: SentenceTransformer | None = None
    ) -> tuple[Any, Any]:
        """Return the optimiser and its groups of weights, tables beside layers marked: a static one is all there is."""
        _, settings = super().get_optimizer_cls_and_kwargs(args, model)
        tables = {id(one.weight) for one in self.loss.modules() if isinstance(one, Embedding)}
        for group in settings["optimizer_dict"]:  # of a group for each weight, by the mapping of rates
            group["by_row"] = any(id(weight) in tables for weight in group["params"])
        return RowAdamW, settings

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave it out."""


def _agree(steps: int) -> int:
    """Return what the first of several processes has."""
    if world_size() == 1 or not torch.distributed.is_initialized():
        return steps
    found = [steps]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def _time_reading(student: SentenceTransformer, dev: Dev) -> float:
    start = time.perf_counter()
    dev.read(student)
    dev.score_too(student)
    return time.perf_counter() - start


def _arguments(schedule: Schedule, steps: int, folder: Path, **batches: Any) -> SentenceTransformerTrainingArguments:
    cuda = find_training_device() == "cuda"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(schedule.warmup * steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        bf16=schedule.dtype == torch.bfloat16,
        use_cpu=not cuda,
        seed=schedule.seed,
        save_steps=schedule.checkpoint_steps,
        save_total_limit=2,
        logging_steps=max(1, min(20, steps // 20)),
        logging_nan_inf_filter=False,
        report_to=list(schedule.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        **batches,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # replicas in threads would need padding; torchrun takes processes
    return arguments


def _switch_dropout_off(student: SentenceTransformer) -> None:
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
