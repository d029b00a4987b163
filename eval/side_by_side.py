r"""What sentence-transformers' own ways make of the same teacher, texts, vectors and minutes, beside a student.

    python eval/side_by_side.py layers --run runs/mpnet-14m --minutes 60 --out runs/st-layers
    python eval/side_by_side.py tinybert --run runs/mpnet-14m --minutes 60 --out runs/st-tinybert
    embedistill evaluate runs/st-layers --teacher sentence-transformers/all-mpnet-base-v2 --data DATA

layers: its example of model distillation, layers 1, 4, 7 and 10 of the teacher and MSELoss.
tinybert: its way for a small student, a random BERT of 4 layers x 312 and EmbedDistillLoss with a projection.
Both with its trainer, batches of 64 in random order, a tenth of warm-up, in bfloat16, which is its faster setting here,
texts cut at 128 tokens while it trains (a random batch is padded to its longest text, and so was the teacher trained),
and as many steps as the minutes have room for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MSELoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

from embedistill.architectures import keep_layers
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.local import LocalEncoder
from embedistill.files import read_json
from embedistill.material import Material
from embedistill.recipe import load_recipe
from embedistill.teacher import default_cache_dir, load, locate

LAYERS = [1, 4, 7, 10]
TINYBERT = {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1_200}
TIMED_STEPS, BATCH = 20, 64


def main() -> None:
    """Make a model one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["layers", "tinybert"])
    parser.add_argument("--run", required=True, type=Path, help="a run: its teacher, its texts, its vectors")
    parser.add_argument("--minutes", required=True, type=float, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--tokens", type=int, default=128, help="of a text that training sees")
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    recipe = load_recipe(given.run / "recipe.yaml")
    located = locate(recipe.teacher.model, recipe.teacher.revision, models_dir=default_cache_dir() / "models")
    dtype = getattr(torch, read_json(given.run / "run.json")["chosen"]["teacher_dtype"])
    teacher = CachedTeacher(LocalEncoder(located, dtype), default_cache_dir() / "embeddings")
    material = Material(
        given.run, teacher, drop=recipe.encoding.drop, n_watched=recipe.training.dev_size, seed=recipe.seed
    )
    texts = [text for some in material.trained.values() for text in some]
    vectors = np.concatenate([teacher.vectors(some, kind) for kind, some in material.trained.items() if some])
    lessons = Dataset.from_dict({"text": texts, "label": list(vectors)}).shuffle(recipe.seed)
    torch.manual_seed(recipe.seed)
    seconds = time_step(make_loss(given.way, load(located), given.tokens), lessons)
    steps = round(60 * given.minutes / seconds)
    print(f"{steps:,} steps of {BATCH} texts, {seconds:.2f} s each", flush=True)
    start = load(located)
    limit = start.max_seq_length
    loss = make_loss(given.way, start, given.tokens)
    train(loss, lessons, steps, given.learning_rate)
    if given.way == "layers":  # a random start has learned no positions beyond
        loss.model.max_seq_length = limit
    loss.model.save(str(given.out))


def make_loss(way: str, teacher: SentenceTransformer, tokens: int) -> Any:
    """Return the loss of an untrained student, which has the student as its `model`."""
    body: Any = teacher[0]
    body.max_seq_length = tokens
    if way == "layers":
        body.model = keep_layers(body.model, LAYERS)
        return MSELoss(teacher)
    words = {"vocab_size": body.model.config.vocab_size, "pad_token_id": body.tokenizer.pad_token_id}
    body.model = BertModel(BertConfig(**words, **TINYBERT), add_pooling_layer=False)
    student = SentenceTransformer(modules=[body, Pooling(TINYBERT["hidden_size"], "mean")])
    return EmbedDistillLoss(student, distance_metric="cosine", projection_dim=768)


def time_step(loss: Any, lessons: Dataset) -> float:
    """Return the seconds of a step, of some on a student that is thrown away."""
    train(loss, lessons, 3)
    start = time.perf_counter()
    train(loss, lessons, TIMED_STEPS)
    return (time.perf_counter() - start) / TIMED_STEPS


def train(loss: Any, lessons: Dataset, steps: int, rate: float = 1e-4) -> None:
    """Train a loss's model as sentence-transformers' examples do."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
            warmup_steps=steps // 10, bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none",
            save_strategy="no", logging_steps=100,
        )  # fmt: skip
        SentenceTransformerTrainer(model=loss.model, args=settings, train_dataset=lessons, loss=loss).train()


if __name__ == "__main__":
    main()
