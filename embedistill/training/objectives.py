"""The terms of the loss. Each compares a batch of student embeddings with the teacher's, cached, as labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, GlobalOrthogonalRegularizationLoss
from torch import Tensor, nn
from torch.nn import functional

Term = Literal["embedding", "similarity", "matrix", "contrastive", "spread"]
Course = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Temperature:
    """A temperature on its way through a training."""

    start: float
    end: float
    schedule: Course = "cosine"

    def at(self, progress: float) -> float:
        """Return the temperature at a share of the training, 0 to 1: start + c (end - start)."""
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + share * (self.end - self.start)


class DistillationLoss(nn.Module):
    """The weighted sum of the terms whose weight is above zero, each logged by itself.

    Inputs: one text column. Labels: teacher embeddings in the student's space, unit length, shape (batch, dim).

    Args:
        model: The student.
        weights: Weight by term: embedding is 1 - cosine, the mean over the batch; spread is the two terms of the
            orthogonality regulariser of Zhang et al. (2017), as sentence-transformers has it; the others are the
            functions of this module.
        temperature: Of the terms similarity and contrastive.
        prefixes: Numbers of dimensions: each term is the mean over these prefixes of the vectors, scaled to unit length
            (Matryoshka, Kusupati et al., 2022); none: all dimensions alone.

    Attributes:
        progress: The share of the training that is done, 0 to 1; whoever trains sets it.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        weights: Mapping[Term, float],
        temperature: Temperature,
        prefixes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.temperature, self.prefixes, self.progress = temperature, tuple(prefixes), 0.0
        self._embedding = EmbedDistillLoss(model, distance_metric="cosine")
        self._spread = GlobalOrthogonalRegularizationLoss(model)

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms by name; the trainer adds them up."""
        student = self.model(sentence_features[0])["sentence_embedding"].float()
        sizes = self.prefixes or (student.shape[1],)
        cut = [[functional.normalize(vectors[:, :size], dim=1) for vectors in (student, labels)] for size in sizes]
        return {
            term: weight * torch.stack([self._term(term, *pair) for pair in cut]).mean()
            for term, weight in self.weights.items()
        }

    def _term(self, term: Term, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.temperature.at(self.progress)
        match term:
            case "embedding":
                distance: Tensor = self._embedding.compute_loss_from_embeddings([student], [teacher])
                return distance
            case "similarity":
                return similarity_divergence(student, teacher, temperature)
            case "matrix":
                return matrix_distance(student, teacher)
            case "contrastive":
                return contrast(student, teacher, temperature)
            case "spread":
                return torch.stack(self._spread.compute_gor(student)).sum()


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


def contrast(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
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


def similarity_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return how far the student's similarities within a batch are from the teacher's.

    The mean over i of KL(p_i || q_i), with p_i the softmax over j != i of <t_i, t_j> / T, q_i the same of the student:
    the soft targets of Hinton et al. (2015), over similarities as in CompRess (Koohpayegani et al., 2020).

    Args:
        student: Unit vectors, shape (batch, dim).
        teacher: Unit vectors, shape (batch, any dim).
        temperature: T; the smaller, the more the nearest neighbours count.

    Returns:
        A scalar, at least 0, and 0 where the similarities are the same; 0 for a batch of one.
    """
    if len(student) < 2:
        return student.sum() * 0
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    log_q, log_p = (
        functional.log_softmax((vectors @ vectors.T / temperature).masked_fill(itself, -1e4), dim=1)
        for vectors in (student, teacher)
    )
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
