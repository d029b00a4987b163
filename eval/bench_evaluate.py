"""What an evaluation costs beside the bare encoding of its texts, and how long the bootstrap takes.

    python eval/bench_evaluate.py --student runs/mine/model --teacher sentence-transformers/all-mpnet-base-v2 \
        --data path/to/sets --out eval/results/evaluate.json

Teacher and student score the seven STS sets, the teacher with an empty cache; beside it both encode the distinct texts
with sentence-transformers alone, and by the encoders that the evaluation uses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from embedistill.encoding.cached import CachedTeacher
from embedistill.encoding.hardware import choose_dtype
from embedistill.encoding.local import LocalEncoder, encode_here
from embedistill.evaluation.comparison import compare_results
from embedistill.evaluation.loading import load_task
from embedistill.evaluation.scoring import score_model
from embedistill.evaluation.tasks import list_texts
from embedistill.stages import describe_hardware, list_versions
from embedistill.teacher import default_cache_dir, load, locate

SETS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--student", "--teacher", "--data", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS, help="fewer of them, for a shorter run")
    arguments = parser.parse_args()
    tasks = [load_task(name, Path(arguments.data)) for name in arguments.sets]
    texts = list(dict.fromkeys(text for task in tasks for text in list_texts(task)["plain"]))
    located = {
        role: locate(name, models_dir=default_cache_dir() / "models")
        for role, name in (("teacher", arguments.teacher), ("student", arguments.student))
    }
    models = {role: load(found) for role, found in located.items()}
    seconds = {}

    start = time.perf_counter()
    for model in models.values():
        model.encode(texts, batch_size=32, show_progress_bar=False)
    seconds["encode() of sentence-transformers, both"] = time.perf_counter() - start

    student = partial(encode_here, LocalEncoder(located["student"], torch.float32), "student")
    with tempfile.TemporaryDirectory() as bare, tempfile.TemporaryDirectory() as cache:
        teacher = LocalEncoder(located["teacher"], choose_dtype("auto"))
        start = time.perf_counter()
        CachedTeacher(teacher, Path(bare)).vectors(texts)
        student(texts)
        seconds["our encoders, both"] = time.perf_counter() - start

        start = time.perf_counter()
        cached = CachedTeacher(teacher, Path(cache)).vectors
        results = score_model(tasks, cached, role="teacher", model="teacher")
        results += score_model(tasks, student, role="student", model="student")
        seconds["scored, both"] = time.perf_counter() - start

    start = time.perf_counter()
    rows, _ = compare_results(results, resamples=10_000, seed=42, margin=0.03)
    seconds["bootstrap of 10,000, the sets and their mean"] = time.perf_counter() - start

    plain, own, scored, drawn = seconds.values()
    found = {
        "sets": list(arguments.sets),
        "texts": len(texts),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "evaluation / encode()": (scored + drawn) / plain,
        "evaluation / our encoders": (scored + drawn) / own,
        "keeps": str(rows[-1].retention["student"]),
        "versions": list_versions(),
        "hardware": describe_hardware(),
    }
    print(json.dumps(found, indent=2))
    Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
