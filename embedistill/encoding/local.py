"""Encode texts with a model's weights, as fast as the machine can."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)

from embedistill.cache.shards import Encoded, Vectors
from embedistill.choices import Kind, Storage
from embedistill.encoding.packed import PackedBody, can_pack, count_flops
from embedistill.progress import note, progress_bar
from embedistill.teacher import LocatedModel, encode, find_prompt, load

Batch = tuple[Sequence[int], Vectors, int]
"""Numbers of the texts of a batch, their vectors, and how many tokens of padding it had."""

_BY_KIND = ("query_length", "document_length", "query_expansion")  # of a transformer that tells queries from documents
_TOKENISED_TOGETHER = 256
_PACKED_TOKENS = (128, 4096)  # of a batch of one core
_PADDED_TOKENS = {"cpu": 4096, "mps": 16_384, "cuda": 131_072}


@dataclass(frozen=True)
class Effort:
    """What an encoding took.

    Attributes:
        texts: How many were encoded.
        tokens: What the model saw of them.
        padding: Tokens of padding beside these.
        seconds: From the first text to the last.
        flops: Floating-point operations of the layers, those on padding left out; 0: not known.
    """

    texts: int = 0
    tokens: int = 0
    padding: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    @property
    def waste(self) -> float:
        """Share of the model's tokens that were padding."""
        return self.padding / max(1, self.tokens + self.padding)

    def __add__(self, other: Effort) -> Effort:
        """Return both together."""
        return Effort(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Prepared:
    """Texts ready for the model: token ids of each, or the texts alone where the model has no tokens.

    Attributes:
        texts: The texts.
        kind: What they are.
        ids: Token ids of each, int64.
        cut: Whether the model does not see all of a text.
        extra: Further features of the tokeniser, such as the length of the prompt.
    """

    texts: Sequence[str]
    kind: Kind
    ids: list[torch.Tensor] = field(default_factory=list)
    cut: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    extra: dict[str, Any] = field(default_factory=dict)


class LocalEncoder:
    """A teacher that runs here.

    Layers run in `dtype`; pooling and all that follows it in fp32. A BERT-like model on processors runs without
    padding, a batch a core; another one, or one on an accelerator, in padded batches of like length. What is no
    transformer with pooling (a Router, static embeddings, padding on the left) is left to sentence-transformers.

    Args:
        located: The teacher.
        dtype: Number format of its layers.
        products: Number format of the products of layers that run without padding, whose other parts are in fp32
            always; default: `dtype`.
    """

    window = 8192
    """Texts that are sorted by length together, and stored together."""

    def __init__(self, located: LocatedModel, dtype: torch.dtype, products: torch.dtype | None = None) -> None:
        self.located, self.dtype, self.products = located, dtype, products or dtype
        self._padded_tokens: int | None = None

    @functools.cached_property
    def model(self) -> SentenceTransformer:
        """The model in fp32, loaded when it is first needed."""
        return load(self.located).eval()

    @functools.cached_property
    def _packed(self) -> PackedBody | None:
        body = getattr(self.model[0], "model", None)
        return PackedBody(body, self.products) if can_pack(body) else None

    @functools.cached_property
    def _body(self) -> Any:
        """The first module in the number format of the layers; nothing else needs it in fp32."""
        return self.model[0].to(self.dtype)

    @functools.cached_property
    def _whole(self) -> SentenceTransformer:
        """The model as sentence-transformers runs it, in the number format of the layers."""
        return load(self.located, self.dtype)

    @functools.cached_property
    def _tokenised(self) -> bool:
        """Whether it is a transformer on right-padded tokens and modules that need its last hidden states alone."""
        first, *others = self.model
        return (
            type(first) is Transformer
            and first.module_output_name == "token_embeddings"
            and not any(getattr(first, name, None) for name in _BY_KIND)
            and getattr(first.tokenizer, "padding_side", "") == "right"
            and self.model.truncate_dim is None
            and all(type(module) in {Pooling, Dense, Normalize, LayerNorm, Dropout} for module in others)
        )

    def describe(self, kind: Kind, storage: Storage) -> dict[str, Any]:
        """Return everything that changes a vector: the key of a cache.

        The modules' own configuration stands for pooling, normalisation and whatever else a teacher does.
        """
        first: Any = self.model[0]
        tells_kinds = type(first).__name__ == "Router" or any(getattr(first, name, None) for name in _BY_KIND)
        length = self.model.max_seq_length
        return {
            "teacher": self.located.name,
            "weights_sha256": self.located.weights_sha256,
            "settings_sha256": self.located.settings_sha256,
            "prompt": find_prompt(self.model, kind),
            "task": kind if tells_kinds else None,
            "max_seq_length": length if length and math.isfinite(length) else None,  # a static model reads to the end
            "modules": [repr(module) for module in self.model][1:],
            "normalised": True,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "storage_dtype": storage,
            "dim": self.model.get_embedding_dimension(),
        }

    def check_same(self, folder: Path) -> None:
        """Do nothing: the sum of its weights is in the key."""

    def prepare(self, texts: Sequence[str], kind: Kind) -> Prepared:
        """Tokenise texts. It may be called in another thread, while the model runs."""
        if not self._tokenised:
            return Prepared(texts, kind)
        prompt = find_prompt(self.model, kind)
        ids: dict[int, torch.Tensor] = {}
        extra: dict[str, Any] = {}
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), _TOKENISED_TOGETHER):
            numbers = order[start : start + _TOKENISED_TOGETHER]
            features = self.model.preprocess([texts[number] for number in numbers], prompt=prompt or None)
            mask = features.pop("attention_mask")
            for number, row, length in zip(numbers, features.pop("input_ids"), mask.sum(1).tolist(), strict=True):
                ids[number] = row[:length].clone()
            extra = {name: value for name, value in features.items() if not isinstance(value, torch.Tensor)}
        found = [ids[number] for number in range(len(texts))]
        return Prepared(texts, kind, found, self._find_cut(texts, prompt, found), extra)

    def run(self, prepared: Prepared, advance: Callable[[int], None] = lambda _: None) -> tuple[Encoded, Effort]:
        """Encode prepared texts and say what it took; `advance` is told how many are done, batch by batch."""
        start = time.perf_counter()
        lengths = [len(ids) for ids in prepared.ids]
        raw = np.empty((len(prepared.texts), self.model.get_embedding_dimension() or 0), np.float32)
        padding = 0
        for numbers, vectors, padded in self._run_batches(prepared):
            raw[numbers] = vectors
            padding += padded
            advance(len(numbers))
        flops = count_flops(self.model[0].model, lengths) if lengths else 0.0
        effort = Effort(len(raw), sum(lengths), padding, time.perf_counter() - start, flops)
        return Encoded.of(raw, np.array(lengths or [0] * len(raw), np.int32), prepared.cut if lengths else None), effort

    def _run_batches(self, prepared: Prepared) -> Iterator[Batch]:
        if not prepared.ids:
            yield from self._run_plain(prepared)
        elif self._packed:
            yield from self._run_packed(prepared, self._packed)
        else:
            yield from self._run_padded(prepared)

    def _run_packed(self, prepared: Prepared, body: PackedBody) -> Iterator[Batch]:
        least, most = _PACKED_TOKENS
        budget = min(most, max(least, sum(len(ids) for ids in prepared.ids) // 8))

        def run(numbers: Sequence[int]) -> Batch:
            runs = body.forward([prepared.ids[number] for number in numbers])
            vectors = [self._pool(hidden, None, prepared.extra) for hidden in runs]
            return numbers, np.concatenate(vectors), 0

        with one_thread_a_batch() as pool:
            yield from pool.map(run, cut_batches([len(ids) for ids in prepared.ids], budget, padded=False))

    def _run_padded(self, prepared: Prepared) -> Iterator[Batch]:
        """Run batches of like length, in smaller ones for ever where the device's memory does not do for one."""
        lengths = [len(ids) for ids in prepared.ids]
        device = self.model.device
        self._padded_tokens = self._padded_tokens or _PADDED_TOKENS.get(device.type, 4096)
        batches = list(cut_batches(lengths, self._padded_tokens, padded=True))[::-1]
        while batches:
            numbers = batches.pop()
            try:
                vectors = self._run_one_padded([prepared.ids[number] for number in numbers], prepared.extra)
            except RuntimeError as error:
                if len(numbers) == 1 or "out of memory" not in str(error).lower():
                    raise
                torch.cuda.empty_cache()  # nothing where there is no CUDA
                self._padded_tokens //= 2
                note(f"Out of memory on {device}: batches of {self._padded_tokens:,} tokens from here on")
                left = [number for batch in [numbers, *batches[::-1]] for number in batch]
                parts = cut_batches([lengths[number] for number in left], self._padded_tokens, padded=True)
                batches = [[left[place] for place in part] for part in parts][::-1]
                continue
            inside = [lengths[number] for number in numbers]
            yield numbers, vectors, len(inside) * max(inside) - sum(inside)

    @torch.inference_mode()
    def _run_one_padded(self, ids: list[torch.Tensor], extra: dict[str, Any]) -> Vectors:
        device = self.model.device
        pad = self.model.tokenizer.pad_token_id or 0
        mask = [torch.ones(len(row), dtype=torch.long) for row in ids]
        given = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }
        if device.type == "cuda":
            given = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in given.items()}
        else:
            given = {name: tensor.to(device) for name, tensor in given.items()}
        features = self._body({**given, **extra})
        return self._pool(features.pop("token_embeddings").float(), given["attention_mask"], extra)

    def _run_plain(self, prepared: Prepared) -> Iterator[Batch]:
        order = sorted(range(len(prepared.texts)), key=lambda number: -len(prepared.texts[number]))
        for start in range(0, len(order), _TOKENISED_TOGETHER):
            numbers = order[start : start + _TOKENISED_TOGETHER]
            texts = [prepared.texts[number] for number in numbers]
            yield numbers, encode(self._whole, texts, prepared.kind, unit=False), 0

    @torch.inference_mode()
    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor | None, extra: dict[str, Any]) -> Vectors:
        """Run all modules but the first on last hidden states (n_texts, n_tokens, hidden), in fp32."""
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.long)
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask, **extra}
        for module in list(self.model)[1:]:
            features = module(features)
        vectors: Vectors = features["sentence_embedding"].float().cpu().numpy()
        return vectors

    def _find_cut(self, texts: Sequence[str], prompt: str, ids: Sequence[torch.Tensor]) -> npt.NDArray[np.bool_]:
        """Say which texts have more tokens than the model sees; only those that fill it can."""
        limit = self.model.max_seq_length
        cut = np.array([limit is not None and len(row) >= limit for row in ids], np.bool_)
        for number in np.flatnonzero(cut).tolist():
            whole = self.model.tokenizer(prompt + texts[number], truncation=False, verbose=False)["input_ids"]
            cut[number] = len(whole) > len(ids[number])
        return cut


def cut_batches(lengths: Sequence[int], budget: int, *, padded: bool) -> Iterator[list[int]]:
    """Yield the numbers of texts in batches of like length, the longest first, with at most `budget` tokens each.

    Args:
        lengths: Tokens of each text.
        budget: Tokens of a batch; a text that is longer is a batch of its own.
        padded: Whether each text counts as much as the longest of its batch.
    """
    batch: list[int] = []
    total = longest = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        counted = max(longest, lengths[number]) * (len(batch) + 1) if padded else total + lengths[number]
        if batch and counted > budget:
            yield batch
            batch, total, longest = [], 0, 0
        batch.append(number)
        total += lengths[number]
        longest = max(longest, lengths[number])
    if batch:
        yield batch


@contextmanager
def one_thread_a_batch() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with a thread for each core, whose products do not spread over the others."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # setting a thread's number sets the default of threads to come


def encode_here(encoder: LocalEncoder, label: str, texts: Sequence[str], kind: Kind = "plain") -> Vectors:
    """Return the unit vectors of texts, shape (n_texts, dim), with a progress bar: as `run`, of any number of texts."""
    windows = [texts[start : start + encoder.window] for start in range(0, len(texts), encoder.window)]
    with progress_bar(f"{label} encodes", len(texts), "texts") as advance:
        found = [encoder.run(encoder.prepare(window, kind), advance)[0].vectors for window in windows]
    return np.concatenate([np.empty((0, encoder.model.get_embedding_dimension() or 0), np.float32), *found])
