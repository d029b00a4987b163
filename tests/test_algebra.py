import math

import pytest
import torch
from torch import tensor

from embedistill.student.algebra import Sums, inner, low_rank, root_of, solve, solve_in_turns


def test_sums_add_up_over_chunks_of_rows_in_double_precision() -> None:
    left, right = tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), tensor([[1.0], [10.0], [100.0]])
    sums = Sums()
    for rows in (slice(0, 2), slice(2, 3)):
        sums.add(lr=(left[rows], right[rows]), ll=(left[rows], left[rows]))
    assert sums["lr"].dtype == torch.float64
    assert sums["lr"].tolist() == [[531.0], [642.0]]  # 1 + 30 + 500, 2 + 40 + 600
    assert sums["ll"].tolist() == inner(left, left).tolist() == [[35.0, 44.0], [44.0, 56.0]]


@pytest.mark.parametrize(("ridge", "expected"), [(0.0, [2.0, 3.0]), (0.5, [8 / 5.25, 3 / 2.25])])
def test_a_ridge_is_a_share_of_the_mean_eigenvalue(ridge: float, expected: list[float]) -> None:
    gram, product = tensor([[4.0, 0.0], [0.0, 1.0]]).double(), tensor([[8.0], [3.0]]).double()
    assert solve(gram, product, ridge)[:, 0].tolist() == pytest.approx(expected)  # 0.5 of (4 + 1) / 2 is 1.25


def test_the_root_times_itself_is_the_matrix_again() -> None:
    root = root_of(tensor([[5.0, 4.0], [4.0, 5.0]]).double())  # eigenvalues 9 and 1
    torch.testing.assert_close(root, tensor([[2.0, 1.0], [1.0, 2.0]]).double())
    lifted = root_of(tensor([[4.0, 0.0], [0.0, 0.0]]).double())
    assert 0 < lifted[1, 1] < 1e-3  # so that it has an inverse


def test_of_few_dimensions_the_largest_stay() -> None:
    left, right = torch.diag(tensor([4.0, 1.0])), torch.eye(2)
    first, second = low_rank(left, right, 1)
    torch.testing.assert_close(first @ second, torch.diag(tensor([4.0, 0.0])))
    first, second = low_rank(left, right, 3)
    assert (first.shape, second.shape) == ((2, 3), (3, 2))
    torch.testing.assert_close(first @ second, left)


def test_what_is_added_and_how_it_is_read_are_solved_in_turns() -> None:
    """Of y = (1, -1, 0, 0), f = (0, 0, 1, -1) and t = 2 y + 6 f.

    F R is 6 / 1.3 where R is damped by 0.3; R is (4 + 12 F) / (2 + 2 F^2). Both hold for 1.3846 F^2 + 2 F = 4.6154.
    """
    y, f = tensor([[1.0], [-1.0], [0.0], [0.0]]), tensor([[0.0], [0.0], [1.0], [-1.0]])
    t = 2 * y + 6 * f
    sums = Sums()
    sums.add(ff=(f, f), ft=(f, t), fy=(f, y), yy=(y, y), yt=(y, t))
    added = solve_in_turns(sums, ridge=0.0).item()
    assert added == pytest.approx((-2 + math.sqrt(4 + 4 * 1.3846 * 4.6154)) / (2 * 1.3846), rel=0.05)
