"""Untrained students beside those that the usual rules give: all from one teacher, one set of texts, one kind of head.

    python eval/bench_starts.py --texts all.parquet --data DATA --out eval/results/starts.json

DATA has sts/ and retrieval/ as the command line's --data. Every row is built on 5,000 texts of the corpus, and its head
solved on the same; seconds are those of building, the teacher's vectors being in the cache. A row that is in the output
already is not built again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

from embedistill.architectures import keep_layers, read_config, resize
from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.local import LocalEncoder
from embedistill.evaluation.loading import load_task
from embedistill.evaluation.scoring import score_model
from embedistill.files import write_json
from embedistill.student.building import add_head, build_student
from embedistill.student.planning import TransformerPlan, plan_transformer
from embedistill.student.saving import save_student
from embedistill.student.selection import select_narrow
from embedistill.student.static import build_static
from embedistill.teacher import Embeddings, default_cache_dir, load, locate

TEACHER = "sentence-transformers/all-mpnet-base-v2"
STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")
N_TEXTS, N_HELD_OUT, LENGTH = 5_064, 1_000, 256
WIDTHS = {"4 x 312": (4, 312, 1200), "6 x 384": (6, 384, 1536)}

Build = Callable[[SentenceTransformer, list[str], Embeddings], SentenceTransformer]


def plan(layers: int | list[int], width: int | None = None, inner: int | None = None) -> TransformerPlan:
    """Return a plan for the teacher."""
    config = read_config(locate(TEACHER, models_dir=default_cache_dir() / "models").path)
    return plan_transformer(config, layers, hidden_size=width, intermediate_size=inner)


def ours(planned: TransformerPlan) -> Build:
    """Build as `embedistill run` does."""
    return lambda teacher, texts, vectors: build_student(teacher, planned, texts, vectors)[0]


def with_head(teacher: SentenceTransformer, model: Any, texts: list[str], vectors: Embeddings) -> SentenceTransformer:
    """Put a model into the teacher's place, and solve a head for it."""
    transformer: Any = copy.deepcopy(teacher[0])
    transformer.model = model
    return add_head([transformer, Pooling(model.config.hidden_size)], teacher, texts[64:], vectors[64:])


def cut(layers: list[int]) -> Build:
    """Keep layers as they are."""
    return lambda teacher, texts, vectors: with_head(
        teacher, keep_layers(copy.deepcopy(teacher[0].model), layers), texts, vectors
    )


def first_dimensions(planned: TransformerPlan) -> Build:
    """Keep the first dimensions, heads' dimensions and neurons of the planned layers."""
    kept = torch.arange(planned.sizes.hidden_size)
    return lambda teacher, texts, vectors: with_head(
        teacher, select_narrow(teacher[0].model, planned.sizes, planned.layers or [], kept), texts, vectors
    )


def widest_dimensions(planned: TransformerPlan) -> Build:
    """Keep the dimensions of the highest variance."""

    def build(teacher: SentenceTransformer, texts: list[str], vectors: Embeddings) -> SentenceTransformer:
        found = teacher.tokenizer(texts[:500], truncation=True, max_length=LENGTH)["input_ids"]
        ids = [torch.tensor(one) for one in found]
        model = select_narrow(teacher[0].model, planned.sizes, planned.layers or [], ids=ids)
        return with_head(teacher, model, texts, vectors)

    return build


def at_random(planned: TransformerPlan) -> Build:
    """Draw the weights as a new model's are."""

    def build(teacher: SentenceTransformer, texts: list[str], vectors: Embeddings) -> SentenceTransformer:
        torch.manual_seed(42)
        config = resize(teacher[0].model.config, planned.sizes, planned.layers or [])
        return with_head(teacher, AutoModel.from_config(config).eval(), texts, vectors)

    return build


def list_rows() -> dict[str, Build]:
    """Return what is built, by name."""
    rows: dict[str, Build] = {"4 x 312 fitted": ours(plan(4, 312, 1200)), "static": build_static}
    rows["4 x 312 fitted, layers 0, 4, 8, 11"] = ours(plan([0, 4, 8, 11], 312, 1200))
    rows["6 x 384 fitted"] = ours(plan(6, 384, 1536))
    rows["4 x 768 fitted"] = ours(plan(4))
    rows["6 x 768 fitted"] = ours(plan(6))
    rows["6 x 768 every second layer"] = cut([0, 2, 4, 6, 8, 10])
    rows["4 x 768 every third layer"] = cut([0, 3, 6, 9])
    rows["6 x 768 layers 0, 1, 2, 9, 10, 11"] = cut([0, 1, 2, 9, 10, 11])
    for name, (depth, width, inner) in WIDTHS.items():
        layers = [0, 1, 2, 11] if depth == 4 else [0, 1, 2, 9, 10, 11]
        planned = plan(layers, width, inner)
        rows[f"{name} first dimensions"] = first_dimensions(planned)
        rows[f"{name} dimensions of the highest variance"] = widest_dimensions(planned)
        rows[f"{name} random"] = at_random(planned)
    return rows


def measure(student: SentenceTransformer, data: Path, retrieval: list[str], held_out: Any) -> dict[str, Any]:
    """Return parameters, the cosine to the teacher on held-out texts, and the metrics of every task."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "student"
        folder.mkdir()
        save_student(student, folder, None, {})
        located = locate(str(folder), models_dir=Path(name))
        encoder = CachedTeacher(LocalEncoder(located, torch.bfloat16), Path(name) / "cache", "float32")

        def encode(texts: Any, kind: Any) -> Embeddings:
            encoder.encode_missing(texts, kind)
            return encoder.vectors(texts, kind)

        tasks = [load_task(task, data) for task in (*STS, *retrieval)]
        results = score_model(tasks, encode, role="student", model="student")
        metrics = {found.task: next(iter(found.metrics.values())) for found in results}
        texts, vectors = held_out
        cosine = float((encode(texts, "document") * vectors).sum(1).mean())
    parameters = sum(parameter.numel() for parameter in student.parameters())
    mean = 100 * float(np.mean([metrics[task] for task in STS]))
    return {"parameters": parameters, "held_out_cosine": cosine, "sts_mean": mean, "metrics": metrics}


def main() -> None:
    """Build and measure every row that is not in the output yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="A parquet file with a column text.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--retrieval", nargs="*", default=["MEDLINE", "Cranfield", "SciFact"])
    parser.add_argument("--only", nargs="*", help="Names of rows; default: all.")
    options = parser.parse_args()
    located = locate(TEACHER, models_dir=default_cache_dir() / "models")
    column = pq.read_table(options.texts, columns=["text"]).column("text")
    chosen = np.random.default_rng(42).permutation(len(column))[: N_TEXTS + N_HELD_OUT]
    texts = column.take(chosen).to_pylist()
    cached = CachedTeacher(LocalEncoder(located, torch.bfloat16), default_cache_dir() / "embeddings")
    cached.encode_missing(texts, "document")
    vectors = cached.vectors(texts, "document")
    held_out = (texts[N_TEXTS:], vectors[N_TEXTS:])
    rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name, build in list_rows().items():
        if name in rows or (options.only and name not in options.only):
            continue
        teacher = load(located)
        teacher.max_seq_length = LENGTH
        start = time.perf_counter()
        student = build(teacher, texts[:N_TEXTS], vectors[:N_TEXTS])
        seconds = time.perf_counter() - start
        rows[name] = {"seconds": round(seconds, 1), **measure(student, options.data, options.retrieval, held_out)}
        write_json(options.out, rows)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)


if __name__ == "__main__":
    main()
