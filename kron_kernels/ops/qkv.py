"""``kron_qkv``: several products of one input as one op."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from ..schemas.product import stacks
from ..schemas.qkv import kron_qkv as qkv_op
from ..schemas.torch_internals import is_observed
from .checks import check_projections, check_types
from .matmul import kron_matmul
from .route import REJECTED, observed

_HAS_CPU_KERNEL = backends.compiled_by_default("kron_qkv")


def kron_qkv(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several products of one input, ``kron_matmul(x, a[i], b[i], bias[i])`` for each i, reading ``x`` once.

    Args:
        x: ``(..., n)``.
        a, b: a pair of factors, matrices or stacks, for each projection; their shapes may differ.
        bias: one for each projection, or None for none at all.
        backend: as for ``kron_matmul``.

    Returns:
        One contiguous ``(..., m_i)`` for each projection. Viewed as ``(..., heads, m_i / heads)`` and transposed it is
        what ``scaled_dot_product_attention`` takes, without a copy.
    """
    biases: list[Tensor | None] = list(bias) if bias is not None else [None] * len(a)
    if not len(a) == len(b) == len(biases) or not a:
        raise ValueError(
            f"a, b, bias: expected as many of each, at least one projection, got {len(a)}, {len(b)} and {len(biases)}"
        )
    try:
        if _HAS_CPU_KERNEL and backend is None and x.is_cpu and not is_observed(x, *a, *b, *biases):
            return _qkv(x, [stacks(*pair) for pair in zip(a, b, strict=True)], bias)
    except REJECTED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_qkv, x, a, b, bias, backend=backend)
    for left, right, one_bias in zip(a, b, biases, strict=True):
        check_types(x, left, right, one_bias)
    if observed(x, backend, (x, *a, *b, *biases)):
        return tuple(kron_matmul(x, *factors, backend=backend) for factors in zip(a, b, biases, strict=True))
    pairs = [stacks(*pair) for pair in zip(a, b, strict=True)]
    check_projections(x, [left for left, _ in pairs], [right for _, right in pairs], biases)
    return _qkv(x, pairs, bias)


def _qkv(x: Tensor, pairs: list[tuple[Tensor, Tensor]], bias: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    lefts, rights = ([pair[side] for pair in pairs] for side in (0, 1))
    return tuple(qkv_op(x, lefts, rights, [] if bias is None else list(bias), []))
