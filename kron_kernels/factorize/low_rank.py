"""Low-rank factors of a weight or of rows of a table, nearest in the error of the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_moment, check_positive, check_weight
from .weighted import regularised


@dataclass(frozen=True)
class LowRankFactors:
    """Factors ``u (r, m)`` and ``v (r, n)`` of W ~ u^T v, each row of u as long as its row of v.

    The errors are those of ``KronFactors``.
    """

    u: Tensor
    v: Tensor
    relative_error: float
    weighted_error: float | None = None

    def times(self, x: Tensor) -> Tensor:
        """Return u^T v x (m,) of x (n,), in fp64."""
        return self.u.T.to(torch.float64) @ (self.v.to(torch.float64) @ x.to(torch.float64))


@torch.no_grad()
def nearest_low_rank(weight: Tensor, rank: int, *, input_moment: Tensor | None = None) -> LowRankFactors:
    """Find the rank-``rank`` matrix nearest to ``weight`` (m, n), by a singular value decomposition in fp64.

    With ``input_moment`` = C = E[x x^T] (n, n) of the layer's inputs it minimises the error of the output,
    ||(W - u^T v) C^(1/2)||: u holds the leading left singular vectors of W C^(1/2), and v = u W (as in ASVD, SVD-LLM).
    Raises ValueError or TypeError as ``nearest_kronecker``, and for a rank above min(m, n).
    """
    check_weight(weight)
    check_positive("rank", rank)
    if rank > min(weight.shape):
        raise ValueError(f"rank: expected at most min(m, n) = {min(weight.shape)}, got {rank}")
    if input_moment is not None:
        check_moment(input_moment, weight.shape[1])
        input_moment = input_moment.detach().to(weight.device)
    directions, _ = output_directions(weight, input_moment)
    u = directions[:, :rank].T
    v = u @ weight.to(torch.float64)
    root = v.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    u, v = (u * root[:, None]).to(weight.dtype).contiguous(), (v / root[:, None]).to(weight.dtype).contiguous()
    residual = weight.to(torch.float64) - u.T.to(torch.float64) @ v.to(torch.float64)
    weighted = None if input_moment is None else _relative(residual, weight, input_moment.to(torch.float64))
    return LowRankFactors(u, v, _relative(residual, weight, None), weighted)


def output_directions(weight: Tensor, input_moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of W C^(1/2), (m, min(m, n)), and the singular values, largest first, fp64.

    From an eigendecomposition of the smaller Gram matrix, some ten times faster than a singular value decomposition;
    values below the square root of fp64's precision, relative to the largest, are noise.
    """
    weighted = weight.detach().to(torch.float64)
    if input_moment is not None:
        weighted = weighted @ torch.linalg.cholesky(regularised(input_moment))
    tall = weight.shape[0] > weight.shape[1]
    squares, vectors = torch.linalg.eigh(weighted.T @ weighted if tall else weighted @ weighted.T)
    values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    if tall:  # right singular vectors so far
        vectors = torch.linalg.qr(weighted @ vectors).Q
    return vectors, values


@torch.no_grad()
def principal_rows(rows: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit ``rows (k, d)`` by ``codes (k, r) @ basis (r, d) + mean (d,)``, the squared errors weighted by ``weights``.

    Weights ``(k,)`` are positive. Codes have a mean square of one over all of them. Computed in fp64; raises ValueError
    for a rank above d.
    """
    check_positive("rank", rank)
    if rank > rows.shape[1]:
        raise ValueError(f"rank: expected at most the width {rows.shape[1]}, got {rank}")
    centred, mean, moment = _centred(rows, weights)
    basis = torch.linalg.eigh(moment)[1].flip(1)[:, :rank].T
    codes = centred @ basis.T
    scale = codes.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (codes / scale).to(rows.dtype), (basis * scale).to(rows.dtype), mean.to(rows.dtype)


@torch.no_grad()
def principal_energies(rows: Tensor, weights: Tensor) -> Tensor:
    """Return what each principal direction of ``rows (k, d)`` keeps of their weighted squares, largest first, fp64."""
    values = torch.linalg.eigvalsh(_centred(rows, weights)[2]).flip(0).clamp(min=0)
    return values * float(weights.sum())


def _centred(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less their weighted mean (k, d), that mean (d,), and their weighted covariance (d, d), in fp64."""
    exact, share = rows.to(torch.float64), (weights / weights.sum()).to(rows.device, torch.float64)
    mean = share @ exact
    centred = exact - mean
    return centred, mean, (centred * share[:, None]).T @ centred


def _relative(residual: Tensor, weight: Tensor, moment: Tensor | None) -> float:
    exact = weight.to(torch.float64)
    lost, whole = (((each if moment is None else each @ moment) * each).sum() for each in (residual, exact))
    return (max(0.0, float(lost)) / float(whole)) ** 0.5 if float(whole) > 0 else 0.0
