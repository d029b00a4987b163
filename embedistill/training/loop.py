"""One call to SentenceTransformerTrainer: targets from the cache, batches of like length, checkpoints that resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embedistill.errors import EmbedistillError
from embedistill.files import read_json, remove, write_json, write_text
from embedistill.progress import note, progress_bar
from embedistill.training.objectives import DistillationLoss, Temperature, Term
from embedistill.training.readings import Criterion, Dev, KeepBest

Targets = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""From row numbers (batch,) to the teacher's vectors in the student's space (batch, dim)."""

_COMPLETE = "complete"
_POOL_BATCHES = 32
_CALIBRATION_SECONDS = 10.0
_DEV_READINGS = 10  # of a training, where the recipe names no steps


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in what steps a student is trained; the recipe's `training` section says more."""

    epochs: float
    minutes: float | None
    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    checkpoint_steps: int
    seed: int
    dtype: torch.dtype = torch.float32
    steps: int | None = None
    dev_steps: int | None = None


def train(
    student: SentenceTransformer,
    texts: Sequence[str],
    targets: Targets,
    *,
    weights: Mapping[Term, float],
    temperature: Temperature,
    prefixes: Sequence[int] = (),
    schedule: Schedule,
    work_dir: Path,
    log_path: Path,
    dev: Dev | None = None,
) -> SentenceTransformer:
    """Train a student in place on the teacher's vectors of its texts, and return it.

    A run that was killed goes on from its last whole checkpoint in `work_dir`, with the same batches. With texts to
    watch the student on, the weights that did best on them are returned, the untrained ones among them.

    Args:
        student: The model to train; its dropout is switched off.
        texts: The training texts.
        targets: Gives the teacher's vectors by row of `texts`.
        weights: Weight of each term of the loss.
        temperature: Of the terms that have one.
        prefixes: Numbers of dimensions that the terms look at; none: all alone.
        schedule: How long, how fast and in what steps.
        work_dir: Folder for checkpoints and for the number of steps that a time budget came to.
        log_path: File for the log, one JSON object a line.
        dev: Texts that are not trained on, to watch the student on.

    Raises:
        EmbedistillError: The loss is not finite, or the student collapsed or diverged. Checkpoints and the best weights
            stay in `work_dir`.
    """
    _switch_dropout_off(student)
    dataset = Dataset.from_dict({"text": list(texts), "label": np.arange(len(texts))})
    collator = TargetCollator(preprocess_fn=student.preprocess, targets=targets)
    loss = DistillationLoss(student, weights, temperature, prefixes)

    def start(steps: int, folder: Path, callbacks: list[TrainerCallback]) -> SentenceTransformerTrainer:
        trainer = SentenceTransformerTrainer(
            model=student,
            args=_arguments(schedule, steps, folder),
            train_dataset=dataset,
            loss=loss,
            data_collator=collator,
            callbacks=callbacks,
        )
        for chatty in (PrinterCallback, SentenceTransformerModelCardCallback):
            trainer.remove_callback(chatty)
        return trainer

    plan = work_dir / "plan.json"
    if not plan.is_file():
        planned = _plan_steps(schedule, len(texts), student, start, work_dir / "calibration", dev=dev)
        write_json(plan, {"steps": planned})
    steps: int = read_json(plan)["steps"]
    checkpoint = _last_whole_checkpoint(work_dir)
    best = None
    if dev:
        every = schedule.dev_steps or max(1, steps // _DEV_READINGS)
        criterion: Criterion = "cosine" if weights.get("embedding") else "similarity"
        best = KeepBest(student, dev, criterion, every, schedule.dtype, work_dir)
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar("Training", steps, "steps"))
        watch = _Watch(advance, log_path, loss)
        trainer = start(steps, work_dir, [best, watch] if best else [watch])
        if checkpoint:
            note(f"Training goes on from {checkpoint.name}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if best:
        best.restore()
    return student


@dataclass
class TargetCollator(SentenceTransformerDataCollator):
    """Tokenise the texts of a batch and put the teacher's vectors in place of their row numbers."""

    targets: Targets | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the trainer's batch with labels of shape (batch, dim)."""
        batch: dict[str, Any] = super().__call__(features)
        if self.targets is not None:
            batch["label"] = torch.from_numpy(self.targets(batch["label"].numpy()))
        return batch


class LengthGroupedSampler(DefaultBatchSampler):
    """Random batches of texts of like length: less padding, at the same randomness between batches.

    Every epoch is a new permutation; runs of it of 32 batches are sorted by length, cut, and the batches shuffled.
    """

    def __init__(self, dataset: Dataset, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.lengths = np.array([len(text) for text in dataset["text"]])

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the epoch that `set_epoch` named."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        pool = self.batch_size * _POOL_BATCHES
        for start in range(0, len(order), pool):
            rows = order[start : start + pool]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches = [rows[cut : cut + self.batch_size].tolist() for cut in range(0, len(rows), self.batch_size)]
            yield from (batches[index] for index in random.permutation(len(batches)))

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        batches: int = math.ceil(len(self.lengths) / self.batch_size)
        return batches


class _Watch(TrainerCallback):
    """Progress, the log on disk, whole checkpoints, and a stop where the loss is lost."""

    def __init__(self, advance: Callable[[int], None], log_path: Path, loss: DistillationLoss) -> None:
        self.advance, self.log_path, self.loss = advance, log_path, loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.advance(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss.progress = state.global_step / state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.log_history[-1]
        lost = [name for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)]
        if lost:
            do = "lower training.learning_rate, or set training.dtype=float32"
            raise EmbedistillError(f"training, step {state.global_step}", f"{', '.join(lost)} not finite", do=do)
        write_text(self.log_path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        write_text(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _COMPLETE, "")


class _Stopwatch(TrainerCallback):
    """Times steps after the first two, and stops when it has seen enough."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 3 and self.times[-1] - self.times[1] > _CALIBRATION_SECONDS:
            control.should_training_stop = True

    @property
    def seconds_per_step(self) -> float:
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def _plan_steps(
    schedule: Schedule,
    n_texts: int,
    student: SentenceTransformer,
    start: Callable[[int, Path, list[TrainerCallback]], SentenceTransformerTrainer],
    folder: Path,
    *,
    dev: Dev | None,
) -> int:
    """Return the steps of the epochs, or those asked for or fitting into the minutes where these are fewer."""
    wanted = max(1, round(schedule.epochs * math.ceil(n_texts / schedule.batch_size)))
    wanted = min(wanted, schedule.steps or wanted)
    if schedule.minutes is None or wanted < 4:
        return wanted
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    stopwatch = _Stopwatch()
    start(wanted, folder, [stopwatch]).train()
    student.load_state_dict(weights)
    student.zero_grad()
    remove(folder)
    seconds = schedule.minutes * 60 - (_DEV_READINGS * _time_reading(student, dev) if dev else 0)
    fitting = max(1, int(seconds / stopwatch.seconds_per_step))
    steps = min(wanted, fitting)
    epochs = steps * schedule.batch_size / n_texts
    note(f"Training: {steps:,} steps of {stopwatch.seconds_per_step:.2f} s, {epochs:.1f} epochs")
    return steps


def _time_reading(student: SentenceTransformer, dev: Dev) -> float:
    start = time.perf_counter()
    dev.read(student)
    return time.perf_counter() - start


def _arguments(schedule: Schedule, steps: int, folder: Path) -> SentenceTransformerTrainingArguments:
    cuda = torch.cuda.is_available()
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(schedule.warmup * steps),
        weight_decay=schedule.weight_decay,
        bf16=schedule.dtype == torch.bfloat16,
        use_cpu=not cuda,
        seed=schedule.seed,
        batch_sampler=LengthGroupedSampler,
        save_steps=schedule.checkpoint_steps,
        save_total_limit=2,
        logging_steps=max(1, min(20, steps // 20)),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )


def _switch_dropout_off(student: SentenceTransformer) -> None:
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that was written to its end, and remove those that were not."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found:
        if not (path / _COMPLETE).is_file():
            remove(path)
    whole = [path for path in found if path.is_dir()]
    return whole[-1] if whole else None
