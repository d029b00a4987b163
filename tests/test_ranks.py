"""Two processes that torchrun starts train together, and come to what one comes to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedistill import distill, load_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "more",
    [
        ["training.objectives={embedding: 1, similarity: 1, contrastive: 0.5}", "training.dev_size=0"],
        ["training.objectives={embedding: 1, pairs: 0.02}", "training.dev_size=8", "student={from: static}"],
    ],
    ids=["texts", "pairs, and texts kept out"],
)
def test_two_processes_give_the_student_of_one(
    more: list[str], recipe_file: Path, tmp_path: Path, sentences: list[str]
) -> None:
    settings = [
        *more,
        "training.steps=12",
        "training.epochs=50",
        "training.minutes=2",
        "training.balance=true",
        "training.dtype=float32",
        "training.learning_rate=3e-4",
        "training.batch_size=64",
        "training.batch_tokens=200",
        "evaluation.tasks=[agreement]",
        "search=null",
    ]
    distill(load_recipe(recipe_file, *settings), tmp_path / "one", tmp_path / "cache")
    run = [*TORCHRUN, "-m", "embedistill", "run", str(recipe_file), *settings]
    run += ["--run-dir", str(tmp_path / "two"), "--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreement cosine") == 1
    students = []
    for name in ("one", "two"):
        students.append(SentenceTransformer(str(tmp_path / name / "model"), device="cpu").encode(sentences[:100]))
        log = [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        assert max(entry["step"] for entry in log) == 12
    untrained = SentenceTransformer(str(tmp_path / "one" / "untrained"), device="cpu").encode(sentences[:100])
    assert np.abs(students[0] - untrained).max() > 0.01
    np.testing.assert_allclose(students[1], students[0], atol=1e-4)
