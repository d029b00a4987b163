r"""What other ways make of the same teacher, texts, vectors and minutes: models to evaluate beside embedistill's.

    python eval/side_by_side.py layers --run runs/mpnet-14m --minutes 60 --out runs/st-layers
    python eval/side_by_side.py tinybert --run runs/mpnet-14m --minutes 60 --out runs/st-tinybert
    python eval/side_by_side.py model2vec --run runs/mpnet-14m --out runs/model2vec
    embedistill evaluate runs/st-layers --teacher sentence-transformers/all-mpnet-base-v2 --data DATA

layers: sentence-transformers' example of model distillation, layers 1, 4, 7 and 10 of the teacher and MSELoss.
tinybert: its way for a small student, a random BERT of 4 layers x 312 and EmbedDistillLoss with a projection. Both with
its trainer, batches of 64 in random order, warm-up of a tenth, as many steps as the minutes have room for.
model2vec: its `distill` of the teacher, which sees no text and takes seconds (pip install 'model2vec[distill]').
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MSELoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel

from embedistill.architectures import keep_layers
from embedistill.corpus.records import load_corpus
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.local import LocalEncoder
from embedistill.files import read_json
from embedistill.recipe import load_recipe
from embedistill.teacher import LocatedModel, default_cache_dir, load, locate
from embedistill.teaching import texts_by_kind

LAYERS = [1, 4, 7, 10]
TINYBERT = {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200}
TIMED_STEPS, BATCH = 20, 64


def main() -> None:
    """Make a model one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["layers", "tinybert", "model2vec"])
    parser.add_argument("--run", required=True, type=Path, help="a run: its teacher, its texts, its vectors")
    parser.add_argument("--minutes", type=float, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    recipe = load_recipe(given.run / "recipe.yaml")
    located = locate(recipe.teacher.model, recipe.teacher.revision, models_dir=default_cache_dir() / "models")
    if given.way == "model2vec":
        from model2vec.distill import distill

        distill(model_name=str(located.path)).save_pretrained(str(given.out))
        return
    torch.manual_seed(recipe.seed)
    texts, vectors = read_lessons(given.run, located)
    model, loss = make_student(given.way, load(located))
    steps = round(60 * given.minutes / time_step(given.way, load(located), texts, vectors))
    print(f"{steps:,} steps of {BATCH} texts", flush=True)
    train(loss, texts, vectors, steps, given.learning_rate)
    model.save(str(given.out))


def read_lessons(run: Path, located: LocatedModel) -> tuple[list[str], Any]:
    """Return the texts of a run and the teacher's vectors of them, out of the cache."""
    (texts,) = texts_by_kind(load_corpus(run / "corpus.parquet")["train"]).values()
    dtype = getattr(torch, read_json(run / "run.json")["chosen"]["teacher_dtype"])
    return texts, CachedTeacher(LocalEncoder(located, dtype), default_cache_dir() / "embeddings").vectors(texts)


def make_student(way: str, teacher: SentenceTransformer) -> tuple[SentenceTransformer, Any]:
    """Return an untrained student and its loss."""
    if way == "layers":
        teacher[0].model = keep_layers(teacher[0].model, LAYERS)
        return teacher, MSELoss(teacher)
    body: Any = teacher[0]
    body.model = BertModel(
        BertConfig(vocab_size=body.model.config.vocab_size, pad_token_id=body.tokenizer.pad_token_id, **TINYBERT),
        add_pooling_layer=False,
    )
    student = SentenceTransformer(modules=[body, Pooling(TINYBERT["hidden_size"], "mean")])
    return student, EmbedDistillLoss(student, distance_metric="cosine", projection_dim=768)


def time_step(way: str, teacher: SentenceTransformer, texts: list[str], vectors: Any) -> float:
    """Return the seconds of a step, of some on a student that is thrown away."""
    _, loss = make_student(way, teacher)
    train(loss, texts, vectors, 3)
    start = time.perf_counter()
    train(loss, texts, vectors, TIMED_STEPS)
    return (time.perf_counter() - start) / TIMED_STEPS


def train(loss: Any, texts: list[str], vectors: Any, steps: int, rate: float = 1e-4) -> None:
    """Train a loss's model as sentence-transformers' examples do, in bf16."""
    n_texts = min(len(texts), BATCH * steps)
    dataset = Dataset.from_dict({"text": texts[:n_texts], "label": list(vectors[:n_texts])})
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
            warmup_steps=steps // 10, bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        SentenceTransformerTrainer(model=loss.model, args=settings, train_dataset=dataset, loss=loss).train()


if __name__ == "__main__":
    main()
