"""The data-aware fit: Kronecker factors that keep a layer's output, not its weight.

Minimises f = || (W - sum_s A_s (x) B_s) C^(1/2) ||_F^2, the mean squared error of the output when the layer's inputs
have the second moment C = E[x x^T] (n, n). With one side fixed f is quadratic in the other, and all its rows have the
same small normal matrix, so alternating least squares solves each half exactly:

    B fixed, rows of [A_1 .. A_S] (m1, S*n1): H[(s,j),(t,J)] = sum_{k,l,L} B_s[k,l] C[jl,JL] B_t[k,L]
    A fixed, rows of [B_1 .. B_S] (m2, S*n2): K[(s,l),(t,L)] = sum_{i,j,J} A_s[i,j] C[jl,JL] A_t[i,J]

The right-hand sides need W C only, which is formed once. Reading C as (n1*n1, n2*n2) and W C as (m1*n1, m2*n2) makes
every step of a round a matrix product or a small solve, and no object is larger than W or C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .vanloan import rearranged_blocks, with_fixed_signs

# Added to C's diagonal, as a share of its mean: directions that calibration never saw keep a small weight, so that the
# factors stay bounded there. On encoders calibrated with 4,000 to 16,000 tokens a hundredth did best on other text.
RIDGE = 1e-2
# Each half step also pays this share of the normal matrix's mean diagonal for moving away from where it is. It makes
# the solve well posed for redundant terms, and unlike a ridge on the factors it cannot let the objective rise.
_PROXIMAL = 1e-10
# A round that lowers the objective by less than this share of the dense output's energy ends the fit.
_SETTLED = 1e-9


def fit_kronecker(
    weight: Tensor, a: Tensor, b: Tensor, moment: Tensor, rounds: int
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Run at most ``rounds`` rounds of alternating least squares from ``a`` (S, m1, n1) and ``b`` (S, m2, n2), fp64.

    Returns the factors, their norms split evenly, and the relative weighted error under the regularised C at the start
    and after each round; but for rounding it never rises.
    """
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    c = regularised(moment)
    weighted = weight.to(torch.float64) @ c
    energy = float((weighted * weight).sum())
    # W C as (m1*n1, m2*n2), and C as (n1*n1, n2*n2)
    target = torch.cat(list(rearranged_blocks(weighted, (m1, n1), False)))
    pairs = c.view(n1, n2, n1, n2).transpose(1, 2).reshape(n1 * n1, n2 * n2)
    del weighted, c

    history: list[float] = []
    for done in range(rounds + 1):
        b, a = _orthonormal_first(b, a)
        normal, side = _normal_matrix(pairs, b), (b.flatten(1) @ target.T).view(terms, m1, n1)
        lost = energy - 2 * (a * side).sum() + (a * _times_normal(a, normal)).sum()
        history.append(max(0.0, float(lost) / energy) if energy > 0 else 0.0)
        if done == rounds or (done > 0 and history[-2] - history[-1] <= _SETTLED):
            break
        a, b = _orthonormal_first(_half_step(a, side, normal), b)
        b = _half_step(b, (a.flatten(1) @ target).view(terms, m2, n2), _normal_matrix(pairs.T, a))
    a, b = _evenly_split(a, b)
    return a, b, tuple(value**0.5 for value in history)


def regularised(moment: Tensor) -> Tensor:
    """Return ``moment`` in fp64, made symmetric, with RIDGE times the mean of its diagonal added to the diagonal."""
    c = moment.to(torch.float64)
    c = (c + c.T) / 2
    c.diagonal().add_(RIDGE * c.diagonal().mean())
    return c


def _normal_matrix(pairs: Tensor, fixed: Tensor) -> Tensor:
    """Sum of F_s[k,l] C[jl,JL] F_t[k,L], (S*c, S*c), for ``fixed`` F (S, r, f) and C as ``pairs`` (c*c, f*f)."""
    terms, free = fixed.shape[0], round(pairs.shape[0] ** 0.5)
    products = torch.einsum("skl,tkr->lrst", fixed, fixed).flatten(0, 1).flatten(1)
    normal = (pairs @ products).view(free, free, terms, terms)
    return normal.permute(2, 0, 3, 1).reshape(terms * free, terms * free)


def _times_normal(factors: Tensor, normal: Tensor) -> Tensor:
    """Rows of [F_1 .. F_S] (r, S*c) times ``normal``, back as (S, r, c)."""
    return (_rows(factors) @ normal).unflatten(1, (factors.shape[0], -1)).transpose(0, 1)


def _rows(factors: Tensor) -> Tensor:
    """(S, r, c) as [F_1 .. F_S] (r, S*c)."""
    return factors.transpose(0, 1).flatten(1)


def _half_step(factors: Tensor, side: Tensor, normal: Tensor) -> Tensor:
    """The ``factors`` (S, r, c) that solve F normal = side, as a correction to those that came."""
    gradient = _rows(side - _times_normal(factors, normal))
    shift = _PROXIMAL * float(normal.diagonal().mean())
    if shift <= 0:
        return factors
    failed = 1
    while failed:
        shifted = normal.clone()
        shifted.diagonal().add_(shift)
        root, info = torch.linalg.cholesky_ex(shifted)
        # A moment summed in fp32 may be indefinite by its rounding.
        failed, shift = int(info), shift * 10
    step = torch.cholesky_solve(gradient.T, root).T
    return factors + step.unflatten(1, (factors.shape[0], -1)).transpose(0, 1)


def _orthonormal_first(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of products with the terms of ``first`` orthonormal: it keeps the normal matrix well conditioned."""
    q, r = torch.linalg.qr(first.flatten(1).T)
    return q.T.reshape(first.shape), (r @ second.flatten(1)).view(second.shape)


def _evenly_split(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum in the form of a singular value decomposition, each singular value split evenly, largest first."""
    a, b = _orthonormal_first(a, b)
    q, r = torch.linalg.qr(b.flatten(1).T)
    # sum_s a_s b_s^T = a^T (r^T q^T) with orthonormal a and q
    left, values, right = torch.linalg.svd(r.T)
    root = values.sqrt()[:, None]
    a_rows, b_rows = with_fixed_signs((left.T @ a.flatten(1)) * root, (right @ q.T) * root)
    return a_rows.view(a.shape), b_rows.reshape(b.shape)
