"""Every recipe that is shipped, on texts of one's own: as it stands, but for the sizes of a tiny teacher's student."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_sentence

from embedistill import distill, load_recipe
from embedistill.recipe import list_recipes

TEXTS, WIDTH = 200, 32
SIZES = {  # those of the recipes are planned in test_plan.py
    "layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocabulary_size": 200,
    "embedding_size": 16,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .parquet in the place of a recipe's own corpus, with the columns that any of them names."""
    path, rng = tmp_path_factory.mktemp("corpus") / "texts.parquet", random.Random(3)
    made = [f"{write_sentence(rng, rng.randint(4, 12))} {number}" for number in range(TEXTS)]
    queries = [f"{' '.join(text.split()[1:4])} {number}" for number, text in enumerate(made)]
    pq.write_table(pa.table({"text": made, "abstract": made, "title": queries}), path)
    return path


@pytest.mark.parametrize("path", list_recipes(), ids=lambda path: path.stem)
def test_a_recipe_runs_on_a_parquet_of_ones_own(path: Path, mpnet_dir: Path, texts: Path, tmp_path: Path) -> None:
    settings = [f"teacher.model={mpnet_dir}", f"corpus.source={texts}", "evaluation.tasks=[agreement]"]
    settings += ["training.minutes=null", "training.steps=2", "training.learning_rate=1e-5"]
    said = load_recipe(path.stem).student.model_dump()
    settings += [f"student.{name}={size}" for name, size in SIZES.items() if said[name]]
    recipe = load_recipe(path.stem, *settings)
    run = distill(recipe, tmp_path / "run", until="training")
    vectors = run.student.encode(["where is the ship?", "old bread and cheese"])
    assert vectors.shape == (2, recipe.student.embedding_size or WIDTH)
    assert np.isfinite(vectors).all()
    counts = json.loads((run.folder / "run.json").read_text())["stages"]["corpus"]["funnel"]
    assert counts["train"] + counts["holdout"] == TEXTS, counts
