"""``kron_matmul_norm``: a product with the end of its block, a residual and a layer norm, as one op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..schemas import reference
from ..schemas.norm import kron_matmul_norm as matmul_norm_op
from ..schemas.product import stacks
from ..schemas.torch_internals import is_observed
from .autocast import autocasts
from .checks import check_norm, check_norm_types, check_projections, check_types
from .matmul import kron_matmul
from .route import REJECTED, observed

_HAS_CPU_KERNEL = backends.compiled_by_default("kron_matmul_norm")


class AddNorm(NamedTuple):
    """``layer_norm(residual + y)`` of a result ``y``: its last dimension is normed, as at the end of a BERT block.

    ``residual`` has the shape of ``y``; ``weight`` and ``bias`` are ``(m,)``, all of the dtype of ``y``.
    """

    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-12

    def apply(self, y: Tensor) -> Tensor:
        """By plain torch, differentiably."""
        return reference.add_norm(y, *self)


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    norm: AddNorm,
    *,
    backend: str | None = None,
) -> Tensor:
    """``layer_norm(residual + kron_matmul(x, a, b, bias))``: an output projection with the end of its block.

    Operands as for ``kron_matmul`` and :class:`AddNorm`; returns ``(..., m1 * m2)``. Raises what ``kron_matmul``
    raises, and ValueError or TypeError for a residual, weight or bias that does not fit.
    """
    try:
        if _HAS_CPU_KERNEL and backend is None and x.is_cpu and not is_observed(x, a, b, bias, *norm[:3]):
            return matmul_norm_op(x, *stacks(a, b), bias, *norm)
    except REJECTED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_matmul_norm, x, a, b, bias, norm, backend=backend)
    check_types(x, a, b, bias)
    check_norm_types(norm)
    if observed(x, backend, (x, a, b, bias, *norm[:3])):
        return add_norm(norm, x, kron_matmul(x, a, b, bias, backend=backend))
    a, b = stacks(a, b)
    check_projections(x, [a], [b], [bias])
    check_norm(x, a.shape[1] * b.shape[1], norm)
    return matmul_norm_op(x, a, b, bias, *norm)


def add_norm(norm: AddNorm, x: Tensor, y: Tensor) -> Tensor:
    """The norm of a product of x, checked; autocast mixes dtypes."""
    device_type = x.device.type
    mixed = autocasts(device_type)
    check_norm(x, y.shape[-1], norm, dtypes=not mixed)
    return norm.apply(y)
