"""How far a step moves each weight: rates in proportion to their size, and AdamW by which rows of tables wait."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

_USUAL, _LEAST = 0.05, 0.002  # root mean squares: of a transformer's weights, and of weights that are nearly zero


class RowAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019) whose tables of embeddings are moved row by row.

    A piece of a word that comes once in a thousand texts has a gradient in few steps. AdamW goes on moving its row by
    the momentum of such a step, some twenty-five times as far in all as a row that every step uses moves in one: rare
    pieces are moved most, each by what one text has to say of it. Here a row's moments, and their bias corrections, are
    of the steps that use it, and it stands still in the others. Of a row that is used in every step nothing changes.
    The moments are as in torch.optim.SparseAdam, which takes sparse gradients only and counts steps for all rows alike.

    Groups of parameters with `by_row` are moved so, all others as by AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all weights by their gradients; return what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [
            (group, table, table.grad)
            for group in self.param_groups
            if group.get("by_row")
            for table in group["params"]
            if table.grad is not None
        ]
        for _, table, _ in tables:
            table.grad = None  # so that it is left as it is
        super().step()
        for group, table, gradient in tables:
            self._move_rows(group, table, gradient)
            table.grad = gradient
        return loss

    def _move_rows(self, group: dict[str, Any], table: Tensor, gradient: Tensor) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros(len(table), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        used = gradient.abs().amax(1).nonzero()[:, 0]
        some, (beta1, beta2) = gradient[used], group["betas"]
        mean = state["exp_avg"][used].lerp_(some, 1 - beta1)
        square = state["exp_avg_sq"][used].lerp_(some.square(), 1 - beta2)
        step = state["step"][used] + 1
        for name, rows in (("exp_avg", mean), ("exp_avg_sq", square), ("step", step)):
            state[name][used] = rows
        step = step[:, None]
        move = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt_() + group["eps"])
        table[used] = table[used] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * move


def scale_rates(student: SentenceTransformer, rate: float) -> dict[str, float]:
    """Return a learning rate for each weight matrix, by a pattern of its name: `rate` where its entries are 0.05 large.

    Adam's steps are as large for all weights. Fitted students have weights of very different size: 1 in their table of
    words, some hundredths in their layers, a hundredth and less in their head, which moves every vector. Each is moved
    by the same share of its size, as by LAMB (You et al., 2020).
    """
    return {
        f"^model\\.{re.escape(name)}$": rate * max(_LEAST, float(weight.detach().square().mean().sqrt())) / _USUAL
        for name, weight in student.named_parameters()
    }
