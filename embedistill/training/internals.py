"""What a student takes over of its teacher's insides: hidden states and attention, by the live teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional

from embedistill.architectures import Architecture, architecture_of, find_layers
from embedistill.errors import UsageError
from embedistill.training.packed import in_runs, list_runs

_RELATIONS = ("query", "key", "value")


def check_attention(architectures: Iterable[Architecture]) -> None:
    """Raise a UsageError where one has no queries, keys and values of their own, which the attention term compares."""
    if any(architecture.query is None for architecture in architectures):
        found = "a model whose queries, keys and values are one matrix"
        raise UsageError("training.objectives.attention", found, "one that has each", "use the term layers")


class Internals(nn.Module):
    """Compares layers of a student with layers of its teacher, which runs beside it on the same tokens.

    Args:
        student: A model whose tokenizer is its teacher's.
        teacher: The teacher; it is neither trained nor saved.
        pairs: Layer of the student and layer of the teacher, counted from 0, as often as wanted.
        relation_heads: Heads that queries, keys and values are cut into for the attention term; both widths must divide
            by it. None: there is no such term.

    Raises:
        UsageError: An architecture has no queries, keys and values of their own, which the attention term compares.

    Attributes:
        maps: A linear map from the student's width to the teacher's for each pair; learned, and dropped at the end.
    """

    def __init__(
        self,
        student: SentenceTransformer,
        teacher: SentenceTransformer,
        pairs: Sequence[tuple[int, int]],
        relation_heads: int | None,
    ) -> None:
        super().__init__()
        self._bodies: dict[str, Any] = {"student": _body(student), "teacher": _body(teacher).eval()}
        self.pairs, self.relation_heads = list(pairs), relation_heads
        if relation_heads:
            check_attention(architecture_of(body) for body in self._bodies.values())
        narrow, wide = (body.config.hidden_size for body in self._bodies.values())
        maps = [nn.Linear(narrow, wide, bias=False) for _ in self.pairs]
        for linear in maps:
            nn.init.orthogonal_(linear.weight)
        self.maps = nn.ModuleList(maps)
        self._seen: dict[tuple[str, int, str], list[Tensor]] = {}
        self._masks: list[Tensor] = []

    @contextmanager
    def watched(self, features: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the teacher on the tokens of a batch, and see what it and the student do with them inside, run by run."""
        mask = features["attention_mask"].bool()
        self._seen, self._masks = defaultdict(list), [mask[rows, :longest] for rows, longest in list_runs(mask)]
        hooks = [
            module.register_forward_hook(self._watch(role, layer, part))
            for role, place in (("student", 0), ("teacher", 1))
            for layer in {pair[place] for pair in self.pairs}
            for part, module in self._parts(role, layer)
        ]
        try:
            body = self._bodies["teacher"].to(features["input_ids"].device)
            with in_runs(body), torch.no_grad():
                body(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
            with in_runs(self._bodies["student"]):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _parts(self, role: str, layer: int) -> list[tuple[str, nn.Module]]:
        body = self._bodies[role]
        found, names = find_layers(body)[layer], architecture_of(body)
        relations = _RELATIONS if self.relation_heads else ()
        return [
            ("states", found),
            *((part, found.get_submodule(str(getattr(names, part)))) for part in relations),
        ]

    def _watch(self, role: str, layer: int, part: str) -> Any:
        def keep(_module: nn.Module, _given: Any, output: Any) -> None:
            self._seen[role, layer, part].append(output[0] if isinstance(output, tuple) else output)

        return keep

    def distance(self, term: str) -> Tensor:
        """Return the term `layers` or `attention` of the batch that was watched last: the mean over the pairs."""
        return torch.stack([getattr(self, f"_{term}")(number) for number in range(len(self.pairs))]).mean()

    def _layers(self, number: int) -> Tensor:
        own, theirs = self.pairs[number]
        seen = self._seen["student", own, "states"], self._seen["teacher", theirs, "states"]
        student, teacher = (
            torch.cat([states[mask] for states, mask in zip(some, self._masks, strict=True)]) for some in seen
        )
        return states_distance(self.maps[number](student).float(), teacher.float())

    def _attention(self, number: int) -> Tensor:
        own, theirs = self.pairs[number]
        n_tokens = sum(int(mask.sum()) for mask in self._masks)
        found = [
            relation_divergence(student, teacher, mask, self.relation_heads or 1) * (mask.sum() / n_tokens)
            for part in _RELATIONS
            for student, teacher, mask in zip(
                self._seen["student", own, part], self._seen["teacher", theirs, part], self._masks, strict=True
            )
        ]
        return torch.stack(found).sum() / len(_RELATIONS)


def states_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return sum |s - t|^2 / sum |t - mean t|^2 over tokens: the share of the teacher's variance that is missed.

    The hidden-state loss of TinyBERT (Jiao et al., 2020), made free of scale.

    Args:
        student: Mapped hidden states, shape (n_tokens, width of the teacher).
        teacher: Hidden states, of the same shape.
    """
    variance = (teacher - teacher.mean(0)).square().sum()
    return (student - teacher).square().sum() / variance.clamp(min=1e-8)


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return the mean KL(p || q) of self-attention relations, MiniLMv2 (Wang et al., 2021).

    p is the softmax of A A^T / sqrt(d) of each head of d dimensions that the teacher's queries (or keys, or values) A
    are cut into, q the same of the student's, whatever its own heads; the mean is over heads and tokens.

    Args:
        student: Queries, keys or values, shape (n_texts, n_tokens, width).
        teacher: The same of the teacher, of any width.
        mask: True where there is a token, shape (n_texts, n_tokens).
        heads: Number of relation heads; divides both widths.
    """
    log_q, log_p = (_relate(projected.float(), mask, heads) for projected in (student, teacher))
    by_row = (log_p.exp() * (log_p - log_q)).masked_fill(~mask[:, None, None, :], 0).sum(-1)
    return by_row.transpose(1, 2)[mask].mean()


def _relate(projected: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return log softmax(A A^T / sqrt(d)) over the tokens there are, (n_texts, heads, n_tokens, n_tokens)."""
    cut = projected.view(*projected.shape[:2], heads, -1).transpose(1, 2)
    scores = cut @ cut.mT / cut.shape[-1] ** 0.5
    return functional.log_softmax(scores.masked_fill(~mask[:, None, None, :], -1e4), dim=-1)


def _body(model: SentenceTransformer) -> Any:
    return getattr(model[0], "model")  # noqa: B009  (not on every first module)
