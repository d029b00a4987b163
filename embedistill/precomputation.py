"""Fill the cache apart from a run: encode a whole corpus, or take in vectors that are there already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from embedistill.cache.shards import Encoded
from embedistill.cache.store import EmbeddingCache
from embedistill.cache.upkeep import import_vectors, read_embeddings, read_encoding
from embedistill.choices import Kind
from embedistill.encoding.cached import CachedTeacher, Encoder
from embedistill.encoding.cluster import TeacherSpec, encode_on_ray
from embedistill.encoding.endpoint import EndpointEncoder
from embedistill.encoding.hardware import choose_dtype
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import UsageError
from embedistill.recipe import Recipe
from embedistill.sources import check_corpus, read_records
from embedistill.teacher import Embeddings, default_cache_dir, locate

_COMPARED, _SAME = 16, 0.99


def encode_corpus(recipe: Recipe, cache_dir: str | Path | None = None) -> int:
    """Encode the whole corpus of a recipe into the cache, in constant memory, and return how many texts were new.

    Args:
        recipe: From `load_recipe`; only its teacher, corpus and encoding matter, and nothing is selected or held out.
        cache_dir: Folder for models and teacher embeddings; default: `default_cache_dir()`.

    Raises:
        EmbedistillError: Something is wrong with the corpus or the teacher; it says what to do.
    """
    folder, section = Path(cache_dir or default_cache_dir()), recipe.corpus
    check_corpus(section)
    teacher = open_teacher(recipe, folder)
    n_texts = 0

    def read(kind: Kind) -> Iterator[str]:
        nonlocal n_texts
        for record in read_records(section):
            if record and len(record.text) >= section.min_characters:
                for text in (text for found, text in record.parts if found == kind):
                    n_texts += 1
                    yield text

    kinds: tuple[Kind, ...] = ("document", "query")
    encoded = sum(encode_missing(recipe, teacher, read(kind), kind) for kind in kinds)
    if not n_texts:
        do = "look at the files, and at corpus.min_characters and bad_rows"
        raise UsageError("corpus", "no text in it", "one at the very least", do)
    return encoded


def open_teacher(recipe: Recipe, cache_dir: Path) -> CachedTeacher:
    """Return a recipe's teacher with its cache: one whose weights are found, or one behind an endpoint."""
    section = recipe.teacher
    if section.api:
        encoder: Encoder = EndpointEncoder(
            section.api, section.model, key_variable=section.api_key_variable, prompts=section.prompts
        )
    else:
        models_dir = cache_dir / "models"
        located = locate(section.model, section.revision, models_dir=models_dir, prompts=section.prompts)
        encoder = LocalEncoder(located, choose_dtype(section.dtype))
    return CachedTeacher(encoder, cache_dir / "embeddings", recipe.encoding.storage)


def encode_missing(recipe: Recipe, teacher: CachedTeacher, texts: Iterable[str], kind: Kind) -> int:
    """Encode the texts that the cache lacks by the engine that a recipe names; return how many that were."""
    section = recipe.encoding
    if section.engine == "local":
        return teacher.encode_missing(texts, kind)
    spec = TeacherSpec(recipe.teacher.model, recipe.teacher.revision, prompts=recipe.teacher.prompts)
    return encode_on_ray(
        texts,
        kind,
        teacher.cache(kind),
        spec,
        store=section.store,
        workers=section.workers,
        cores=section.cores,
        gpus=section.gpus,
    )


def import_embeddings(
    file: Path,
    teacher: str | Recipe | None = None,
    cache_dir: str | Path | None = None,
    *,
    text_column: str = "text",
    embedding_column: str = "embedding",
    kind: Kind = "plain",
) -> int:
    """Take the vectors of a parquet file into the cache, and return how many it lacked.

    Args:
        file: With a column of texts and one of vectors.
        teacher: Whose they are: a folder, a model id, or a recipe, which has prompts, a revision and number formats. A
            sample is compared with its own vectors. Default: as the file says, where embedistill wrote it.
        cache_dir: Folder for models and teacher embeddings; default: `default_cache_dir()`.
        text_column: Column of the texts.
        embedding_column: Column of the vectors.
        kind: What the texts are to a teacher that tells queries from documents.

    Raises:
        UsageError: The file is none of these, names no teacher, or has vectors of another.
    """
    folder = Path(cache_dir or default_cache_dir())
    if teacher is None:
        encoding = read_encoding(file)
        if encoding is None:
            raise UsageError(str(file), "it does not say whose vectors these are", do="give --teacher")
        cache = EmbeddingCache(folder / "embeddings", encoding)
    else:
        if isinstance(teacher, Recipe):
            cached = open_teacher(teacher, folder)
        else:
            located = locate(teacher, models_dir=folder / "models")
            cached = CachedTeacher(LocalEncoder(located, choose_dtype("auto")), folder / "embeddings")
        texts, vectors = next(read_embeddings(file, text_column, embedding_column), ([], np.empty((0, 0), np.float32)))
        _check_same(file, cached.encoder, kind, texts[:_COMPARED], vectors[:_COMPARED])
        cache = cached.cache(kind)
    return import_vectors(cache, file, text_column, embedding_column)


def _check_same(file: Path, encoder: Encoder, kind: Kind, texts: Sequence[str], vectors: Embeddings) -> None:
    """Make sure that vectors are what a teacher makes of their texts; another dimension is found later."""
    if not texts:
        return
    own = encoder.run(encoder.prepare(texts, kind), lambda _: None)[0].vectors
    if own.shape != vectors.shape:
        return
    cosine = float(np.einsum("nd,nd->n", own, Encoded.of(vectors).vectors).min())
    if not cosine > _SAME:
        found = f"vectors with cosine {cosine:.3f} to {encoder.describe(kind, 'float32')['teacher']}'s own"
        raise UsageError(str(file), found, f"above {_SAME}", "give the teacher that they are of")
