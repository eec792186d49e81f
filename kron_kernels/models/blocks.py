"""The products of a transformer's block by the fused ops, for layers in training form or in inference form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import KronLinear, PackedKronLinear, QuantizedKronLinear
from ..nn.inference import check_inference_call
from ..ops import AddNorm, kron_ffn, kron_matmul_norm, kron_qkv
from ..ops.checks import activation_code

_kron_qkv = torch.ops.kron_kernels.kron_qkv.default
_kron_matmul_norm = torch.ops.kron_kernels.kron_matmul_norm.default
_kron_ffn = torch.ops.kron_kernels.kron_ffn.default


def is_unhooked(module: nn.Module) -> bool:
    """Tell whether a call of ``module`` runs its class's forward and nothing else, so that it may be left out."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def are_factored(*modules: Any) -> bool:
    """Tell whether all are Kronecker layers of one form, without activation or hooks, which one op can compute."""
    packed = _packed(modules[0]) is not None
    for module in modules:
        if type(module) not in (KronLinear, QuantizedKronLinear, PackedKronLinear):
            return False
        if module.activation is not None or not is_unhooked(module) or (_packed(module) is not None) != packed:
            return False
    return True


def _packed(module: Any) -> Tensor | None:
    return module._buffers["packed"] if type(module) is PackedKronLinear else None


def project(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return ``layer(x)`` of each layer; of layers that are factored together from one read of ``x (..., n)``."""
    if are_factored(*layers):
        a, b, bias = zip(*[layer.operands() for layer in layers], strict=True)
        missing = sum(each is None for each in bias)
        if missing in (0, len(bias)):
            if _packed(layers[0]) is None:
                return kron_qkv(x, a, b, None if missing else bias)
            check_inference_call(x)
            return tuple(_kron_qkv(x, a, b, () if missing else bias, [_packed(layer) for layer in layers]))
    return tuple(layer(x) for layer in layers)


def matmul_norm(x: Tensor, dense: Any, norm: AddNorm) -> Tensor:
    """Return ``norm`` of ``dense(x)``, for a layer that is factored."""
    packed = _packed(dense)
    if packed is None:
        a, b, bias = dense.operands()
        return kron_matmul_norm(x, a, b, bias, norm)
    check_inference_call(x)
    return _kron_matmul_norm(x, *dense.operands(), *norm, packed)


def ffn(x: Tensor, first: Any, second: Any, activation: str, norm: AddNorm | None) -> Tensor:
    """Return ``second(activation(first(x)))`` and its norm, for two layers that are factored."""
    packed = _packed(first)
    if packed is None:
        return kron_ffn(x, *first.operands(), *second.operands(), activation=activation, norm=norm)
    check_inference_call(x)
    operands = (*first.operands(), *second.operands(), activation_code(activation))
    return _kron_ffn(x, *operands, *(norm or (None, None, None, 0.0)), packed, _packed(second))
