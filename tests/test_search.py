import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedistill.errors import UsageError
from embedistill.search import build_index, search_index


def test_an_index_finds_what_is_nearest_and_moves_with_its_model(
    teacher_dir: Path, sentences: list[str], tmp_path: Path
) -> None:
    model_dir, folder = tmp_path / "run" / "model", tmp_path / "run" / "index"
    shutil.copytree(teacher_dir, model_dir)
    model = SentenceTransformer(str(model_dir), device="cpu")
    build_index(model, model_dir, sentences, [f"source {i}" for i in range(len(sentences))], folder)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    questions = [sentences[17], "the ship in the harbour"]
    exact, free = search_index(moved, questions, results=3)
    assert (exact[0].text, exact[0].source) == (sentences[17], "source 17")
    assert exact[0].score == pytest.approx(1, abs=1e-4)
    similarities = model.encode(questions)[1] @ model.encode(sentences).T
    assert [hit.text for hit in free] == [sentences[i] for i in np.argsort(-similarities)[:3]]
    assert search_index(moved / "index", questions[:1], results=999)[0][0] == exact[0]
    shutil.rmtree(moved / "model")
    with pytest.raises(UsageError, match=r"no model; expected the model that .* was made with; move them together"):
        search_index(moved, questions)


def test_a_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no index; expected a folder with index.json, or a run that has one"):
        search_index(tmp_path, ["q"])
