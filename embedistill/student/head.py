"""The student's output head: a projection that is solved, not drawn at random, and the space it maps into."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


def fit_pca(vectors: Matrix, size: int) -> Matrix:
    """Return the uncentred PCA of vectors (n_texts, dim) as a matrix (dim, size), its columns orthonormal.

    Uncentred, it keeps inner products as well as `size` dimensions can, and needs no bias. The sign of a column is the
    one that makes its largest entry positive, so that the same vectors give the same matrix.
    """
    _, eigenvectors = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    columns = eigenvectors[:, ::-1][:, :size]
    largest = columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])]
    signed: Matrix = (columns * np.sign(largest)).astype(np.float32)
    return signed


def project(vectors: Matrix, projection: Matrix | None) -> Matrix:
    """Map teacher vectors (n_texts, dim) into the student's space, to unit length; None leaves them as they are."""
    if projection is None:
        return vectors
    mapped = vectors @ projection
    unit: Matrix = mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def solve_ridge(inputs: Matrix, targets: Matrix, ridge: float = 1e-3) -> Matrix:
    """Return the matrix W (n_in, n_out) that minimises |inputs W - targets|^2 + lambda |W|^2.

    lambda is `ridge` times the mean eigenvalue of inputs^T inputs, so that it does not depend on the inputs' scale.
    """
    gram = inputs.T.astype(np.float64) @ inputs
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram, inputs.T.astype(np.float64) @ targets).astype(np.float32)
