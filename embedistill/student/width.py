"""A narrow model fitted to a wide one in closed form: block after block, by least squares on hidden states.

A model that normalises after each block cannot simply be rotated: LayerNorm weighs its dimensions one by one. So the
narrow model's stream is laid out so that its LayerNorms do next to nothing. Its hidden state is x = Q y + c v: the
payload y in an orthonormal basis Q of all directions but the mean and one more, v, that carries a constant c larger
than the payload. The variance that LayerNorm divides by is then nearly the same for all tokens, and y goes through.
v lies in two dimensions: spread over all, it adds up the steps that training takes in every weight, each of like size,
to a step that undoes the fit.

In such a stream a block only adds to y, and what it should add is a linear problem. With f what a block computes (the
attended values, the activations of the kept neurons), and T the teacher's hidden states it should lead to, the output
matrix F and a decoder R minimise |T - (y + f F) R|^2, solved in turns. What f reads is the teacher's own weights on
states decoded from y. Each block sees the errors of those before it, and makes up for layers that were left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from embedistill.architectures import Sizes, architecture_of, find_layers, find_words, resize
from embedistill.encoding.local import cut_batches, one_thread_a_batch
from embedistill.encoding.packed import Group, PackedBody, attend, find_padding, group, positions_of, rough_format
from embedistill.progress import progress_bar
from embedistill.student.algebra import Sums, inner, low_rank, root_of, solve, solve_in_turns
from embedistill.student.selection import choose_heads

_CONSTANT = 2.0  # squared length of the constant part, in multiples of the payload's
_RELEVANCE = 0.5  # share of the basis of word embeddings that is chosen for the sentence, not for the word
_RIDGE = 1e-4  # on 100,000 tokens; on fewer more
_CHUNK = 2_048  # tokens that a core runs at once
_PART = 16_384  # tokens whose products are summed at once
_OFTEN = 20  # times a position has to be seen for its shift to be measured, not derived
_MANY = 2_048  # neurons, from which on every other part is enough to fit what is added


@dataclass(frozen=True)
class _Chunk:
    """Texts whose tokens are some rows of all."""

    texts: list[Tensor]
    rows: slice
    groups: list[Group]


@dataclass
class _Map:
    """A linear map with a bias: inputs @ weight + bias."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


@dataclass
class _Block:
    """A narrow layer, in coordinates of the payload, and the gains of its LayerNorms."""

    query_key_value: _Map
    join: _Map
    attention_gain: float
    grow: _Map
    shrink: _Map
    output_gain: float


@dataclass
class _Tables:
    """The tables of words and of positions, in coordinates of the payload, and the gain of their LayerNorm."""

    words: Tensor
    positions: Tensor
    gain: float


class _Stream:
    """The narrow model's hidden states: the payload (n_tokens, payload), and the constant's share (n_tokens, 1)."""

    def __init__(self, payload: Tensor, width: int) -> None:
        self.payload, self.width = payload, width
        self.constant = torch.full((len(payload), 1), math.sqrt(_CONSTANT * payload.shape[1]))

    def normalise(self) -> float:
        """Do what LayerNorm does, and return the gain that keeps the mean length."""
        squared = self.payload.square().sum(1, keepdim=True) + self.constant.square()
        gain = math.sqrt(squared.mean().item() / self.width)
        ratio = gain * math.sqrt(self.width) / squared.sqrt()
        self.payload, self.constant = self.payload * ratio, self.constant * ratio
        return gain


@torch.no_grad()
def fit_narrow(
    teacher: Any, sizes: Sizes, layers: list[int], ids: Sequence[Tensor], targets: npt.NDArray[np.float32]
) -> Any:
    """Return a narrow transformers model, fitted to a BERT-like teacher on some texts.

    Args:
        teacher: The transformers model, on the CPU in fp32, of an architecture that normalises after its blocks.
        sizes: What the student shall have; nothing larger than the teacher has.
        layers: Which of the teacher's layers its blocks are made of, ascending.
        ids: The token ids of some thousand texts.
        targets: The teacher's vectors of these texts, shape (n_texts, dim).
    """
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))  # as chunks are cut
    following = [*layers[1:], len(find_layers(teacher))]
    blocks = []
    with _rough_products(), progress_bar("student is fitted", len(layers), "layers") as advance:
        fit = _Fit(teacher, sizes, layers, [ids[number] for number in order], torch.from_numpy(targets[order]))
        tables = fit.embed()
        for layer, following_layer in zip(layers, following, strict=True):
            blocks.append(fit.add_block(layer, following_layer))
            advance(1)
    config = resize(teacher.config, sizes, layers)
    student = AutoModel.from_config(config, dtype=torch.float32)
    _assemble(student, tables, blocks)
    if architecture_of(teacher).shared_bias:
        _share_bias(student, teacher, fit.kept_heads[layers[0]])
    return student.eval()


@contextmanager
def _rough_products() -> Iterator[None]:
    """Let products of fp32 read bf16 where the processor has it; sums stay fp32, so a Gram matrix stays positive."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Fit:
    """The state of a fit: where the teacher and the student are, on all tokens."""

    def __init__(self, teacher: Any, sizes: Sizes, layers: list[int], ids: list[Tensor], targets: Tensor) -> None:
        self.teacher, self.sizes, self.ids, self.targets = teacher, sizes, ids, targets
        self.packed = PackedBody(teacher, rough_format())
        self.chunks = _cut(ids)
        n_parts = math.ceil(sum(len(text) for text in ids) / _PART)
        self.parts = [slice(first, None, n_parts) for first in range(n_parts)]
        self.ridge = _RIDGE * max(1.0, 1e5 / sum(len(text) for text in ids))
        self.hidden = self._each(lambda chunk: self.packed.embed(chunk.texts))
        self.layer = 0
        self.payload_size = sizes.hidden_size - 2
        self.head_size = sizes.hidden_size // sizes.num_attention_heads
        kept: Any = [find_layers(teacher)[layer] for layer in layers]
        names, n_heads = architecture_of(teacher), getattr(teacher.config, architecture_of(teacher).heads)
        chosen = choose_heads(kept, names, n_heads, sizes.num_attention_heads)
        self.kept_heads = {layer: heads.tolist() for layer, heads in zip(layers, chosen, strict=True)}
        self.stream: _Stream

    def embed(self) -> _Tables:
        """Begin the stream, and return what makes it of words and positions."""
        states = self.hidden.float()
        mean = states.mean(0)
        basis = self._find_basis(states - mean)
        embeddings, table = self.teacher.embeddings, find_words(self.teacher).weight
        positions = embeddings.position_embeddings.weight
        padding = find_padding(self.teacher)
        where, which = torch.cat([positions_of(text, padding) for text in self.ids]), torch.cat(self.ids)
        counts = torch.bincount(where, minlength=len(positions))[:, None]
        usual = (counts * positions).sum(0) / counts.sum()
        types = embeddings.token_type_embeddings.weight[0] if hasattr(embeddings, "token_type_embeddings") else 0.0
        words = (embeddings.LayerNorm(table + usual + types) - mean) @ basis
        left = (states - mean) @ basis - words[which]
        seen = torch.zeros(len(positions), self.payload_size).index_add_(0, where, left) / counts.clamp(min=1)
        spread = table[which].std(1).mean()  # what LayerNorm divides by, near enough
        unseen = (positions - usual) * embeddings.LayerNorm.weight / spread @ basis
        shifts = torch.where(counts > _OFTEN, seen, unseen)
        payload = words[which] + shifts[where]
        scale = math.sqrt(self.payload_size / payload.square().sum(1).mean().item())
        self.stream = _Stream(payload * scale, self.sizes.hidden_size)
        return _Tables(words * scale, shifts * scale, self.stream.normalise())

    def _find_basis(self, states: Tensor) -> Tensor:
        """Return orthonormal columns: directions that differ among tokens, and those that tell a text's vector."""
        tokens = inner(states, states)
        pooled = torch.stack([part.mean(0) for part in torch.split(states, [len(text) for text in self.ids])])
        gram = inner(pooled, pooled)
        relevant = solve(gram, inner(pooled, self.targets - self.targets.mean(0)), 1e-3)
        told = root_of(gram) @ relevant
        telling = told @ told.T
        mixed = (1 - _RELEVANCE) * tokens / tokens.trace() + _RELEVANCE * telling / telling.trace()
        basis: Tensor = torch.linalg.eigh(mixed)[1][:, -self.payload_size :].flip(1).float()
        return basis

    def add_block(self, layer: int, following: int) -> _Block:
        """Fit a block to a teacher's layer, so that its output leads to what a later layer reads."""
        self._advance(layer)
        query_key_value = self._narrow_attention(layer)
        bias = None if self.packed.bias is None else self.packed.bias[:, self.kept_heads[layer]]
        heads = self.sizes.num_attention_heads
        attended = self._each(
            lambda chunk: attend(query_key_value(self.stream.payload[chunk.rows]), chunk.groups, heads, bias)
        )
        middle = self._mix(layer)
        join, attention_gain = self._add(lambda rows: attended[rows].float(), middle)
        grow = self._narrow_feed(layer, middle)
        self._feed(layer, middle)
        self._advance(following)
        shrink, output_gain = self._add(lambda rows: functional.gelu(grow(self.stream.payload[rows])), self.hidden)
        return _Block(query_key_value, join, attention_gain, grow, shrink, output_gain)

    def _advance(self, layer: int) -> None:
        """Take the teacher's hidden states to what a layer reads."""
        while self.layer < layer:
            self._feed(self.layer, self._mix(self.layer))

    def _mix(self, layer: int) -> Tensor:
        """Return the teacher's hidden states after a layer's attention."""
        return self._each(lambda chunk: self.packed.mix(layer, self.hidden[chunk.rows].float(), chunk.groups))

    def _feed(self, layer: int, middle: Tensor) -> None:
        """Take the teacher's hidden states through a layer's feed-forward part."""
        self.hidden = self._each(lambda chunk: self.packed.feed(layer, middle[chunk.rows].float()))
        self.layer = layer + 1

    def _narrow_attention(self, number: int) -> _Map:
        """Return queries, keys and values of the teacher's heads in fewer dimensions, from the payload.

        Queries and keys keep the largest singular values of their scores, values those of what they add to the stream,
        both weighted by the covariance of what is read.
        """
        names = architecture_of(self.teacher)
        layer: Any = find_layers(self.teacher)[number]
        decode = self._decode(self.hidden)
        payload = functional.pad(self.stream.payload, (0, 1), value=1.0)
        root = root_of(inner(payload, payload) / len(payload))
        query, key, value = (
            self._read_through(decode, layer.get_submodule(name)) for name in (names.query, names.key, names.value)
        )
        join = layer.get_submodule(names.join).weight.T.double()
        teacher_heads = getattr(self.teacher.config, names.heads)
        size = query.shape[1] // teacher_heads
        parts = [slice(head * size, (head + 1) * size) for head in range(teacher_heads)]
        back = torch.linalg.inv(root)
        scale = (self.head_size / size) ** 0.25  # scores are divided by the root of a head's size
        columns: list[list[Tensor]] = [[], [], []]
        for part in (parts[head] for head in self.kept_heads[number]):
            left, right = low_rank(root @ query[:, part], (root @ key[:, part]).T, self.head_size)
            columns[0].append(back @ left * scale)
            columns[1].append(back @ right.T * scale)
            columns[2].append(back @ low_rank(root @ value[:, part], join[part], self.head_size)[0])
        joined = torch.cat([torch.cat(part, 1) for part in columns], 1).float()
        return _Map(joined[:-1], joined[-1])

    def _read_through(self, decode: _Map, linear: Any) -> Tensor:
        """Return what a linear map of the teacher gives of the payload, its bias in the last row."""
        weight: Tensor = torch.cat([decode.weight, decode.bias[None]]).double() @ linear.weight.T.double()
        weight[-1] += linear.bias
        return weight

    def _narrow_feed(self, layer: int, middle: Tensor) -> _Map:
        """Return the kept neurons, those that weigh most in what the layer adds, as they read the payload."""
        names = architecture_of(self.teacher)
        module: Any = find_layers(self.teacher)[layer]
        grow, shrink = (module.get_submodule(name) for name in (names.grow, names.shrink))
        some = middle[:: max(1, len(middle) // 2000)].float()
        impact = functional.gelu(grow(some)).square().mean(0).sqrt() * shrink.weight.norm(dim=0)
        kept = impact.argsort(descending=True)[: self.sizes.intermediate_size].sort().values
        decode = self._decode(middle)
        weights, biases = grow.weight[kept].T, grow.bias[kept]
        return _Map(decode.weight @ weights, decode.bias @ weights + biases)

    def _decode(self, states: Tensor) -> _Map:
        """Return the least-squares map from the payload to hidden states of the teacher."""
        mean, target_mean = self.stream.payload.mean(0), _mean(states)
        sums = Sums()
        for rows in self.parts:
            payload = self.stream.payload[rows] - mean
            sums.add(yy=(payload, payload), yt=(payload, states[rows].float() - target_mean))
        weight = solve(sums["yy"], sums["yt"], self.ridge).float()
        return _Map(weight, target_mean - mean @ weight)

    def _add(self, features: Callable[[slice], Tensor], states: Tensor) -> tuple[_Map, float]:
        """Let a block add a linear map of its features to the stream, so that the states can be decoded from it."""
        mean, target_mean = self.stream.payload.mean(0), _mean(states)
        sums = Sums()
        for rows in self.parts[:: 2 if self.sizes.intermediate_size > _MANY else 1]:
            read = functional.pad(features(rows), (0, 1), value=1.0)
            payload = self.stream.payload[rows] - mean
            target = states[rows].float() - target_mean
            sums.add(ff=(read, read), ft=(read, target), fy=(read, payload))
            sums.add(yy=(payload, payload), yt=(payload, target))
        added = solve_in_turns(sums, self.ridge).float()
        join = _Map(added[:-1], added[-1])
        for rows in self.parts:
            self.stream.payload[rows] += join(features(rows))
        return join, self.stream.normalise()

    def _each(self, run: Callable[[_Chunk], Tensor]) -> Tensor:
        """Return what a function gives for each chunk, in bf16: rows of all tokens."""

        @torch.no_grad()  # each thread has a mode of its own
        def run_one(chunk: _Chunk) -> Tensor:
            return run(chunk).bfloat16()

        with one_thread_a_batch() as threads:
            return torch.cat(list(threads.map(run_one, self.chunks)))


def _assemble(student: Any, tables: _Tables, blocks: list[_Block]) -> None:
    """Write fitted maps into a model, from coordinates of the payload into those of its hidden states."""
    names = architecture_of(student)
    width = find_words(student).embedding_dim
    basis, constant = _lay_out(width)
    for parameter in student.parameters():
        parameter.zero_()
    embeddings = student.embeddings
    find_words(student).weight.copy_(tables.words @ basis.T + math.sqrt(_CONSTANT * (width - 2)) * constant)
    embeddings.position_embeddings.weight.copy_(tables.positions @ basis.T)
    embeddings.LayerNorm.weight.fill_(tables.gain)
    layers: Any = find_layers(student)
    for layer, block in zip(layers, blocks, strict=True):
        parts = [layer.get_submodule(name) for name in (names.query, names.key, names.value)]
        weights, biases = block.query_key_value.weight.chunk(3, 1), block.query_key_value.bias.chunk(3)
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            _write(part, basis @ weight, bias)
        _write(layer.get_submodule(names.join), block.join.weight @ basis.T, block.join.bias @ basis.T)
        _write(layer.get_submodule(names.grow), basis @ block.grow.weight, block.grow.bias)
        _write(layer.get_submodule(names.shrink), block.shrink.weight @ basis.T, block.shrink.bias @ basis.T)
        layer.get_submodule(names.attention_norm).weight.fill_(block.attention_gain)
        layer.get_submodule(names.output_norm).weight.fill_(block.output_gain)


def _share_bias(student: Any, teacher: Any, kept_heads: list[int]) -> None:
    """Copy relative position biases, of the heads that were kept."""
    name = architecture_of(teacher).shared_bias
    table = teacher.get_submodule(name).weight
    student.get_submodule(name).weight.copy_(table[:, kept_heads])


def _write(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight.T)
    linear.bias.copy_(bias)


def _lay_out(width: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (width, width - 2) of the payload, and the direction (width) of the constant."""
    ones, constant = torch.ones(width, dtype=torch.double), torch.zeros(width, dtype=torch.double)
    constant[0], constant[1] = 1, -1
    rest = torch.randn(width, width - 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    basis = torch.linalg.qr(torch.cat([ones[:, None], constant[:, None], rest], 1))[0]
    return basis[:, 2:].float(), basis[:, 1].float()


def _cut(ids: Sequence[Tensor]) -> list[_Chunk]:
    """Return texts in chunks of like length, of some thousand tokens each."""
    chunks, row = [], 0
    for numbers in cut_batches([len(text) for text in ids], _CHUNK, padded=False):
        texts = [ids[number] for number in numbers]
        rows = slice(row, row + sum(len(text) for text in texts))
        chunks.append(_Chunk(texts, rows, group([len(text) for text in texts])))
        row = rows.stop
    return chunks


def _mean(states: Tensor) -> Tensor:
    return states.mean(0, dtype=torch.float32)
