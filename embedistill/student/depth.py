"""Which layers of a teacher to keep: a search on texts without labels, of seconds, instead of a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from embedistill.architectures import architecture_of, find_layers, keep_layers, set_layers
from embedistill.encoding.packed import PackedBody, can_pack, group, pool, rough_format
from embedistill.progress import note, progress_bar
from embedistill.student.head import Matrix, solve_ridge

SEARCH_TEXTS = 64
_LENGTH = 64  # tokens
_FEWEST_TEXTS = 4
_TEXTS_PADDED = 32  # where every candidate is run as a whole


def search_layers(
    teacher: SentenceTransformer, count: int, texts: Sequence[str], targets: Matrix, bridged_on: Sequence[str] = ()
) -> list[int]:
    """Return the layers whose truncated model follows its teacher best, ascending, counted from 0.

    Layers are left out one by one: each time the one without which the similarities of the texts correlate best with
    the teacher's. The models that are compared are not trained: layers are left out as they are or, where texts to
    bridge on are given, the least-squares map from what the one before them gives to what the one behind them reads is
    put in their place, as a student's fit will.

    Args:
        teacher: The teacher, in fp32; it is left as it is.
        count: How many to keep.
        texts: Texts that nothing else is fitted on, as the model sees them; the first 64 are used.
        targets: The teacher's vectors of these texts, shape (n_texts, dim).
        bridged_on: Some hundred other texts; none where the student will be cut, and not fitted.
    """
    kept = list(range(len(find_layers(teacher[0].model))))
    must = {0} if architecture_of(teacher[0].model).norm_first else set()
    packed = can_pack(teacher[0].model)
    n_texts = min(len(texts), SEARCH_TEXTS if packed else _TEXTS_PADDED)
    if n_texts < _FEWEST_TEXTS:
        note(f"{n_texts} texts are too few to search layers on: they are taken at even distances")
        return [number * (len(kept) - 1) // max(1, count - 1) for number in range(count)]
    run = _Packed(teacher, texts[:n_texts], bridged_on) if packed else _Whole(teacher, texts[:n_texts])
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

    def __init__(self, teacher: SentenceTransformer, texts: Sequence[str], bridged_on: Sequence[str]) -> None:
        self._pooling: Any = teacher[1]
        self._body = PackedBody(teacher[0].model, rough_format())
        ids, self._order = _tokenize(teacher, texts)
        self._groups = group([len(text) for text in ids])
        with torch.inference_mode():
            self._states: dict[tuple[int, ...], Tensor] = {(): self._body.embed(ids)}
            self._bridges = _Bridges(self._body, _tokenize(teacher, bridged_on)[0]) if bridged_on else None

    @torch.inference_mode()
    def __call__(self, layers: list[int]) -> Tensor:
        done = max((part for part in self._states if part == tuple(layers[: len(part)])), key=len)
        hidden, level = self._states[done], len(done)
        for number in [*layers[len(done) :], len(self._body.layers)]:
            if self._bridges and number > level:
                hidden = self._bridges.cross(hidden, level, number)
            if number < len(self._body.layers):
                hidden = self._body.feed(number, self._body.mix(number, hidden, self._groups))
                done, level = (*done, number), number + 1
                if done == tuple(range(len(done))):  # what most candidates begin with
                    self._states[done] = hidden
        runs = [hidden[first : first + n * length].view(n, length, -1) for first, n, length in self._groups]
        pooled = torch.cat([pool(self._pooling, states) for states in runs])
        return torch.empty_like(pooled).index_copy_(0, torch.tensor(self._order), pooled)


class _Bridges:
    """Least-squares maps between what layers of a model read."""

    def __init__(self, body: PackedBody, ids: list[Tensor]) -> None:
        groups = group([len(text) for text in ids])
        states = [body.embed(ids)]
        for number in range(len(body.layers)):
            states.append(body.feed(number, body.mix(number, states[-1], groups)))
        self._means = [state.mean(0) for state in states]
        self._states = [state.sub_(mean) for state, mean in zip(states, self._means, strict=True)]
        self._maps: dict[tuple[int, int], Tensor] = {}

    def cross(self, hidden: Tensor, level: int, wanted: int) -> Tensor:
        """Return what a layer would read, as far as what another one reads tells it."""
        if (level, wanted) not in self._maps:
            read, given = (self._states[number].numpy() for number in (level, wanted))
            self._maps[level, wanted] = torch.from_numpy(solve_ridge(read, given))
        return (hidden - self._means[level]) @ self._maps[level, wanted] + self._means[wanted]


def _tokenize(teacher: SentenceTransformer, texts: Sequence[str]) -> tuple[list[Tensor], list[int]]:
    """Return the token ids of texts from the shortest, and which text each is."""
    tokenizer: Any = teacher.tokenizer
    length = min(_LENGTH, teacher.max_seq_length or _LENGTH)
    ids = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    return [torch.tensor(ids[number]) for number in order], order


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
            set_layers(transformer.model, whole)
            for name, value in before.items():
                setattr(config, name, value)


def _similarities(vectors: Tensor) -> Tensor:
    unit = nn.functional.normalize(vectors.float(), dim=1)
    rows, columns = np.triu_indices(len(unit), 1)
    return (unit @ unit.T)[rows, columns]


def _correlate(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])
