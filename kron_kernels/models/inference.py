"""The inference form of a model: ``optimize_for_inference`` and the class that guards its result."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertModel

from ..convert.layers import FACTORED
from ..nn import KronLinear, PackedKronLinear, is_quantized
from ..nn.inference import check_unchanged, inference_form_error, pack_
from ..nn.quantized import from_quantized_
from .bert_layers import fuse_
from .blocks import is_unhooked

_Model = TypeVar("_Model", bound=nn.Module)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def optimize_for_inference(model: _Model, dtype: str | None = None) -> _Model:
    """Change a model with factored layers into its inference form, in place, and return it.

    Every KronLinear becomes a PackedKronLinear, which keeps its large factor in the layout of this processor's kernels
    alone. Low-rank layers and embeddings compute as before. Factors stored as integers are converted to floating point.
    All other parameters become buffers of the same names, models that contain a BertModel are fused (``fuse_``), and
    the model is put into evaluation mode. Results are those of the model before, up to rounding.

    The result has no parameters. A call that would need a gradient, autocast, ``train()``, another dtype or device,
    ``state_dict``, ``save_pretrained`` and ``load_state_dict`` raise RuntimeError. ``copy.deepcopy`` and pickle work,
    for processors of the same kind.

    Args:
        model: any module that contains factored layers (``kron_kernels.nn``), on the device where it will run.
        dtype: "fp32", "bf16" or "fp16" to convert the model first; None to leave its dtype.

    Raises:
        ValueError: an unknown dtype; a model without factored layers; weights on the meta device or sharded; a
            factored layer with hooks, a replaced ``forward`` or a parametrization, by name.
        RuntimeError: a call under autocast; a model in inference form already, for another dtype.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected None or one of {', '.join(map(repr, _DTYPES))}, got {dtype!r}")
    if isinstance(model, InferenceModel):
        return model if dtype is None else model.to(_DTYPES[dtype])
    _check(model)
    for module in model.modules():
        if isinstance(module, FACTORED) and is_quantized(module):
            from_quantized_(module)
    if dtype is not None:
        model.to(_DTYPES[dtype])
    model.eval()
    for module in model.modules():
        if type(module) is KronLinear:
            pack_(module)
    _freeze(model)
    if any(isinstance(module, BertModel) for module in model.modules()):
        fuse_(model)
    for module in model.modules():
        if module is model or hasattr(type(module), "save_pretrained"):
            plain: Any = type(module)
            module.__class__ = _inference_class(plain)
    return model


def _check(model: nn.Module) -> None:
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise RuntimeError("autocast: expected it off for optimize_for_inference, got it on; pass a dtype instead")
    factored = {name: module for name, module in model.named_modules() if isinstance(module, _FACTORED)}
    if not factored:
        raise ValueError(f"model: expected factored layers, as of kronify_, got a {type(model).__name__} without any")
    for name, module in factored.items():
        if nn.utils.parametrize.is_parametrized(module):
            raise ValueError(f"model: expected plain factors, got a parametrization of {name}; remove it first")
        if not is_unhooked(module):
            raise ValueError(f"model: expected factored layers without hooks, got {name} with one; remove it first")
    for name, tensor in model.named_parameters():
        if tensor.is_meta or type(tensor.data) is not Tensor:
            kind = "the meta device" if tensor.is_meta else type(tensor.data).__name__
            raise ValueError(f"model: expected whole weights in memory, got {name} as {kind}")


_FACTORED = (*FACTORED, PackedKronLinear)


def _freeze(model: nn.Module) -> None:
    """Change every parameter into a buffer of its name, shared ones into one buffer; no dropout drops any more."""
    frozen: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # train() of a part raises, but some of its modules have changed their mode by then
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, frozen.setdefault(id(parameter), parameter.detach()))


class InferenceModel(nn.Module):
    """What ``optimize_for_inference`` mixes into the class of a model: errors for all that its form cannot do."""

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())

    def train(self: _Model, mode: bool = True) -> _Model:
        if mode:
            raise inference_form_error("train()")
        return super().train(False)

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        if requires_grad:
            raise inference_form_error("requires_grad_()")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceModel:
        check_unchanged(fn, self.buffers())
        return super()._apply(fn, recurse)

    # The class is made at run time: a copy or a pickle names the class that it was made from.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (type(self).__mro__[2],), self.__dict__


def _unsupported(name: str) -> Callable[..., NoReturn]:
    def unsupported(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise inference_form_error(f"{name}()")

    return unsupported


for _name in ("state_dict", "load_state_dict", "save_pretrained", "resize_token_embeddings"):
    setattr(InferenceModel, _name, _unsupported(_name))


@cache
def _inference_class(base: Any) -> Any:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (InferenceModel, base), names)


def _restore(base: Any) -> nn.Module:
    kind = _inference_class(base)
    return kind.__new__(kind)
