"""A BERT-like model without padding, for processors: the tokens of a batch are the rows of one matrix.

Texts differ in length, and padding them costs. Every product but the attention's is by token, so all tokens of a batch
go through one product, whatever text they are of; attention is taken over texts of equal length at a time. Weights are
laid out for the processor once, where oneDNN can, and GELU and residual sums are fused into the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES = ("bert", "mpnet", "roberta", "xlm-roberta", "camembert")
_ROWS = 1024  # the number of rows that the layout of weights is chosen for

Group = tuple[int, int, int]
"""Texts of equal length: first row, number of texts, tokens of each."""


class PackedBody:
    """The layers of a BERT-like model in one number format; the model is left as it is.

    Args:
        model: A transformers model of one of `ARCHITECTURES`, on the CPU, in fp32.
        dtype: Number format of the products.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        self._dtype = dtype
        self._embeddings = model.embeddings
        self._typed = hasattr(model.embeddings, "token_type_embeddings")
        self._pad: int | None = None if config.model_type == "bert" else int(config.pad_token_id)
        self._layers = [_read_layer(layer, dtype) for layer in model.encoder.layer]
        self._bias: Tensor | None = None
        if config.model_type == "mpnet":
            longest = torch.zeros(1, config.max_position_embeddings, 1)
            with torch.inference_mode():
                self._bias = model.encoder.compute_position_bias(longest)[:1].to(dtype)

    @torch.inference_mode()
    def forward(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Return the last hidden states in fp32, (n_texts, n_tokens, hidden), of each run of texts of equal length.

        Args:
            texts: The token ids of each text, shape (n_tokens,); sorted by length, so that the runs are long.
        """
        groups = list(_group(texts))
        positions = torch.cat([self._positions(ids) for ids in texts])
        given = {"token_type_ids": torch.zeros(1, len(positions), dtype=torch.long)} if self._typed else {}
        embedded = self._embeddings(input_ids=torch.cat(list(texts))[None], position_ids=positions[None], **given)
        hidden = embedded[0].to(self._dtype)
        for layer in self._layers:
            attended = layer.join(self._attend(layer.query_key_value(hidden), groups), hidden)
            hidden = layer.shrink(layer.grow(attended), attended)
        return [hidden[first : first + n * length].view(n, length, -1).float() for first, n, length in groups]

    def _positions(self, ids: Tensor) -> Tensor:
        """Return a text's positions: from 0, or, as in RoBERTa, from behind the padding id."""
        if self._pad is None:
            return torch.arange(len(ids))
        real = (ids != self._pad).long()
        return real.cumsum(0) * real + self._pad

    def _attend(self, projected: Tensor, groups: Sequence[Group]) -> Tensor:
        width = projected.shape[1] // 3
        attended = projected.new_empty(len(projected), width)
        for first, n_texts, length in groups:
            rows = slice(first, first + n_texts * length)
            shape = (n_texts, length, 3, self._heads, width // self._heads)
            query, key, value = projected[rows].view(shape).permute(2, 0, 3, 1, 4)
            bias = None if self._bias is None else self._bias[:, :, :length, :length]
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            attended[rows].view(n_texts, length, self._heads, -1).copy_(found.transpose(1, 2))
        return attended


class _Linear:
    """A linear map, with GELU behind it or a sum and a LayerNorm."""

    def __init__(
        self, weight: Tensor, bias: Tensor, dtype: torch.dtype, norm: Any = None, *, gelu: bool = False
    ) -> None:
        self._weight, self._bias = weight.detach().to(dtype).contiguous(), bias.detach().to(dtype)
        self._gelu = gelu
        self._norm = (norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps) if norm else None
        self._laid_out = dtype == torch.bfloat16 and _has_onednn()
        if self._laid_out:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _ROWS)

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        product = self._multiply(rows, residual)
        if self._norm is None:
            return product
        weight, bias, eps = self._norm
        return functional.layer_norm(product, weight.shape, weight, bias, eps)

    def _multiply(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        ops: Any = torch.ops.mkldnn
        if self._laid_out and residual is not None:
            summed: Tensor = ops._linear_pointwise.binary(rows, residual, self._weight, self._bias, "add")
            return summed
        if self._laid_out:
            after: tuple[Any, ...] = ("gelu", [], "none") if self._gelu else ("none", [], None)
            found: Tensor = ops._linear_pointwise(rows, self._weight, self._bias, *after)
            return found
        product = functional.linear(rows, self._weight, self._bias)
        if residual is not None:
            return product + residual
        return functional.gelu(product) if self._gelu else product


@dataclass(frozen=True)
class _Layer:
    query_key_value: _Linear
    join: _Linear
    grow: _Linear
    shrink: _Linear


def can_pack(model: Any) -> bool:
    """Say whether `PackedBody` gives what a transformers model gives."""
    config: Any = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in ARCHITECTURES
        and config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", "absolute") in {None, "absolute"}
        and not getattr(config, "is_decoder", False)
        and next(model.parameters()).device.type == "cpu"
    )


def _read_layer(layer: Any, dtype: torch.dtype) -> _Layer:
    if hasattr(layer.attention, "attn"):  # MPNet
        attention, norm = layer.attention.attn, layer.attention.LayerNorm
        parts, out = (attention.q, attention.k, attention.v), attention.o
    else:
        attention, norm = layer.attention.self, layer.attention.output.LayerNorm
        parts, out = (attention.query, attention.key, attention.value), layer.attention.output.dense
    weights, biases = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    grow, shrink = layer.intermediate.dense, layer.output.dense
    return _Layer(
        query_key_value=_Linear(weights, biases, dtype),
        join=_Linear(out.weight, out.bias, dtype, norm),
        grow=_Linear(grow.weight, grow.bias, dtype, gelu=True),
        shrink=_Linear(shrink.weight, shrink.bias, dtype, layer.output.LayerNorm),
    )


def _group(texts: Sequence[Tensor]) -> Iterator[Group]:
    row = start = 0
    for number in range(1, len(texts) + 1):
        if number == len(texts) or len(texts[number]) != len(texts[start]):
            length = len(texts[start])
            yield row, number - start, length
            row += (number - start) * length
            start = number


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def count_flops(model: nn.Module, lengths: Sequence[int]) -> float:
    """Return the floating-point operations of a transformer's layers on texts of these lengths, in tokens.

    Two for each weight of a linear layer and token, and four for each pair of tokens, layer and hidden dimension.
    """
    config: Any = model.config
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    pooler = getattr(model, "pooler", None)  # is not used
    weights -= (
        sum(module.weight.numel() for module in pooler.modules() if isinstance(module, nn.Linear)) if pooler else 0
    )
    pairs = sum(length * length for length in lengths)
    return float(2 * weights * sum(lengths) + 4 * pairs * config.num_hidden_layers * config.hidden_size)
