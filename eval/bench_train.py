"""Texts a second of training, beside sentence-transformers' own distillation on the same student and texts.

    python eval/bench_train.py --student runs/mine/untrained --texts all.parquet --out eval/results/train.json

Every contender trains on the same texts, in slices that all take in turn, for the machine's speed varies from minute to
minute: sentence-transformers' recipe (its trainer, its MSE loss, batches of 64, fp32), the same in bf16 with larger
batches (its best setting is the fastest of these), and embedistill with its own batches. Targets are random unit
vectors: what they are costs nothing. All time is counted from the first step to the last.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss
from transformers import TrainerCallback

from embedistill.files import write_json
from embedistill.training import loop
from embedistill.training.batches import Batching
from embedistill.training.objectives import Course, DistillationLoss

OURS = "embedistill"
RECIPE = "sentence-transformers, batch 64, fp32"
BEST = [("bf16", size) for size in (64, 128)]


class Clock(TrainerCallback):
    """Takes the time from the first step to the last."""

    start = end = 0.0

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Stop, until there is another step."""
        self.end = time.perf_counter()


def train_plainly(model: SentenceTransformer, texts: Sequence[str], vectors: Any, size: int, *, bf16: bool) -> float:
    """Train as sentence-transformers' examples do, and return texts a second."""
    dataset = Dataset.from_dict({"text": list(texts), "label": list(vectors)})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=size, bf16=bf16, report_to="none",
            save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=dataset, loss=MSELoss(model), callbacks=[clock]
        ).train()
    return len(texts) / (clock.end - clock.start)


def train_ours(model: SentenceTransformer, texts: Sequence[str], vectors: Any, batching: Batching) -> float:
    """Train as a recipe's run does, and return texts a second: of those that it saw, as an epoch is whole steps."""
    clock, n_seen = Clock(), 0

    def look_up(rows: Any) -> Any:
        nonlocal n_seen
        n_seen += len(rows)
        return vectors[rows]

    schedule = loop.Schedule(
        epochs=1, minutes=None, learning_rate=2e-4, warmup=0.05, weight_decay=0.01, checkpoint_steps=10_000, seed=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    loss = DistillationLoss(model, {"embedding": Course(1, 1)}, Course(0.05, 0.05))
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            model, texts, look_up, loss=loss, batching=batching, schedule=schedule, callbacks=[clock],
            work_dir=Path(folder) / "work", log_path=Path(folder) / "log.jsonl",
        )  # fmt: skip
    return n_seen / (clock.end - clock.start)


def main() -> None:
    """Let all take turns, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--texts", required=True, type=Path, help="A parquet file with a column text, in random order.")
    parser.add_argument("--slice", type=int, default=2_000, help="Texts that each trains on in its turn.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="Tokens of our batches.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    texts = pq.read_table(given.texts, columns=["text"])["text"].to_pylist()[: given.slice * given.rounds]
    batching = Batching(size=256, tokens=given.tokens, seed=1)
    contenders: dict[str, Callable[[Any, Any, Any], float]] = {
        OURS: lambda model, some, vectors: train_ours(model, some, vectors, batching),
        RECIPE: lambda model, some, vectors: train_plainly(model, some, vectors, 64, bf16=False),
    }
    for name, size in BEST:
        contenders[f"sentence-transformers, batch {size}, {name}"] = (
            lambda model, some, vectors, size=size: train_plainly(model, some, vectors, size, bf16=True)  # type: ignore[misc]
        )
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(given.rounds):
        some = texts[number * given.slice : (number + 1) * given.slice]
        for name, run in contenders.items():
            model = SentenceTransformer(given.student, device=None if torch.cuda.is_available() else "cpu")
            dim = model.get_embedding_dimension() or 0
            vectors = np.random.default_rng(0).normal(size=(len(some), dim)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            rates[name].append(run(model, some, vectors))
            print(f"round {number}: {name}: {rates[name][-1]:.1f} texts/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max((name for name in medians if name not in {OURS, RECIPE}), key=lambda name: medians[name])
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(rates[OURS], rates[name], strict=True))
        for name in (RECIPE, best)
    }
    for name, rate in medians.items():
        print(f"{rate:8.1f} texts/s  {name}" + (f"  embedistill is {ratios[name]:.2f} times" if name in ratios else ""))
    if given.out:
        write_json(given.out, {"rates": rates, "ratios": ratios, "slice": given.slice, "tokens": given.tokens})


if __name__ == "__main__":
    main()
