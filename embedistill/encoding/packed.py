"""A BERT-like model without padding, for processors: the tokens of a batch are the rows of one matrix.

Texts differ in length, and padding them costs. Every product but the attention's is by token, so all tokens of a batch
go through one product, whatever text they are of; attention is taken over texts of equal length at a time. Weights are
laid out for the processor once, where oneDNN can, and GELU is fused into the product before it.

The products by token are in the number format asked for; attention, residual sums and LayerNorms are in fp32. They are
a small part of the work, and a few texts need it: rounding MPNet's position bias alone turns some vectors by 5 degrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedistill.architectures import ARCHITECTURES, Architecture, find_layers

_PACKED = [name for name, architecture in ARCHITECTURES.items() if not architecture.norm_first]
_ROWS = 1024  # the number of rows that the layout of weights is chosen for

Group = tuple[int, int, int]
"""Texts of equal length: first row, number of texts, tokens of each."""


class PackedBody:
    """The layers of a BERT-like model in one number format; the model is left as it is.

    Args:
        model: A transformers model that `can_pack` finds fit: on the CPU, in fp32.
        dtype: Number format of the products.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        names = ARCHITECTURES[model.config.model_type]
        self.heads = int(getattr(model.config, names.heads))
        self._dtype = dtype
        self._embeddings = model.embeddings
        self._typed = hasattr(model.embeddings, "token_type_embeddings")
        self._pad = find_padding(model)
        self.layers = [_read_layer(layer, names, dtype) for layer in find_layers(model)]
        self.bias = _position_bias(model)

    @torch.inference_mode()
    def forward(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Return the last hidden states in fp32, (n_texts, n_tokens, hidden), of each run of texts of equal length.

        Args:
            texts: The token ids of each text, shape (n_tokens,); sorted by length, so that the runs are long.
        """
        groups = group([len(text) for text in texts])
        hidden = self.embed(texts)
        for number in range(len(self.layers)):
            hidden = self.feed(number, self.mix(number, hidden, groups))
        return [hidden[first : first + n * length].view(n, length, -1) for first, n, length in groups]

    def embed(self, texts: Sequence[Tensor]) -> Tensor:
        """Return what the first layer reads, in fp32, shape (n_tokens, hidden)."""
        positions = torch.cat([positions_of(ids, self._pad) for ids in texts])
        given = {"position_ids": positions[None]}
        if self._typed:
            given["token_type_ids"] = torch.zeros(1, len(positions), dtype=torch.long)
        embedded: Tensor = self._embeddings(input_ids=torch.cat(list(texts))[None], **given)[0].float()
        return embedded

    def mix(self, number: int, hidden: Tensor, groups: Sequence[Group]) -> Tensor:
        """Return the hidden states after a layer's attention."""
        layer = self.layers[number]
        mixed = attend(layer.query_key_value(hidden.to(self._dtype)), groups, self.heads, self.bias)
        normalised: Tensor = layer.attention_norm(hidden + layer.join(mixed))
        return normalised

    def feed(self, number: int, hidden: Tensor) -> Tensor:
        """Return the hidden states after a layer's feed-forward part."""
        layer = self.layers[number]
        normalised: Tensor = layer.output_norm(hidden + layer.shrink(layer.grow(hidden.to(self._dtype))))
        return normalised


def find_padding(model: Any) -> int | None:
    """Return the padding id that positions are counted from; None: they are counted from 0, as in BERT."""
    return getattr(model.embeddings, "padding_idx", None)


def positions_of(ids: Tensor, padding: int | None) -> Tensor:
    """Return the positions of a text, or of texts in rows: from 0, or, as in RoBERTa, from behind the padding id."""
    if padding is None:
        return torch.arange(ids.shape[-1], device=ids.device)
    real = (ids != padding).long()
    return real.cumsum(-1) * real + padding


def _position_bias(model: Any) -> Tensor | None:
    """Return MPNet's relative position biases, shape (1, heads, length, length), for the longest text."""
    if ARCHITECTURES[model.config.model_type].shared_bias is None:
        return None
    with torch.inference_mode():
        found: Tensor = model.encoder.compute_position_bias(torch.zeros(1, model.config.max_position_embeddings, 1))
    return found[:1]


def pool(pooling: Any, states: Tensor) -> Tensor:
    """Return what a pooling makes of hidden states without padding, (n_texts, n_tokens, hidden)."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    pooled: Tensor = pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    return pooled


def attend(projected: Tensor, groups: Sequence[Group], heads: int, bias: Tensor | None) -> Tensor:
    """Return the attended values (n_tokens, width) of projected queries, keys and values (n_tokens, 3 width)."""
    width = projected.shape[1] // 3
    attended = projected.new_empty(len(projected), width)
    for first, n_texts, length in groups:
        rows = slice(first, first + n_texts * length)
        shape = (n_texts, length, 3, heads, width // heads)
        query, key, value = projected[rows].float().view(shape).permute(2, 0, 3, 1, 4)
        mask = None if bias is None else bias[:, :, :length, :length]
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended[rows].view(n_texts, length, heads, -1).copy_(found.transpose(1, 2))
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
    return is_bert_like(model) and next(model.parameters()).device.type == "cpu"


def is_bert_like(model: Any) -> bool:
    """Say whether a transformers model can be run layer by layer on the tokens of many texts as rows of one matrix."""
    config: Any = getattr(model, "config", None)
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    return not adapted and (
        getattr(config, "model_type", None) in _PACKED
        and getattr(config, "hidden_act", getattr(config, "activation", None)) == "gelu"
        and getattr(config, "position_embedding_type", "absolute") in {None, "absolute"}
        and not getattr(config, "is_decoder", False)
    )


def _read_layer(layer: Any, names: Architecture, dtype: torch.dtype) -> _Layer:
    parts = [layer.get_submodule(name) for name in (names.query, names.key, names.value)]
    weights, biases = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    join, grow, shrink = (layer.get_submodule(name) for name in (names.join, names.grow, names.shrink))
    return _Layer(
        query_key_value=_Linear(weights, biases, dtype),
        join=_Linear(join.weight, join.bias, dtype),
        attention_norm=layer.get_submodule(names.attention_norm),
        grow=_Linear(grow.weight, grow.bias, dtype, gelu=True),
        shrink=_Linear(shrink.weight, shrink.bias, dtype),
        output_norm=layer.get_submodule(names.output_norm),
    )


def group(lengths: Sequence[int]) -> list[Group]:
    """Return the runs of texts of equal length."""
    found, row = [], 0
    for length, run in itertools.groupby(lengths):
        n_texts = len(list(run))
        found.append((row, n_texts, length))
        row += n_texts * length
    return found


def _has_onednn_bfloat16() -> bool:
    ops: Any = torch.ops.mkldnn
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(ops, "_reorder_linear_weight") and bool(ops._is_mkldnn_bf16_supported())


def rough_format() -> torch.dtype:
    """Return the number format for products that need not be exact: bfloat16 where this processor's library has it."""
    return torch.bfloat16 if _has_onednn_bfloat16() else torch.float32


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
