"""The terms of the loss. Each compares a batch of student embeddings with the teacher's, cached, as labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from torch import Tensor, nn
from torch.nn import functional

Term = Literal["embedding", "similarity"]


class DistillationLoss(nn.Module):
    """The weighted sum of the terms whose weight is above zero, each logged by itself.

    Inputs: one text column. Labels: teacher embeddings in the student's space, unit length, shape (batch, dim).

    Args:
        model: The student.
        weights: Weight by term.
        temperature: Of the similarity term.
    """

    def __init__(self, model: SentenceTransformer, weights: Mapping[Term, float], temperature: float) -> None:
        super().__init__()
        self.model = model
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.temperature = temperature
        self.embedding = EmbedDistillLoss(model, distance_metric="cosine")

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms by name; the trainer adds them up."""
        student = self.model(sentence_features[0])["sentence_embedding"].float()
        return {term: weight * self._term(term, student, labels) for term, weight in self.weights.items()}

    def _term(self, term: Term, student: Tensor, teacher: Tensor) -> Tensor:
        match term:
            case "embedding":
                distance: Tensor = self.embedding.compute_loss_from_embeddings([student], [teacher])
                return distance
            case "similarity":
                return similarity_divergence(student, teacher, self.temperature)


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
