"""A narrow model of selected parts of a wide one: hidden dimensions, heads, neurons. It works for every architecture.

Nothing is fitted: what is kept is copied as it is. Where a head gets smaller, its queries and keys are scaled so that
attention scores keep their size, and where it gets larger, it is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from embedistill.architectures import Architecture, Sizes, architecture_of, find_layers, find_words, resize
from embedistill.encoding.packed import group
from embedistill.errors import UsageError

_FUSED = "attn.Wqkv"  # queries, keys and values where they are one map
_BATCH = 32  # texts


@dataclass(frozen=True)
class _Cut:
    """Where the parts of a layer are, which hidden dimensions are kept, and the sizes of a head before and after."""

    names: Architecture
    hidden: Tensor
    old: int
    new: int


@torch.no_grad()
def select_narrow(
    teacher: Any, sizes: Sizes, layers: list[int], dimensions: Tensor | None = None, ids: Sequence[Tensor] = ()
) -> Any:
    """Return a narrow transformers model whose weights are selected ones of a teacher's.

    Args:
        teacher: The transformers model, of any architecture that is supported; it is left as it is.
        sizes: What the student shall have; the vocabulary is the teacher's.
        layers: Which of the teacher's layers it keeps, ascending.
        dimensions: Which hidden dimensions it keeps, ascending; None: those that vary most on the texts, or without
            texts among the word embeddings.
        ids: The token ids of some hundred texts, on which neurons are weighed; without any the first are kept.

    Raises:
        UsageError: Rotary positions need a head of an even number of dimensions.
    """
    names = architecture_of(teacher)
    n_heads = getattr(teacher.config, names.heads)
    old, new = getattr(teacher.config, names.width) // n_heads, sizes.hidden_size // sizes.num_attention_heads
    if names.norm_first and new % 2:
        do = "choose another number of heads, or another width"
        raise UsageError("student.num_attention_heads", f"heads of {new} dimensions", "an even number of them", do)
    variance, neurons = _measure(teacher, layers, ids)
    hidden = _largest(variance, sizes.hidden_size) if dimensions is None else dimensions
    cut = _Cut(names, hidden, old, new)
    kept = [find_layers(teacher)[layer] for layer in layers]
    heads = choose_heads(kept, names, n_heads, sizes.num_attention_heads)
    student = AutoModel.from_config(resize(teacher.config, sizes, layers), dtype=teacher.dtype)
    _copy_rest(student, teacher, hidden, heads[0])
    for own, layer, some, weights in zip(find_layers(student), kept, heads, neurons, strict=True):
        _copy_attention(own, layer, cut, some)
        _copy_feed(own, layer, cut, _largest(weights, sizes.intermediate_size))
    return student.eval()


def _measure(teacher: Any, layers: list[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return how much hidden dimensions vary, shape (hidden,), and how much each layer's neurons add, (inner,)."""
    names = architecture_of(teacher)
    maps: list[Any] = [find_layers(teacher)[layer].get_submodule(names.shrink) for layer in layers]
    if not ids:
        return find_words(teacher).weight.var(0), [torch.arange(-1, -1 - part.in_features, -1) for part in maps]
    with _watch(maps) as squares:
        shares = _measure_states(teacher, ids)
    return shares, [squares[part].sqrt() * part.weight.norm(dim=0) for part in maps]


def _measure_states(teacher: Any, ids: Sequence[Tensor]) -> Tensor:
    """Return the share of each hidden dimension in the variance of a state, the mean over the states of all layers."""
    total = square = torch.zeros(())
    for batch in _batches(ids):
        found = teacher(input_ids=batch, attention_mask=torch.ones_like(batch), output_hidden_states=True)
        total = total + torch.stack([states.sum((0, 1), dtype=torch.double) for states in found.hidden_states])
        square = square + torch.stack(
            [states.square().sum((0, 1), dtype=torch.double) for states in found.hidden_states]
        )
    n_tokens = sum(len(text) for text in ids)
    variance = square / n_tokens - (total / n_tokens).square()
    return (variance / variance.mean(1, keepdim=True)).mean(0)


@contextmanager
def _watch(maps: Sequence[Any]) -> Iterator[dict[Any, Tensor]]:
    """Yield the sums of squares (n_in,) of what linear maps read in the meantime."""
    squares: dict[Any, Tensor] = {}

    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        squares[module] = squares.get(module, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(0)

    hooks = [part.register_forward_pre_hook(add) for part in maps]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _batches(ids: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the ids of texts of equal length, shape (n_texts, n_tokens), so that nothing is padding."""
    ordered = sorted(ids, key=len)
    start = 0
    for _, n_texts, _ in group([len(text) for text in ordered]):
        for first in range(start, start + n_texts, _BATCH):
            yield torch.stack(ordered[first : min(first + _BATCH, start + n_texts)])
        start += n_texts


def choose_heads(layers: Sequence[Any], names: Architecture, n_heads: int, count: int) -> list[Tensor]:
    """Return which heads each layer keeps: those that write most; the same in all layers where they share a bias."""
    written = torch.stack([_weigh_written(layer, names).view(n_heads, -1).norm(dim=1) for layer in layers])
    if names.shared_bias:
        written = (written / written.mean(1, keepdim=True)).mean(0).expand_as(written)
    return [_largest(weight, count) for weight in written]


def _weigh_written(layer: Any, names: Architecture) -> Tensor:
    """Return how much each dimension of a layer's values writes: its norm, times that of its output."""
    value, _ = _read_projections(layer, names)[2]
    written: Tensor = value.norm(dim=1) * layer.get_submodule(names.join).weight.norm(dim=0)
    return written


def _read_projections(layer: Any, names: Architecture) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of queries, keys and values, also where one map gives all three."""
    if names.query is not None:
        parts = [layer.get_submodule(name) for name in (names.query, names.key, names.value)]
        return [(part.weight, part.bias) for part in parts]
    fused = layer.get_submodule(_FUSED)
    biases = [None] * 3 if fused.bias is None else fused.bias.chunk(3)
    return list(zip(fused.weight.chunk(3), biases, strict=True))


def _copy_rest(student: Any, teacher: Any, hidden: Tensor, heads: Tensor) -> None:
    """Copy what is in no layer: tables, norms, the position bias of heads; a pooler the teacher has not is zero."""
    names = architecture_of(teacher)
    given = dict(teacher.named_modules())
    for name, own in student.named_modules():
        if name.startswith(f"{names.stack}.") or not isinstance(own, nn.Embedding | nn.LayerNorm | nn.Linear):
            continue
        if name not in given:
            for parameter in own.parameters():
                parameter.zero_()
        elif isinstance(own, nn.Embedding):
            own.weight.copy_(given[name].weight[:, heads if name == names.shared_bias else hidden])
        else:
            _copy(own, given[name], hidden, hidden if isinstance(own, nn.Linear) else None)


def _copy_attention(own: Any, layer: Any, cut: _Cut, heads: Tensor) -> None:
    """Copy the kept dimensions of the kept heads, queries and keys scaled, and what follows them."""
    names, hidden, scale = cut.names, cut.hidden, (cut.new / cut.old) ** 0.25
    scored, valued = _choose_rows(layer, cut, heads)
    maps = zip(_read_projections(own, names), _read_projections(layer, names), strict=True)
    for ((weight, bias), given), rows, factor in zip(maps, (scored, scored, valued), (scale, scale, 1.0), strict=True):
        weight.copy_(_pick(given[0], rows, hidden) * factor)
        if bias is not None and given[1] is not None:
            bias.copy_(_pick(given[1], rows) * factor)
    _copy(own.get_submodule(names.join), layer.get_submodule(names.join), hidden, valued)
    norm = layer.get_submodule(names.attention_norm)
    if not isinstance(norm, nn.Identity):
        _copy(own.get_submodule(names.attention_norm), norm, hidden)


def _choose_rows(layer: Any, cut: _Cut, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows of queries and keys, and which of values, make heads of a new size; -1 stands for none."""
    names, old, new = cut.names, cut.old, cut.new
    (query, _), (key, _), _ = _read_projections(layer, names)
    scores = (query.norm(dim=1) * key.norm(dim=1)).view(-1, old)[heads]
    values = _weigh_written(layer, names).view(-1, old)[heads]
    scored = [_match_pairs(old, new) if names.norm_first else _largest(weight, new) for weight in scores]
    valued = [_largest(weight, new) for weight in values]
    first = heads[:, None] * old
    scored_rows, valued_rows = (
        torch.where(found < 0, found, found + first).flatten() for found in (torch.stack(scored), torch.stack(valued))
    )
    return scored_rows, valued_rows


def _match_pairs(old: int, new: int) -> Tensor:
    """Return which dimensions of a head come where in a head of another size, so that rotary frequencies stay near.

    Pair i of n, dimensions i and n + i, turns by base^(-i / n) a token: near is what lies at about the same i / n.
    """
    few, many = sorted((old // 2, new // 2))
    nearest = (torch.arange(few) * many / few + 0.5).long()
    pairs = nearest
    if new > old:
        pairs = torch.full((many,), -1)
        pairs[nearest] = torch.arange(few)
    return torch.cat([pairs, torch.where(pairs < 0, pairs, pairs + old // 2)])


def _copy_feed(own: Any, layer: Any, cut: _Cut, inner: Tensor) -> None:
    """Copy the kept neurons, with their gates where they have some, and the norm."""
    names, hidden = cut.names, cut.hidden
    grow, shrink = layer.get_submodule(names.grow), layer.get_submodule(names.shrink)
    rows = torch.cat([inner + start for start in range(0, grow.out_features, shrink.in_features)])
    _copy(own.get_submodule(names.grow), grow, rows, hidden)
    _copy(own.get_submodule(names.shrink), shrink, hidden, inner)
    _copy(own.get_submodule(names.output_norm), layer.get_submodule(names.output_norm), hidden)


def _copy(own: Any, given: Any, rows: Tensor, columns: Tensor | None = None) -> None:
    own.weight.copy_(_pick(given.weight, rows, columns))
    if given.bias is not None:
        own.bias.copy_(_pick(given.bias, rows))


def _pick(tensor: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return some rows, and some columns of them; zeros where the number is -1."""
    padded = functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, 1))
    return padded[rows] if columns is None else _pick(padded[rows].T, columns).T


def _largest(weights: Tensor, count: int) -> Tensor:
    """Return the places of the largest weights, ascending, filled up with -1 where there are too few."""
    kept = weights.argsort(descending=True, stable=True)[:count].sort().values
    return functional.pad(kept, (0, count - len(kept)), value=-1)
