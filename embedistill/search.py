"""A FAISS index of a corpus, and answers from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from embedistill.errors import UsageError
from embedistill.files import read_json, write_json, written_aside
from embedistill.progress import progress_bar
from embedistill.teacher import encode

INDEX = "index"
_CHUNK = 512


@dataclass(frozen=True)
class Hit:
    """A text that was found, where it came from, and its cosine to the question."""

    text: str
    source: str
    score: float


def build_index(
    model: SentenceTransformer, model_dir: Path, texts: Sequence[str], sources: Sequence[str], folder: Path
) -> None:
    """Embed texts and write an exact inner-product index of them to a folder, whole or not at all.

    Args:
        model: Embeds the texts.
        model_dir: Where it is saved: searching loads it from there, so index and model have to move together.
        texts: What can be found.
        sources: Where each came from.
        folder: index.faiss, texts.parquet and index.json go there.
    """
    index = faiss.IndexFlatIP(model.get_embedding_dimension())
    with progress_bar("Indexing", len(texts), "texts") as advance:
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            index.add(encode(model, chunk, "document"))
            advance(len(chunk))
    with written_aside(folder) as part:
        part.mkdir()
        faiss.write_index(index, str(part / "index.faiss"))
        pq.write_table(pa.table({"text": list(texts), "source": list(sources)}), part / "texts.parquet")
        place = os.path.relpath(model_dir.absolute(), folder.absolute())
        write_json(part / "index.json", {"model": place, "texts": len(texts), "dim": index.d})


def search_index(folder: Path, questions: Sequence[str], results: int = 5) -> list[list[Hit]]:
    """Return the best hits for each question, best first.

    Args:
        folder: An index, or the run that has one.
        questions: What to look for.
        results: How many hits a question.

    Raises:
        UsageError: There is no index, or its model is gone.
    """
    folder = folder / INDEX if (folder / INDEX).is_dir() else folder
    if not (folder / "index.json").is_file():
        do = "give the recipe a `search:` section and run it again"
        raise UsageError(str(folder), "no index", "a folder with index.json, or a run that has one", do)
    model_dir = Path(os.path.normpath(folder / read_json(folder / "index.json")["model"]))
    if not (model_dir / "modules.json").is_file():
        raise UsageError(str(model_dir), "no model", f"the model that {folder} was made with", "move them together")
    model = SentenceTransformer(str(model_dir), local_files_only=True)
    index = faiss.read_index(str(folder / "index.faiss"))
    scores, numbers = index.search(encode(model, questions, "query"), min(results, index.ntotal))
    rows = pq.read_table(folder / "texts.parquet").take(np.unique(numbers)).to_pylist()
    texts = dict(zip(np.unique(numbers).tolist(), rows, strict=True))
    return [
        [Hit(texts[number]["text"], texts[number]["source"], score) for number, score in zip(found, near, strict=True)]
        for found, near in zip(numbers.tolist(), scores.tolist(), strict=True)
    ]
