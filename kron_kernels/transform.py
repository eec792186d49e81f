"""Online transforms: a product of activations whose result is wanted as int8, forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, reference
from ._checks import check_operands, check_types
from ._fused_ops import kron_mm_int8
from ._observers import autocasts, cast_for_autocast, is_observed
from ._problem import stacks

_IS_QUICK = _backends.compiled_by_default("kron_mm_int8")


def kron_matmul_int8(x: Tensor, a: Tensor, b: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """``x @ (sum_s a[s] (x) b[s]).T``, each token rounded to int8 by a scale of its own as it leaves the kernel.

    With a pair of square factors this is the online transform of FlatQuant (Sun et al., "FlatQuant: Flatness Matters
    for LLM Quantization", 2024), which flattens activations before they are quantised. On the CPU the result is never
    in memory in full precision.

    Args:
        x: ``(..., n1 * n2)``, float32, float64, bfloat16 or float16; any strides, any number of tokens, none too.
        a: left factors, ``(m1, n1)`` or ``(S, m1, n1)``, dtype and device of ``x``.
        b: right factors, ``(m2, n2)`` or ``(S, m2, n2)``, with as many terms as ``a``.
        backend: as for ``kron_matmul``.

    Returns:
        ``q (..., m1 * m2)``, int8, and ``scale (..., 1)``, float32: ``scale = max |y| / 127`` over the token's results
        ``y``, ``q = y / scale`` rounded to nearest, ties to even. The CPU kernels round ``y`` only this once, others
        first to the dtype of ``x``. A token of zeros has scale 0 and ``q`` 0. A token with a NaN or an infinity has
        that as its scale, and ``q`` 0: ``q * scale`` is NaN throughout.

    Raises:
        ValueError, TypeError, RuntimeError: as ``kron_matmul``; ValueError where a gradient would be asked of an
            operand, for rounded results have none.
    """
    check_types(x, a, b, None)
    if _IS_QUICK and backend is None and x.is_cpu and a.is_cpu and b.is_cpu and not is_observed(x, a, b):
        try:
            return kron_mm_int8(x, a, b)
        except (RuntimeError, ValueError):  # whatever the op refused, the checks below name in the caller's terms
            pass
    for name, operand in (("x", x), ("a", a), ("b", b)):
        if _is_differentiated(operand):
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient, for results in int8 have none, got one with "
                "requires_grad (use detach() or torch.no_grad())"
            )
    if _backends.is_unforced(backend):
        return _backends.forced(kron_matmul_int8, x, a, b, backend=backend)
    a, b = stacks(a, b)
    device_type = x.device.type
    if autocasts(device_type):
        x, a, b = cast_for_autocast(device_type, x, a, b)
    check_operands(x, a, b, None)
    if _backends.resolve(backend, device_type) == "reference":
        return reference.kron_mm_int8(x, a, b)
    return kron_mm_int8(x, a, b)


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd follows the tensor, at any level of torch.func's transforms."""
    if not torch.is_grad_enabled():
        return False
    functorch = torch._C._functorch
    while torch._C._are_functorch_transforms_active() and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad
