"""Which layers of a teacher to keep: a search on texts without labels, of seconds, instead of a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from embedistill.architectures import architecture_of, find_layers, keep_layers
from embedistill.encoding.packed import PackedBody, can_pack, group
from embedistill.progress import progress_bar
from embedistill.student.head import Matrix

_TEXTS = 128
_TEXTS_PADDED = 32  # where every candidate is run as a whole


def search_layers(teacher: SentenceTransformer, count: int, texts: Sequence[str], targets: Matrix) -> list[int]:
    """Return the layers whose truncated model follows its teacher best, ascending, counted from 0.

    Layers are left out one by one: each time the one without which the similarities of the texts correlate best with
    the teacher's. The models that are compared are cut, not trained.

    Args:
        teacher: The teacher, in fp32; it is left as it is.
        count: How many to keep.
        texts: Texts that nothing else is fitted on, as the model sees them; the first 128 are used.
        targets: The teacher's vectors of these texts, shape (n_texts, dim).
    """
    kept = list(range(len(find_layers(teacher[0].model))))
    must = {0} if architecture_of(teacher[0].model).norm_first else set()
    n_texts = min(len(texts), _TEXTS if can_pack(teacher[0].model) else _TEXTS_PADDED)
    run = (_Packed if can_pack(teacher[0].model) else _Whole)(teacher, texts[:n_texts])
    wanted = _similarities(torch.from_numpy(targets[:n_texts]))
    rounds = len(kept) - count
    with progress_bar("layers are searched", rounds, "layers") as advance:
        for _ in range(rounds):
            candidates = [[other for other in kept if other != layer] for layer in kept if layer not in must]
            kept = max(candidates, key=lambda layers: _correlate(_similarities(run(layers)), wanted))
            advance(1)
    return kept


class _Packed:
    """Embeds texts with some layers of a packed model, from the longest part that was run before."""

    def __init__(self, teacher: SentenceTransformer, texts: Sequence[str]) -> None:
        self._pooling: Any = teacher[1]
        tokenizer: Any = teacher.tokenizer
        ids = tokenizer(list(texts), truncation=True, max_length=teacher.max_seq_length)["input_ids"]
        self._order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        ordered = [torch.tensor(ids[number]) for number in self._order]
        self._groups = group(ordered)
        self._body = PackedBody(teacher[0].model, torch.bfloat16)
        with torch.inference_mode():
            self._states: dict[tuple[int, ...], Tensor] = {(): self._body.embed(ordered)}

    @torch.inference_mode()
    def __call__(self, layers: list[int]) -> Tensor:
        done = max((part for part in self._states if part == tuple(layers[: len(part)])), key=len)
        hidden = self._states[done]
        for number in layers[len(done) :]:
            hidden = self._body.feed(number, self._body.mix(number, hidden, self._groups))
            done = (*done, number)
            if done == tuple(range(len(done))):  # what most candidates begin with
                self._states[done] = hidden
        runs = [hidden[first : first + n * length].view(n, length, -1) for first, n, length in self._groups]
        pooled = torch.cat([_pool(self._pooling, states) for states in runs])
        return torch.empty_like(pooled).index_copy_(0, torch.tensor(self._order), pooled)


class _Whole:
    """Embeds texts with some layers of a model of any architecture."""

    def __init__(self, teacher: SentenceTransformer, texts: Sequence[str]) -> None:
        self._teacher, self._texts = teacher, list(texts)

    @torch.inference_mode()
    def __call__(self, layers: list[int]) -> Tensor:
        transformer: Any = self._teacher[0]
        whole = find_layers(transformer.model)
        config = transformer.model.config
        depth = architecture_of(transformer.model).depth
        before = {name: getattr(config, name) for name in (depth, "layer_types") if hasattr(config, name)}
        try:
            keep_layers(transformer.model, layers)
            body = SentenceTransformer(modules=[transformer, self._teacher[1]], device=str(self._teacher.device))
            found: Tensor = body.encode(self._texts, convert_to_tensor=True, show_progress_bar=False).cpu()
            return found
        finally:
            _put_back(transformer.model, whole, before)


def _put_back(model: Any, layers: nn.ModuleList, settings: dict[str, Any]) -> None:
    parent, _, name = architecture_of(model).stack.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)
    for key, value in settings.items():
        setattr(model.config, key, value)


def _pool(pooling: Any, states: Tensor) -> Tensor:
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    pooled: Tensor = pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    return pooled


def _similarities(vectors: Tensor) -> Tensor:
    unit = nn.functional.normalize(vectors.float(), dim=1)
    rows, columns = np.triu_indices(len(unit), 1)
    return (unit @ unit.T)[rows, columns]


def _correlate(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])
