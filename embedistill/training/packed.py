"""Texts of any length in one batch, with little padding or none.

A BERT-like student trains as `embedistill.encoding.packed` encodes, with gradients: all tokens of a batch are the rows
of one matrix, attention is taken over texts of like length at a time, padded to the longest of them. Attention and its
gradient are written out, because the fused ones of torch are, on processors, several times as slow on the many short
texts of a batch. Any other transformer runs, on processors, the texts of a batch in a few runs of like length; on a
GPU, which starts many small products no faster than a large one, it is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from embedistill.architectures import architecture_of, find_layers
from embedistill.encoding.packed import find_padding, group, is_bert_like, positions_of

_PADDING = {"cpu": 64, "cuda": 16_384}  # tokens that cost about as much as another run of texts


@contextmanager
def without_padding(student: SentenceTransformer, dtype: torch.dtype) -> Iterator[None]:
    """Let a student's body run without padding for a while, or with little; what it gives stays as it is.

    Args:
        student: Its first module's transformer is given another `forward`. Dropout is left out: it must be off.
        dtype: Number format of the products by token and of the attention.
    """
    body: Any = getattr(student[0], "model", None)
    device, packs = student.device.type, is_bert_like(body)
    fit = body is not None and getattr(student.tokenizer, "padding_side", "") == "right"
    if not fit or device not in _PADDING or (device != "cpu" and not packs):
        yield
        return
    if not packs:
        with in_runs(body):
            yield
        return
    body.forward = _Forward(body, dtype)
    try:
        yield
    finally:
        del body.forward


@contextmanager
def in_runs(body: Any) -> Iterator[None]:
    """Let a transformer take the texts of a batch in runs of like length for a while; what it gives stays as it is."""
    body.forward = _Runs(body.forward)
    try:
        yield
    finally:
        del body.forward


def list_runs(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Return the rows of each run of a batch, and the tokens that its texts are padded to.

    All texts are one run, as they stand, on a GPU, and where padding does not stand behind them.

    Args:
        mask: Not zero where there is a token, shape (n_texts, n_tokens).
    """
    whole = [(torch.arange(len(mask), device=mask.device), mask.shape[1])]
    if mask.device.type != "cpu" or not mask[:, 0].all():
        return whole
    lengths, order = mask.sum(1).sort(stable=True)
    runs, text = [], 0
    for _, n_texts, longest in group(_pad(lengths.tolist(), _PADDING["cpu"])):
        runs.append((order[text : text + n_texts], longest))
        text += n_texts
    return runs if len(runs) > 1 else whole


class _Runs:
    """A forward pass in runs of texts of like length, each padded to its own longest."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, **given: Any) -> BaseModelOutput:
        """Return last hidden states, those of tokens as the model would."""
        mask = given["attention_mask"]
        runs = list_runs(mask)
        if len(runs) == 1:
            return cast(BaseModelOutput, self._forward(**given))
        found = []
        for rows, longest in runs:
            cut = {
                name: value[rows, :longest] if isinstance(value, Tensor) and value.shape == mask.shape else value
                for name, value in given.items()
            }
            found.append(functional.pad(self._forward(**cut).last_hidden_state, (0, 0, 0, mask.shape[1] - longest)))
        order = torch.cat([rows for rows, _ in runs])
        return BaseModelOutput(last_hidden_state=torch.cat(found)[order.argsort()])


class _Forward:
    def __init__(self, body: Any, dtype: torch.dtype) -> None:
        self._body, self._dtype, self._names = body, dtype, architecture_of(body)
        self._heads = int(getattr(body.config, self._names.heads))

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **others: Any
    ) -> BaseModelOutput:
        """Return last hidden states as the model would, zeros where there is padding."""
        (n_texts, longest), device = input_ids.shape, input_ids.device
        lengths, order = attention_mask.sum(1).cpu().sort(stable=True)
        padded = torch.tensor(_pad(lengths.tolist(), _PADDING[device.type]))
        columns = torch.arange(longest)
        taken, real = (columns < some[:, None] for some in (padded, lengths))
        places, kept = (order[:, None] * longest + columns)[taken].to(device), real[taken].nonzero()[:, 0].to(device)
        runs = _list_runs(lengths, padded, device)
        given = {"input_ids": input_ids, "position_ids": positions_of(input_ids, find_padding(self._body))}
        if token_type_ids is not None and hasattr(self._body.embeddings, "token_type_embeddings"):
            given["token_type_ids"] = token_type_ids
        chosen = {name: ids.expand_as(input_ids).reshape(1, -1)[:, places] for name, ids in given.items()}
        with torch.autocast(device.type, enabled=False):
            hidden = self._body.embeddings(**chosen)[0]
            bias = self._position_bias(longest, device)
            for layer in find_layers(self._body):
                hidden = self._run_layer(layer, hidden, runs, bias)
        states = hidden.new_zeros(n_texts * longest, hidden.shape[1]).index_copy(0, places[kept], hidden[kept])
        return BaseModelOutput(last_hidden_state=states.view(n_texts, longest, -1))

    def _position_bias(self, length: int, device: torch.device) -> Tensor | None:
        """Return MPNet's relative position biases, (1, heads, length, length)."""
        if self._names.shared_bias is None:
            return None
        bias: Tensor = self._body.encoder.compute_position_bias(torch.zeros(1, length, 1, device=device))
        return bias.to(self._dtype)

    def _run_layer(self, layer: Any, hidden: Tensor, runs: Sequence[_Run], bias: Tensor | None) -> Tensor:
        names, low = self._names, hidden.to(self._dtype)
        join, grow, shrink = (layer.get_submodule(name) for name in (names.join, names.grow, names.shrink))
        parts = [layer.get_submodule(str(name)) for name in (names.query, names.key, names.value)]
        weight, offset = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        multiply: Any = _Product.apply
        attend: Any = _Attention.apply
        mixed = attend(multiply(low, weight, offset), bias, runs, self._heads)
        hidden = layer.get_submodule(names.attention_norm)(hidden + multiply(mixed, join.weight, join.bias))
        grown = functional.gelu(multiply(hidden.to(self._dtype), grow.weight, grow.bias))
        out: Tensor = layer.get_submodule(names.output_norm)(hidden + multiply(grown, shrink.weight, shrink.bias))
        return out


class _Product(Function):
    """x W^T + b in the number format of x (n_tokens, from), of weights in theirs (to, from)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.kept_as = weight.dtype
        return functional.linear(x, low, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        by_bias = grad.new_ones(1, len(grad)) @ grad  # a product: sums down columns are slow
        return grad @ weight, (grad.T @ x).to(ctx.kept_as), by_bias[0].to(ctx.kept_as)


class _Attention(Function):
    """softmax(Q K^T / sqrt(d) + bias) V of projected texts (n_tokens, 3 width), a run at a time."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, bias: Tensor | None, runs: Sequence[_Run], heads: int) -> Tensor:
        mixed = projected.new_empty(len(projected), projected.shape[1] // 3)
        shares = []
        for one in runs:
            (query, key, value), length = _split(projected, one, heads, 3).contiguous(), one.length
            scores = (query @ key.mT).mul_(query.shape[-1] ** -0.5)
            if bias is not None:
                scores += bias[:, :, :length, :length]
            if one.padding is not None:
                scores.masked_fill_(one.padding, -torch.inf)
            shares.append(scores.softmax(-1))
            _split(mixed, one, heads, 1)[0].copy_(shares[-1] @ value)
        ctx.save_for_backward(projected, bias, *shares)
        ctx.runs, ctx.heads = runs, heads
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        projected, bias, *shares = ctx.saved_tensors
        by_projected = torch.empty_like(projected)
        by_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[1] else None
        for one, share in zip(ctx.runs, shares, strict=True):
            (query, key, value), length = _split(projected, one, ctx.heads, 3).contiguous(), one.length
            (grad,) = _split(grads[0], one, ctx.heads, 1).contiguous()
            by_scores = torch._softmax_backward_data(grad @ value.mT, share, -1, share.dtype)
            if by_bias is not None:
                by_bias[:, :, :length, :length] += by_scores.sum(0)
            by_scores.mul_(query.shape[-1] ** -0.5)
            by_query, by_key, by_value = _split(by_projected, one, ctx.heads, 3)
            by_query.copy_(by_scores @ key)
            by_key.copy_(by_scores.mT @ query)
            by_value.copy_(share.mT @ grad)
        return by_projected, by_bias, None, None


class _Run(NamedTuple):
    """Texts of like length: first row, how many, rows of each, and where these are padding, (n_texts, 1, 1, length)."""

    first: int
    n_texts: int
    length: int
    padding: Tensor | None


def _list_runs(lengths: Tensor, padded: Tensor, device: torch.device) -> list[_Run]:
    """Return the runs of texts of these lengths, in rising order, that are padded to these."""
    runs, text = [], 0
    for first, n_texts, length in group(padded.tolist()):
        padding = torch.arange(length) >= lengths[text : text + n_texts, None, None, None]
        runs.append(_Run(first, n_texts, length, padding.to(device) if padding.any() else None))
        text += n_texts
    return runs


def _pad(lengths: Sequence[int], most: int) -> list[int]:
    """Return lengths, in rising order, raised to those of longer texts by at most so many tokens of padding a run."""
    padded = list(lengths)
    cost = 0
    for place in range(len(lengths) - 2, -1, -1):
        cost += padded[place + 1] - lengths[place]
        if cost <= most:
            padded[place] = padded[place + 1]
        else:
            cost = 0
    return padded


def _split(rows: Tensor, one: _Run, heads: int, parts: int) -> Tensor:
    """Return a view of a run's rows (n_tokens, parts x width) as (parts, n_texts, heads, length, d)."""
    first, n_texts, length, _ = one
    some = rows[first : first + n_texts * length]
    return some.view(n_texts, length, parts, heads, -1).permute(2, 0, 3, 1, 4)
