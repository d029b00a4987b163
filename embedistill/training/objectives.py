"""The terms of the loss. Most compare a batch of student embeddings with the teacher's, cached, as labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn
from torch.nn import functional

from embedistill.choices import Curve
from embedistill.training.internals import Internals

Term = Literal[
    "embedding",
    "similarity",
    "reverse_similarity",
    "matrix",
    "contrastive",
    "ranking",
    "pairs",
    "layers",
    "attention",
    "spread",
]

_INSIDE = {"layers", "attention"}  # terms that have no prefixes
_BALANCED_EVERY = 50
_NEVER = 2**62
_NEAREST = 8
_FALSE_NEGATIVE = 0.05  # of the cosine to the positive: what is no farther below it is as near
_BOUNDS = (0.0, math.log(100))  # of the logarithm of 1 / temperature


@dataclass(frozen=True)
class Course:
    """A number on its way through a training: a temperature, the weight of a term."""

    start: float
    end: float
    schedule: Curve = "cosine"

    def at(self, progress: float) -> float:
        """Return the number at a share of the training, 0 to 1: start + c (end - start)."""
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + share * (self.end - self.start)


class DistillationLoss(nn.Module):
    """The weighted sum of the terms whose weight is above zero, each logged by itself.

    Inputs: one text column. Labels: `vectors`, teacher embeddings in the student's space, unit length, shape (batch,
    dim); `positives`, the place in the batch of each text's positive, shape (batch,), -1 where it has none; `kin`, a
    number of each text, shape (batch,), the same of texts that pairs link.

    Where several processes train, every term is over the texts of all of them.

    Args:
        model: The student.
        weights: Weight by term: layers and attention are of `internals`, the others are the functions of this module:
            spread is `crowding`, reverse_similarity is similarity's the other way.
        temperature: Of the terms similarity, reverse_similarity, contrastive and pairs; None: learned, from 0.05 on,
            kept in 0.01 to 1, as CLIP's (Radford et al., 2021).
        prefixes: Numbers of dimensions: each term is the mean over these prefixes of the vectors and the whole, scaled
            to unit length, save those of internals (Matryoshka, Kusupati et al., 2022); none: all dimensions alone.
        balance: Divide each term by the norm of its gradient, a running mean of measurements on every 50th step, so
            that weights are ratios of gradients (after GradNorm, Chen et al., 2018). A term without a gradient, such as
            pairs of a batch without any, is measured when it has one.
        internals: The live teacher, which the terms layers and attention need.

    Attributes:
        progress: The share of the training that is done, 0 to 1; whoever trains sets it.
        step: The number of the step at work, from 1; whoever trains sets it.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        weights: Mapping[Term, Course],
        temperature: Course | None,
        prefixes: Sequence[int] = (),
        *,
        balance: bool = False,
        internals: Internals | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = {term: weight for term, weight in weights.items() if weight.start > 0 or weight.end > 0}
        self.course, self.prefixes, self.progress, self.step = temperature, tuple(prefixes), 0.0, 1
        self._lost_at: dict[str, Tensor] = {}
        self.balance, self.internals = balance, internals
        if temperature is None:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(0.05)))
        if balance:
            self.register_buffer("norms", torch.zeros(len(self.weights)))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature of this step."""
        return torch.exp(-self.log_scale) if self.course is None else self.course.at(self.progress)

    def own_state(self) -> dict[str, Tensor]:
        """Return what it has learned and measured itself: what a checkpoint of the student does not hold."""
        kept = [name for name, _ in self.named_parameters() if not name.startswith("model.")]
        return {name: value for name, value in self.state_dict().items() if name in {*kept, "norms", "calls"}}

    def find_lost(self) -> tuple[int, list[str]] | None:
        """Return the first step at which something was not finite, and what: causes before what follows of them."""
        found = [(int(step), name) for name, step in self._lost_at.items()]
        first = min((step for step, _ in found), default=_NEVER)
        return None if first == _NEVER else (first, [name for step, name in found if step == first])

    def forget_lost(self) -> None:
        """Begin anew with looking for what is not finite."""
        self._lost_at.clear()

    def _look_at(self, name: str, values: Tensor) -> None:
        """Note the first step at which some values are not finite, without waiting for a GPU."""
        finite = torch.isfinite(values.detach()).all()
        if name not in self._lost_at:
            self._lost_at[name] = torch.full((), _NEVER, device=values.device)
        before = self._lost_at[name]
        self._lost_at[name] = torch.where(finite, before, before.clamp(max=self.step))

    def forward(
        self, sentence_features: Sequence[dict[str, Tensor]], labels: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted terms by name; the trainer adds them up."""
        features = sentence_features[0]
        if self.course is None:
            with torch.no_grad():
                self.log_scale.clamp_(*_BOUNDS)
        if self.internals:
            with self.internals.watched(features):
                student = self.model(features)["sentence_embedding"].float()
        else:
            student = self.model(features)["sentence_embedding"].float()
        student, teacher, positives, kin = _gather(student, labels)
        self._look_at("the teacher's vectors", teacher)
        self._look_at("the student's vectors", student)
        sizes = dict.fromkeys([*self.prefixes, student.shape[1]])
        cut = [[functional.normalize(vectors[:, :size], dim=1) for vectors in (student, teacher)] for size in sizes]
        terms = {}
        for term in self.weights:
            some = cut[-1:] if term in _INSIDE else cut
            terms[term] = torch.stack([self._term(term, own, theirs, positives, kin) for own, theirs in some]).mean()
        for term, value in terms.items():
            self._look_at(f"the term {term}", value)
        norms = self._measure(terms) if self.balance else dict.fromkeys(terms, 1.0)
        return {term: self.weights[term].at(self.progress) * value / norms[term] for term, value in terms.items()}

    def _term(self, term: Term, student: Tensor, teacher: Tensor, positives: Tensor, kin: Tensor) -> Tensor:
        match term:
            case "embedding":
                found = embedding_distance(student, teacher)
            case "similarity":
                found = similarity_divergence(student, teacher, _constant(self.temperature))
            case "reverse_similarity":
                found = similarity_divergence(teacher, student, _constant(self.temperature))
            case "matrix":
                found = matrix_distance(student, teacher)
            case "contrastive":
                found = contrast(student, teacher, self.temperature)
            case "ranking":
                found = ranking_distance(student, teacher)
            case "pairs":
                found = contrast_pairs(student, teacher, positives, kin, self.temperature)
            case "spread":
                found = crowding(student)
            case "layers" | "attention":
                found = cast(Internals, self.internals).distance(term)
        return found

    def _measure(self, terms: Mapping[Term, Tensor]) -> dict[Term, float]:
        """Return the norm of each term's gradient by the student's weights, measured anew on every 50th step."""
        norms, calls = cast(Tensor, self.norms), cast(Tensor, self.calls)
        if torch.is_grad_enabled():
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            known = norms.tolist()
            for number, term in enumerate(terms.values()):
                due = calls % _BALANCED_EVERY == 0 if known[number] else term.item() != 0
                if not due:
                    continue
                found = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
                grads = [grad.float() for grad in found if grad is not None]
                if torch.distributed.is_initialized():
                    for grad in grads:
                        torch.distributed.all_reduce(grad)
                        grad.div_(torch.distributed.get_world_size())
                norm = torch.stack([grad.norm() for grad in grads]).norm()
                if norm > 0:
                    norms[number] = 0.9 * norms[number] + 0.1 * norm if known[number] else norm
        calls += 1
        return dict(zip(terms, norms.clamp(min=1e-8).tolist(), strict=True))


def _constant(temperature: float | Tensor) -> float | Tensor:
    """Return a temperature that is not learned from: of both sides' softmax alone, the best would be the highest."""
    return temperature.detach() if isinstance(temperature, Tensor) else temperature


def _gather(student: Tensor, labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student vectors, teacher vectors, positives and kin of all processes."""
    teacher, positives, kin = labels["vectors"], labels["positives"], labels["kin"]
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return student, teacher, positives, kin
    offset = len(student) * torch.distributed.get_rank()
    moved = torch.where(positives < 0, positives, positives + offset)
    return (
        cast(Tensor, all_gather_with_grad(student)),
        cast(Tensor, all_gather(teacher)),
        cast(Tensor, all_gather(moved)),
        cast(Tensor, all_gather(kin)),
    )


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over i of 1 - <s_i, t_i>, half the squared error of unit vectors.

    The regression on a teacher's embeddings of Reimers and Gurevych (2020), on their directions alone.

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, dim).

    Returns:
        A scalar, 0 to 2.
    """
    return 1 - (student * teacher).sum(1).mean()


def crowding(student: Tensor) -> Tensor:
    """Return M1^2 + max(0, M2 - 1 / dim), with M1, M2 the means over i != j of <s_i, s_j> and of its square.

    The global orthogonal regularisation of Zhang et al. (2017): both are what unit vectors by chance have.

    Args:
        student: Unit vectors, shape (batch, dim).

    Returns:
        A scalar, at least 0; 0 for a batch of one.
    """
    n_texts, dim = student.shape
    cosines = student @ student.T
    cosines = cosines - torch.diag(cosines.diagonal())
    n_pairs = max(1, n_texts * (n_texts - 1))
    return (cosines.sum() / n_pairs).square() + functional.relu(cosines.square().sum() / n_pairs - 1 / dim)


def matrix_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over i != j of (<s_i, s_j> - <t_i, t_j>)^2, the similarity loss of Jasper and Stella (2024).

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, any dim).

    Returns:
        A scalar, at least 0; 0 for a batch of one.
    """
    difference = student @ student.T - teacher @ teacher.T
    difference = difference - torch.diag(difference.diagonal())
    return difference.square().sum() / max(1, len(student) * (len(student) - 1))


def contrast(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the mean over i of -log softmax_j(<s_i, t_j> / T) at j = i: InfoNCE (van den Oord et al., 2018).

    The positive of a text is the teacher's vector of it; the negatives are the teacher's vectors of the others in the
    batch. They come out of the cache, so that a batch of any size costs no more.

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, dim).
        temperature: T; the smaller, the more the nearest negatives count.

    Returns:
        A scalar, at least 0; 0 for a batch of one.
    """
    own = torch.arange(len(student), device=student.device)
    return functional.cross_entropy(student @ teacher.T / temperature, own)


def similarity_divergence(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """Return how far the student's similarities within a batch are from the teacher's.

    The mean over i of KL(p_i || q_i), with p_i the softmax over j != i of <t_i, t_j> / T, q_i the same of the student:
    the soft targets of Hinton et al. (2015), over similarities as in CompRess (Koohpayegani et al., 2020). With the two
    in each other's place it is the reverse divergence, as in MiniLLM (Gu et al., 2024): it punishes neighbours that are
    the student's alone, where this way it punishes the teacher's that the student lacks.

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, any dim).
        temperature: T; the smaller, the more the nearest neighbours count.

    Returns:
        A scalar, at least 0, and 0 where the similarities are the same; 0 for a batch of one.
    """
    if len(student) < 2:
        return (student.sum() + teacher.sum()) * 0
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    log_q, log_p = (
        functional.log_softmax((vectors @ vectors.T / temperature).masked_fill(itself, -1e4), dim=1)
        for vectors in (student, teacher)
    )
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def ranking_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the nearest neighbours of a text, of those in the batch, are from being its nearest.

    The mean over i, over j of the (at most) 8 texts nearest to i by the teacher, and over k not nearer to i than j, of
    max(0, (<t_i, t_j> - <t_i, t_k>) - (<s_i, s_j> - <s_i, s_k>)): a hinge whose margin is the teacher's own, the loss
    of Hofstaetter et al. (2020) on the side where the student's margin is too small.

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, any dim).

    Returns:
        A scalar, at least 0; 0 for a batch of two.
    """
    n_texts = len(student)
    itself = torch.eye(n_texts, dtype=torch.bool, device=student.device)
    wanted, found = teacher @ teacher.T, student @ student.T
    nearest = wanted.masked_fill(itself, -2).topk(min(_NEAREST, n_texts - 1), dim=1).indices
    margins = wanted.gather(1, nearest)[:, :, None] - wanted[:, None, :]
    reached = found.gather(1, nearest)[:, :, None] - found[:, None, :]
    counted = (margins > 0) & ~itself[:, None, :]
    return (functional.relu(margins - reached) * counted).sum() / counted.sum().clamp(min=1)


def contrast_pairs(
    student: Tensor, teacher: Tensor, positives: Tensor, kin: Tensor, temperature: float | Tensor
) -> Tensor:
    """Return InfoNCE (van den Oord et al., 2018) of the texts that have a positive in the batch.

    The mean over these i of -log softmax_k(<s_i, s_k> / T) at k = positive(i), over k != i. No negative is what pairs
    link to i, such as another answer to the same question, nor a text that the teacher finds about as near to i as its
    positive, by a twentieth of that cosine (NV-Retriever, Moreira et al., 2024).

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, any dim).
        positives: Place of each text's positive, shape (batch,), -1: it has none.
        kin: A number of each text, shape (batch,), the same of texts that pairs link.
        temperature: T.

    Returns:
        A scalar, at least 0; 0 where no text has a positive.
    """
    rows = torch.nonzero(positives >= 0)[:, 0]
    if not len(rows):
        return student.sum() * 0
    own = positives[rows]
    known = teacher[rows] @ teacher.T
    reached = known.gather(1, own[:, None])
    masked = (known > reached - _FALSE_NEGATIVE * reached.abs()) | (kin[rows][:, None] == kin)
    masked = masked.scatter(1, own[:, None], value=False).scatter(1, rows[:, None], value=True)
    logits = (student[rows] @ student.T / temperature).masked_fill(masked, -1e4)
    return functional.cross_entropy(logits, own)
