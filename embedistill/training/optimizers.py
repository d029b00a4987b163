"""How a student's weights are moved: the matrices of its layers by Muon, all else by AdamW, each at its own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_USUAL, _LEAST = 0.05, 0.002  # root mean squares: of a transformer's weights, and of weights that are nearly zero


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of layers, AdamW for embeddings, head, norms and biases.

    Muon moves a matrix by its gradient's momentum made orthogonal, in steps of 0.2 times the learning rate (root mean
    square), which is about what AdamW's are (Liu et al., 2025).

    Fitted students have weights of very different size: 1 in their table of words, some hundredths in their layers, a
    hundredth and less in their head, which moves every vector. Each is moved by the same share of its size, as by LAMB
    (You et al., 2020): its learning rate is that of weights with a root mean square of 0.05, in proportion.

    Args:
        student: Its linear maps in front of the head are what Muon moves.
        others: Further parameters, moved by AdamW at the learning rate itself.
        learning_rate: Of weights that are 0.05 large.
        weight_decay: Of all weights that are matrices.
    """

    def __init__(
        self, student: nn.Sequential, others: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> None:
        in_layers = {id(module.weight) for module in student[0].modules() if isinstance(module, nn.Linear)}
        groups = [
            {
                "params": [weight],
                "scale": max(_LEAST, float(weight.detach().square().mean().sqrt())) / _USUAL,
                "weight_decay": weight_decay if weight.ndim > 1 else 0.0,
                "in_layers": id(weight) in in_layers,
            }
            for weight in student.parameters()
            if weight.requires_grad
        ]
        groups += [{"params": [one], "scale": 1.0, "weight_decay": 0.0, "in_layers": False} for one in others]
        super().__init__(groups, {"lr": learning_rate})
        self._parts: Mapping[bool, Optimizer] = {
            True: Muon([torch.zeros(1, 1)], adjust_lr_fn="match_rms_adamw"),
            False: AdamW([torch.zeros(1)], fused=True),
        }
        for group in self.param_groups:
            for name, value in self._parts[group["in_layers"]].defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all weights by their gradients."""
        loss = closure() if closure else None
        for in_layers, part in self._parts.items():
            groups = [group for group in self.param_groups if group["in_layers"] == in_layers]
            part.param_groups = [group | {"lr": group["lr"] * group["scale"]} for group in groups]
            part.state = self.state
            part.step()
        return loss
