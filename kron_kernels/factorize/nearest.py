"""``nearest_kronecker``: the best Kronecker factors of a weight, and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schemas.reference import kron_matmul
from .checks import check_a_shape, check_moment, check_terms, check_weight
from .low_rank import LowRankFactors
from .vanloan import van_loan
from .weighted import fit_kronecker

# fp64 entries of the residual in memory at a time (32 MiB).
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class KronFactors:
    """Factors of W ~ sum_s a[s] (x) b[s] and their errors.

    ``a`` is (S, m1, n1), ``b`` is (S, m2, n2), in the weight's dtype and on its device. ``relative_error`` is
    ||W - What|| / ||W|| in the Frobenius norm, of the factors as they are, rounding to the weight's dtype included.
    A data-aware fit also has ``weighted_error``: the root mean square error of the layer's output on the calibration
    data relative to that output, the same with W C^(1/2) for W. ``history`` holds the weighted error (under the
    regularised C) of an alternating fit at its start and after each round.
    """

    a: Tensor
    b: Tensor
    relative_error: float
    weighted_error: float | None = None
    history: tuple[float, ...] = ()

    def times(self, x: Tensor) -> Tensor:
        """Return What x (m,) of x (n,), in fp64, without building What."""
        return kron_matmul(x.to(torch.float64), self.a.to(torch.float64), self.b.to(torch.float64))


@torch.no_grad()
def nearest_kronecker(
    weight: Tensor,
    a_shape: Sequence[int],
    terms: int = 1,
    *,
    input_moment: Tensor | None = None,
    rounds: int = 15,
) -> KronFactors:
    """Find the Kronecker factors nearest to ``weight`` (m, n): a (S, m1, n1), b (S, m/m1, n/n1) with S = ``terms``.

    Without ``input_moment`` this is the nearest sum of Kronecker products in the Frobenius norm (Van Loan and
    Pitsianis, "Approximation with Kronecker products", 1993), with each singular value split evenly between a and b;
    it is exact at terms = min(m1*n1, m2*n2).

    With ``input_moment`` = C = E[x x^T] (n, n) of the layer's inputs it minimises ||(W - What) C^(1/2)||, the error
    of the output, by at most ``rounds`` rounds of alternating least squares started from those factors. C is used
    with a hundredth of its mean diagonal added to its diagonal. Each round factors matrices of S*n1 and S*n2 rows.
    Where the bias takes up the mean error (``mean_corrected_bias``), the covariance is the better C.

    Computes in fp64 for every dtype, without touching the global random state, and returns the weight's dtype.
    Raises ValueError or TypeError for a weight that is not a finite floating-point matrix, an ``a_shape`` that does not
    divide it, ``terms`` out of range, or an ``input_moment`` that is no symmetric positive semi-definite (n, n) matrix.
    """
    check_weight(weight)
    m, n = weight.shape
    m1, n1 = check_a_shape(a_shape, m, n)
    check_terms(terms, min(m1 * n1, m * n // (m1 * n1)))
    weight = weight.detach()
    if input_moment is None:
        a, b = van_loan(weight, (m1, n1), terms)
        a, b = a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
        return KronFactors(a, b, approximation_errors(weight, a, b)[0])
    check_moment(input_moment, n)
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds: expected an int of at least 0, got {rounds!r}")
    input_moment = input_moment.detach().to(weight.device)
    a, b = van_loan(weight, (m1, n1), terms)
    a, b, history = fit_kronecker(weight, a, b, input_moment, rounds)
    a, b = a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
    return KronFactors(a, b, *approximation_errors(weight, a, b, input_moment), history)


def approximation_errors(
    weight: Tensor, a: Tensor, b: Tensor, input_moment: Tensor | None = None
) -> tuple[float, float | None]:
    """Return (||W - What|| / ||W||, the same weighted with C^(1/2) or None without C), summed in fp64 by row blocks."""
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape
    c = None if input_moment is None else input_moment.to(torch.float64)
    a, b = a.to(torch.float64), b.to(torch.float64)
    step = max(1, _BLOCK_ENTRIES // (m2 * n1 * n2))
    lost = weighted_lost = energy = weighted_energy = 0.0
    for start in range(0, m1, step):
        rows = weight[start * m2 : (start + step) * m2].to(torch.float64)
        residual = rows - torch.einsum("sij,skl->ikjl", a[:, start : start + step], b).reshape(rows.shape)
        lost += float(residual.square().sum())
        energy += float(rows.square().sum())
        if c is not None:
            weighted_lost += float(((residual @ c) * residual).sum())
            weighted_energy += float(((rows @ c) * rows).sum())
    relative_error = _relative(lost, energy)
    return relative_error, None if c is None else _relative(weighted_lost, weighted_energy)


def _relative(lost: float, energy: float) -> float:
    return (max(0.0, lost) / energy) ** 0.5 if energy > 0 else 0.0


@torch.no_grad()
def mean_corrected_bias(
    weight: Tensor, factors: KronFactors | LowRankFactors, bias: Tensor | None, input_mean: Tensor
) -> Tensor:
    """Return the bias (m,) that gives the factored layer the dense layer's mean output: bias + (W - What) mean.

    ``weight`` is the dense (m, n) weight, ``bias`` (m,) or None (zeros), ``input_mean`` (n,) the mean of the layer's
    inputs. Computed in fp64, without building What, and returned in the weight's dtype. Raises ValueError for a mean
    or bias of another shape.
    """
    m, n = weight.shape
    if tuple(input_mean.shape) != (n,):
        raise ValueError(f"input_mean: expected shape ({n},), got {tuple(input_mean.shape)}")
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"bias: expected shape ({m},), got {tuple(bias.shape)}")
    mean = input_mean.to(weight.device, torch.float64)
    error = weight.to(torch.float64) @ mean - factors.times(mean)
    return (error if bias is None else bias.to(torch.float64) + error).to(weight.dtype)
