"""KronLinear in inference form: frozen, its large factor packed for the processor's kernels.

``models.optimize_for_inference`` makes these modules. Nothing in them is a parameter, and the large plain factor is
gone, so that no write to a weight can leave a packed copy behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..ops.checks import activation_code
from ..schemas.pack import packed_factor
from ..schemas.reference import kron_weight
from ..schemas.torch_internals import needs_autograd
from .factored import FactorShapes
from .linear import DENSE_DTYPES, KronLinear, kron_linear, takes_dense_product, takes_dense_products

_kron_matmul = torch.ops.kron_kernels.kron_matmul.default
_kron_pack = torch.ops.kron_kernels.kron_pack.default


def inference_form_error(what: str) -> RuntimeError:
    """Return the error for a use that only the training form allows."""
    return RuntimeError(
        f"{what}: expected a model in training form, got one that optimize_for_inference has frozen; load the "
        "checkpoint again and call optimize_for_inference last"
    )


def check_inference_call(x: Tensor) -> None:
    """Raise RuntimeError where a call of packed layers would have to be differentiated or cast."""
    if needs_autograd(x):
        raise inference_form_error("gradients of x")
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError(
            "autocast: expected it off for a model in inference form, got it on; give optimize_for_inference a dtype"
        )


def check_unchanged(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> None:
    """Raise RuntimeError where ``fn``, an argument of ``nn.Module._apply``, would replace one of ``tensors``."""
    for dtype, device in {(tensor.dtype, tensor.device) for tensor in tensors}:
        probe = torch.empty(1, dtype=dtype, device=device)
        if fn(probe) is not probe:
            raise inference_form_error(".to(): another dtype or device")


class PackedKronLinear(FactorShapes, nn.Module):
    """``activation(x (sum_s A_s (x) B_s)^T + bias)`` of a frozen layer: KronLinear's result, faster for few tokens.

    ``pack_`` makes it of a KronLinear. Its buffers are ``packed``, the bytes of ``kron_pack``; the small factor, ``a``
    or ``b``; and ``bias``. The large factor is an expanded NaN, which gives its shape to the ops. Where no compiled
    kernel takes packed factors, on a GPU for instance, ``packed`` is None and both factors are there.

    ``x`` is ``(..., in_features)`` in the layer's dtype. Raises RuntimeError for an ``x`` that requires a gradient,
    under autocast, and for another device or dtype, ``state_dict``, ``load_state_dict`` and ``train()``.
    """

    in_features: int
    out_features: int
    activation: str | None
    bias: Tensor | None
    packed: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``a``, ``b``, one of them a stand-in where ``packed`` has the other, and ``bias``."""
        return self.a, self.b, self._buffers["bias"]

    def forward(self, x: Tensor) -> Tensor:
        a, b, bias = self.operands()
        packed = self._buffers["packed"]
        if packed is None:
            if needs_autograd(x):
                raise inference_form_error("gradients of x")
            return kron_linear(x, a, b, bias, activation=self.activation)
        check_inference_call(x)
        if self._keeps_factors and takes_dense_product(x, a, b, self.activation):
            return F.linear(x, kron_weight(a, b), bias)
        return _kron_matmul(x, a, b, bias, self._activation_code, packed)

    def train(self, mode: bool = True) -> PackedKronLinear:
        if mode:
            raise inference_form_error("train()")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedKronLinear:
        check_unchanged(fn, self.buffers())
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise inference_form_error("state_dict()")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise inference_form_error("load_state_dict()")

    def extra_repr(self) -> str:
        (m1, n1), (m2, n2) = self.shapes
        activation = f", activation={self.activation}" if self.activation else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"factors={m1}x{n1} (x) {m2}x{n2}, terms={self.terms}, dtype={self.dtype}, "
            f"packed={self.packed is not None}{activation}"
        )


@torch.no_grad()
def pack_(layer: KronLinear) -> None:
    """Change a KronLinear into a PackedKronLinear in place: it stays the same object and changes its class."""
    a, b = (factor.detach().contiguous() for factor in (layer.a, layer.b))
    bias = None if layer.bias is None else layer.bias.detach()
    packed = _kron_pack(a, b) if a.is_cpu and backends.compiled_by_default("kron_matmul") else None
    if packed is not None and not packed.numel():
        packed = None
    keeps_factors = a.dtype in DENSE_DTYPES and takes_dense_products(layer.shapes, layer.terms, layer.activation)
    for name in ("a", "b", "bias"):
        layer._parameters.pop(name, None)
    layer.__class__ = PackedKronLinear  # type: ignore[assignment]
    dropped = None if packed is None or keeps_factors else packed_factor(packed)
    for name, factor in (("a", a), ("b", b)):
        if name == dropped:
            vars(layer)[name] = torch.full((), float("nan"), dtype=factor.dtype).expand(factor.shape)
        else:
            layer.register_buffer(name, factor)
    layer.register_buffer("bias", bias)
    layer.register_buffer("packed", packed)
    vars(layer).update(_keeps_factors=keeps_factors, _activation_code=activation_code(layer.activation))
    layer.eval()
