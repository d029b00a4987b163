"""A BERT-like model without padding, for processors: the tokens of a batch are the rows of one matrix.

Texts differ in length, and padding them costs. Every product but the attention's is by token, so all tokens of a batch
go through one product, whatever text they are of; attention is taken over texts of equal length at a time. Weights are
laid out for the processor once, where oneDNN can, and GELU is fused into the product before it.

The products by token are in the number format asked for; attention, residual sums and LayerNorms are in fp32. They are
a small part of the work, and a few texts need it: rounding MPNet's position bias alone turns some vectors by 5 degrees.
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
        self._pad: int | None = getattr(model.embeddings, "padding_idx", None)  # BERT has none
        self._layers = [_read_layer(layer, dtype) for layer in model.encoder.layer]
        self._bias: Tensor | None = None
        if config.model_type == "mpnet":
            longest = torch.zeros(1, config.max_position_embeddings, 1)
            with torch.inference_mode():
                self._bias = model.encoder.compute_position_bias(longest)[:1]

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
        hidden = embedded[0].float()
        for layer in self._layers:
            attended = self._attend(layer.query_key_value(hidden.to(self._dtype)), groups)
            hidden = layer.attention_norm(hidden + layer.join(attended))
            hidden = layer.output_norm(hidden + layer.shrink(layer.grow(hidden.to(self._dtype))))
        return [hidden[first : first + n * length].view(n, length, -1) for first, n, length in groups]

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
            query, key, value = projected[rows].float().view(shape).permute(2, 0, 3, 1, 4)
            bias = None if self._bias is None else self._bias[:, :, :length, :length]
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            attended[rows].view(n_texts, length, self._heads, -1).copy_(found.transpose(1, 2))
        return attended


class _Linear:
    """A linear map, with GELU behind it where that is asked for."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, gelu: bool = False) -> None:
        self._weight, self._bias = weight.detach().to(dtype).contiguous(), bias.detach().to(dtype)
        self._gelu = gelu
        self._laid_out = dtype == torch.bfloat16 and _has_onednn_bfloat16()
        if self._laid_out:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _ROWS)

    def __call__(self, rows: Tensor) -> Tensor:
        if self._laid_out:
            ops: Any = torch.ops.mkldnn
            after: tuple[Any, ...] = ("gelu", [], "none") if self._gelu else ("none", [], None)
            found: Tensor = ops._linear_pointwise(rows, self._weight, self._bias, *after)
            return found
        product = functional.linear(rows, self._weight, self._bias)
        return functional.gelu(product) if self._gelu else product


@dataclass(frozen=True)
class _Layer:
    query_key_value: _Linear
    join: _Linear
    attention_norm: nn.LayerNorm
    grow: _Linear
    shrink: _Linear
    output_norm: nn.LayerNorm


def can_pack(model: Any) -> bool:
    """Say whether `PackedBody` gives what a transformers model gives."""
    config: Any = getattr(model, "config", None)
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    return not adapted and (
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
        join=_Linear(out.weight, out.bias, dtype),
        attention_norm=norm,
        grow=_Linear(grow.weight, grow.bias, dtype, gelu=True),
        shrink=_Linear(shrink.weight, shrink.bias, dtype),
        output_norm=layer.output.LayerNorm,
    )


def _group(texts: Sequence[Tensor]) -> Iterator[Group]:
    row = start = 0
    for number in range(1, len(texts) + 1):
        if number == len(texts) or len(texts[number]) != len(texts[start]):
            length = len(texts[start])
            yield row, number - start, length
            row += (number - start) * length
            start = number


def _has_onednn_bfloat16() -> bool:
    ops: Any = torch.ops.mkldnn
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(ops, "_reorder_linear_weight") and bool(ops._is_mkldnn_bf16_supported())


def count_flops(model: nn.Module, lengths: Sequence[int]) -> float:
    """Return the floating-point operations of a transformer's layers on texts of these lengths, in tokens.

    Two for each weight of a linear layer and token, and four for each pair of tokens, layer and hidden dimension; 0
    where the model does not say how many layers it has.
    """
    config: Any = model.config
    if not hasattr(config, "num_hidden_layers"):
        return 0.0
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    pooler = getattr(model, "pooler", None)  # is not used
    weights -= (
        sum(module.weight.numel() for module in pooler.modules() if isinstance(module, nn.Linear)) if pooler else 0
    )
    pairs = sum(length * length for length in lengths)
    return float(2 * weights * sum(lengths) + 4 * pairs * config.num_hidden_layers * config.hidden_size)
