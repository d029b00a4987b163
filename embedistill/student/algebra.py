"""Least squares on sums of products, in fp64: what a narrow student is solved with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_DAMPING = 0.3
_TURNS = 6


class Sums(dict[str, Tensor]):
    """Sums of products over chunks of rows, by name, in fp64."""

    def add(self, **pairs: tuple[Tensor, Tensor]) -> None:
        """Add the product of each pair, such as `yt=(y, t)`."""
        for name, (left, right) in pairs.items():
            product = inner(left, right)
            self[name] = self[name] + product if name in self else product


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return left.T @ right, shape (n_left, n_right), of rows (n_rows, n_left) and (n_rows, n_right), as fp64."""
    product: Tensor = (left.T @ right).double()
    return product


def solve(gram: Tensor, product: Tensor, ridge: float) -> Tensor:
    """Return W that minimises |x W - t|^2 + lambda |W|^2, from gram = x.T x and product = x.T t.

    lambda is `ridge` times the mean eigenvalue of the gram matrix, so that it does not depend on the scale of x.
    """
    solved: Tensor = torch.linalg.solve(gram + _lift(gram, ridge), product)
    return solved


def solve_in_turns(sums: dict[str, Tensor], ridge: float) -> Tensor:
    """Return F that minimises |t - (y + f F) R|^2 over F and R, shape (n_f, n_y).

    Each is solved with the other held, R first, for F = 0; damped, so that no weak direction of R blows F up.

    Args:
        sums: Products of features f (n_rows, n_f), payload y (n_rows, n_y) and targets t (n_rows, n_t): ff, ft, fy,
            yy and yt.
        ridge: As of `solve`, for F and for R.
    """
    decoder = solve(sums["yy"], sums["yt"], ridge)
    lift = _lift(sums["ff"], ridge)
    factor = torch.linalg.cholesky(sums["ff"] + lift)
    added = torch.zeros_like(sums["fy"])
    for _ in range(_TURNS):
        metric = decoder @ decoder.T
        wanted = (sums["ft"] - sums["fy"] @ decoder) @ decoder.T
        wanted = wanted @ torch.linalg.inv(metric + _lift(metric, _DAMPING))
        added = torch.cholesky_solve(wanted, factor)
        cross = added.T @ sums["fy"]
        gram = sums["yy"] + cross + cross.T + added.T @ (wanted - lift.diagonal()[:, None] * added)
        decoder = solve(gram, sums["yt"] + added.T @ sums["ft"], ridge)
    return added


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (n, rank) and (rank, m) of the best approximation of left @ right, padded with zeros to rank."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    first, second = q_left @ u[:, :kept] * roots, (roots[:, None] * v[:kept]) @ q_right.T
    missing = rank - kept
    return functional.pad(first, (0, missing)), functional.pad(second, (0, 0, 0, missing))


def root_of(gram: Tensor) -> Tensor:
    """Return the symmetric square root of a positive matrix, its smallest eigenvalues lifted."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * values.clamp(min=1e-7 * values.max()).sqrt()) @ vectors.T
    return root


def _lift(gram: Tensor, share: float) -> Tensor:
    """Return a share of the mean eigenvalue, on the diagonal."""
    return share * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
