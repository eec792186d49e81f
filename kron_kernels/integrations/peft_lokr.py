"""Compute PEFT's LoKr layers from their factors: ``y = base(x) + scaling * (w1 (x) w2) x`` without the product.

PEFT builds ``torch.kron(w1, w2)``, as large as the weight it adapts, on every forward, and its gradient on every
backward (LoKr: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
2023, section 3.3). Parameters, state dicts, merging and random draws stay PEFT's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import frozen_linear_kron, kron_addmm, kron_addmm_
from ..ops.addmm import RightFactor
from ..ops.autocast import autocasts
from ..ops.frozen_linear import is_fresh, is_plain_frozen
from ..schemas.torch_internals import in_place_is_observed
from .versions import check_version

PEFT_VERSIONS = ">=0.21,<0.22"
check_version("peft", PEFT_VERSIONS)

# After the check of the version: another one may lack these names.
from peft.tuners.lokr.layer import Conv1d, Conv2d, Linear, LoKrLayer  # noqa: E402

# What a patch of the classes replaced, by class and name; empty while they are PEFT's own.
_saved: dict[tuple[type, str], Callable[..., Tensor]] = {}
_warned: set[str] = set()


def apply_kron_kernels_to_peft(model: nn.Module | None = None) -> None:
    """Make LoKr layers compute from their factors, without the product ``w1 (x) w2``.

    Args:
        model: patch the LoKr layers that it has now, for all adapters they get. None: patch PEFT's classes, and with
            them every LoKr layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no LoKr layer.
        ImportError: on import of this file, where peft is not installed in a version of ``PEFT_VERSIONS``.

    Supported are linear layers, and convolutions of kernel size 1 without groups and padding, with full and low-rank
    factors, in any dtype of ``kron_addmm``. Other layers keep PEFT's own computation, with one warning for each reason.
    The output and the gradients equal PEFT's up to rounding, with the same random draws for rank and module dropout.
    Merging, saving and disabling adapters are unchanged. Patching twice changes nothing. Patch before
    ``torch.compile``.
    """
    if model is None:
        if not _saved:
            for owner, name, method in _METHODS:
                _saved[owner, name] = owner.__dict__[name]
                setattr(owner, name, method)
        return
    for layer in _layers(model):
        if type(layer) in _BY_FACTORS:
            layer.__class__ = _BY_FACTORS[type(layer)]
        for adapter in layer._available_adapters:
            if reason := _unsupported_reason(layer, adapter):
                _warn(reason)


def remove_kron_kernels_from_peft(model: nn.Module | None = None) -> None:
    """Undo ``apply_kron_kernels_to_peft(model)``; where nothing was patched, do nothing.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no LoKr layer.
    """
    if model is None:
        for (owner, name), method in _saved.items():
            setattr(owner, name, method)
        _saved.clear()
    else:
        own = {patched: plain for plain, patched in _BY_FACTORS.items()}
        for layer in _layers(model):
            layer.__class__ = own.get(type(layer), type(layer))
    _warned.clear()


@contextmanager
def kron_kernels_in_peft(model: nn.Module | None = None) -> Iterator[None]:
    """Apply ``apply_kron_kernels_to_peft(model)`` inside the block; layers patched before stay patched afterwards."""
    before = bool(_saved)
    own = [] if model is None else [(layer, type(layer)) for layer in _layers(model)]
    apply_kron_kernels_to_peft(model)
    try:
        yield
    finally:
        for layer, kind in own:
            layer.__class__ = kind
        if model is None and not before:
            remove_kron_kernels_from_peft()


def _layers(model: nn.Module) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or None, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, LoKrLayer)]
    if not layers:
        raise ValueError(f"model: expected a model with LoKr layers of PEFT, got {type(model).__name__} without any")
    return layers


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``LoKrLayer.forward``: ``x (..., n)``, or ``(..., n, *space)`` of a convolution, to m channels in place of n."""
    if layer.disable_adapters or layer.merged:
        return _original(LoKrLayer, "forward")(layer, x, *args, **kwargs)
    if not args and not kwargs and (adapter := _only_adapter(layer, x)):
        if _drops_module(layer, adapter):
            return layer.base_layer(x)
        _, a, b = _operands(layer, adapter, x)
        frozen = layer.base_layer
        return frozen_linear_kron(x, frozen.weight, frozen.bias, a, b, alpha=layer.scaling[adapter])
    result = layer.base_layer(x, *args, **kwargs)
    in_place = not in_place_is_observed() and is_fresh(layer.base_layer, result)
    for adapter in layer.active_adapters:
        if adapter not in layer._available_adapters or _drops_module(layer, adapter):
            continue
        if isinstance(layer, Linear) and not _drops_rows(layer, adapter) and not _unsupported_reason(layer, adapter):
            result = _add_product(layer, adapter, x, result, in_place)
        else:
            result = result + layer._get_delta_activations(adapter, x, *args, **kwargs)
        in_place = not in_place_is_observed()  # the result is a new tensor by now
    return result.to(x.dtype)


def _only_adapter(layer: Any, x: Tensor) -> str:
    """The one active adapter of a plain frozen layer, all tensors of one dtype; "" for any other case."""
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer._available_adapters]
    if len(adapters) != 1 or not isinstance(layer, Linear) or in_place_is_observed():
        return ""
    (adapter,) = adapters
    frozen = layer.base_layer
    if not is_plain_frozen(frozen) or _drops_rows(layer, adapter) or _unsupported_reason(layer, adapter):
        return ""
    factors = (getattr(layer, name) for name in layer.adapter_layer_names)
    used = [frozen.weight, *(factor[adapter] for factor in factors if adapter in factor)]
    alike = all(tensor.dtype is x.dtype for tensor in used) and _computed_dtype(x) is x.dtype
    return adapter if alike else ""


def _add_product(layer: Any, adapter: str, x: Tensor, result: Tensor, in_place: bool) -> Tensor:
    """``result (..., m)`` plus the product of ``x (..., n)``, written into ``result`` where ``in_place``."""
    x, a, b = _operands(layer, adapter, x)
    dtype = _computed_dtype(x)
    if torch.promote_types(result.dtype, dtype) != dtype:  # the sum has a wider dtype than the product
        zeros = result.new_zeros(result.shape, dtype=dtype)
        return result + kron_addmm(zeros, x, a, b, alpha=layer.scaling[adapter])
    alpha = layer.scaling[adapter]
    if result.dtype != dtype:
        result, in_place = result.to(dtype), not in_place_is_observed()
    if not in_place:
        return kron_addmm(result, x, a, b, alpha=alpha)
    if not result._is_view():
        return kron_addmm_(result, x, a, b, alpha=alpha)
    # Of batched x, F.linear with a bias gives a view of a matrix: writing through it, autograd would copy the gradient.
    matrix: Any = result._base
    return kron_addmm_(matrix, x.reshape(-1, x.shape[-1]), a, b, alpha=alpha).view(result.shape)


def _get_delta_activations(layer: Any, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The adapter's term only, in the layout of the layer, as PEFT's own ``forward`` and dropout use it."""
    if reason := _unsupported_reason(layer, adapter):
        if not torch.compiler.is_compiling():
            _warn(reason)
        owner = next(plain for plain in _BY_FACTORS if isinstance(layer, plain))
        return _original(owner, "_get_delta_activations")(layer, adapter, x, *args, **kwargs)
    x, a, b = _operands(layer, adapter, x)
    base_layer = layer.get_base_layer()
    space = 0 if isinstance(layer, Linear) else len(base_layer.kernel_size)
    if space:
        index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in base_layer.stride))
        x = x[index].movedim(-space - 1, -1)
    zeros = x.new_zeros((*x.shape[:-1], layer.out_features), dtype=_computed_dtype(x))
    add = kron_addmm if in_place_is_observed() else kron_addmm_
    delta = add(zeros, x, a, b, alpha=layer.scaling[adapter])
    if _drops_rows(layer, adapter):
        delta = delta * _row_mask(layer, adapter).to(delta)
    return delta.movedim(-1, -space - 1) if space else delta


def _operands(layer: Any, adapter: str, x: Tensor) -> tuple[Tensor, Tensor, RightFactor]:
    """x as PEFT casts it, and factors whose product is the adapter's weight: a, and b or a pair (p, q) with b = p q."""
    w1 = layer.lokr_w1[adapter] if adapter in layer.lokr_w1 else layer.lokr_w1_a[adapter] @ layer.lokr_w1_b[adapter]
    if adapter in layer.lokr_w2:
        w2 = layer.lokr_w2[adapter]
        dtype = torch.promote_types(w1.dtype, w2.dtype)
        w1, matrix = w1.to(dtype), w2.to(dtype).flatten(1)
        # torch.kron lines up last dimensions: of w1 (m1, n1) and the w2 (m2, n2, 1) of a Conv1d it makes, reshaped to
        # the layer's weight, w2 (x) w1.
        a, b = (matrix, w1) if w2.dim() == 3 else (w1, matrix)
        return layer._cast_input_dtype(x, dtype), a, b
    p, q = layer.lokr_w2_a[adapter], layer.lokr_w2_b[adapter]
    dtype = torch.promote_types(w1.dtype, p.dtype)
    return layer._cast_input_dtype(x, dtype), w1.to(dtype), (p.to(dtype), q.to(dtype))


def _computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product of ``x``."""
    device_type = x.device.type
    if x.dtype is torch.float64 or not autocasts(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def _drops_module(layer: Any, adapter: str) -> bool:
    """Whether module dropout leaves the adapter out now; one draw from torch's generator, as PEFT's."""
    probability = layer.module_dropout[adapter]
    # A draw without effect would break a compiled graph in two.
    if not layer.training or (probability == 0 and torch.compiler.is_compiling()):
        return False
    return not torch.rand(1) > probability


def _drops_rows(layer: Any, adapter: str) -> bool:
    return layer.training and bool(layer.rank_dropout[adapter])


def _row_mask(layer: Any, adapter: str) -> Tensor:
    """PEFT's rank dropout: one draw for each row of the weight ``(m, n)``, which is one for each output; ``(m,)``."""
    mask = (torch.rand(layer.out_features) > layer.rank_dropout[adapter]).float()
    return mask / mask.mean() if layer.rank_dropout_scale[adapter] else mask


def _unsupported_reason(layer: Any, adapter: str) -> str:
    """Why the adapter keeps PEFT's own computation; "" where it is supported."""
    if type(layer) not in _BY_FACTORS and not isinstance(layer, _ByFactors):
        return f"a LoKr layer of class {type(layer).__name__}"
    base_layer = layer.get_base_layer()
    if not isinstance(layer, Linear):
        if any(size != 1 for size in base_layer.kernel_size):
            return f"a convolution of kernel size {tuple(base_layer.kernel_size)}"
        if base_layer.groups != 1:
            return f"a convolution of {base_layer.groups} groups"
        if base_layer.padding not in ("same", "valid") and any(base_layer.padding):
            return f"a convolution of kernel size 1 with padding {tuple(base_layer.padding)}"
    if not isinstance(layer.scaling[adapter], (float, int)):
        return f"a scaling of class {type(layer.scaling[adapter]).__name__}"
    for name in layer.adapter_layer_names:
        factors = getattr(layer, name)
        if adapter in factors and type(factors[adapter]) not in (Tensor, nn.Parameter):
            return f"a factor of class {type(factors[adapter]).__name__}"
    return ""


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"PEFT LoKr: {reason} keeps PEFT's own computation, which builds the weight", stacklevel=3)


def _original(owner: type, name: str) -> Callable[..., Tensor]:
    """PEFT's own method, whether its class is patched or not."""
    return _saved.get((owner, name)) or owner.__dict__[name]


class _ByFactors:
    """Mixin before one of PEFT's classes: methods that use the factors. It adds neither state nor parameters."""

    forward: Any = _forward
    _get_delta_activations: Any = _get_delta_activations


class KronLinear(_ByFactors, Linear):
    """PEFT's LoKr layer of a linear layer, patched."""


class KronConv1d(_ByFactors, Conv1d):
    """PEFT's LoKr layer of a Conv1d, patched."""


class KronConv2d(_ByFactors, Conv2d):
    """PEFT's LoKr layer of a Conv2d, patched."""


_BY_FACTORS: dict[type, type] = {Linear: KronLinear, Conv1d: KronConv1d, Conv2d: KronConv2d}
_METHODS = (
    (LoKrLayer, "forward", _forward),
    *((plain, "_get_delta_activations", _get_delta_activations) for plain in _BY_FACTORS),
)
