"""Checks of a loaded checkpoint: what transformers reports or leaves out, as one error that names the folder."""

from __future__ import annotations

import errno
from json import JSONDecodeError
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..convert.layers import FACTORED
from ..nn.quantized import WEIGHT_DTYPES


class CheckpointShapeError(RuntimeError, OSError):
    """Tensors of other shapes than the configuration's: a RuntimeError as in transformers, an OSError as here."""


def is_damage(error: Exception) -> bool:
    """Tell whether loading failed for what is in a file: safetensors, a file of torch.save, or the index of several."""
    return (
        isinstance(error, (SafetensorError, EOFError, UnpicklingError, JSONDecodeError))
        or "PytorchStreamReader" in str(error)
        or (isinstance(error, OSError) and error.errno == errno.EINVAL)  # a file cut short, mapped into memory
        or (isinstance(error, KeyError) and error.args == ("weight_map",))
    )


def factor_names(model: nn.Module) -> set[str]:
    """Return the names in the state dict of everything that factors are stored in."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FACTORED)}
    return {f"{name}.{key}" for name, module in layers.items() for key in module.state_dict() if key != "bias"}


def check_loaded(model: Any, path: Any, info: dict[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Raise OSError where a checkpoint has other shapes than the model, or lacks more than pooler and head.

    ``info`` is transformers' ``output_loading_info``.
    """
    if not ignore_mismatched_sizes and (mismatched := sorted(info["mismatched_keys"])):
        name, stored, expected = mismatched[0]
        raise CheckpointShapeError(
            f"{path}: expected the shapes of the configuration, {len(mismatched)} parameters have others, among "
            f"them {name}: expected {tuple(expected)}, got {tuple(stored)}; is it a checkpoint of another preset?"
        )
    missing, unexpected = set(info["missing_keys"]), info["unexpected_keys"]
    if factors := sorted(missing & factor_names(model)):
        stored_as = model.config.kron.get("weight_dtype")
        kinds = {key.rpartition("_")[2] for key in unexpected} & set(WEIGHT_DTYPES)
        plain = stored_as is not None and any(name.removesuffix(f"_{stored_as}") in unexpected for name in factors)
        if kinds or plain:
            # An int4 model has int8 projections too.
            wanted, got = stored_as or "floating point", min(kinds, default="floating point")
            raise OSError(
                f"{path}: expected factors in {wanted}, as the configuration says, got {got}; load them with the "
                "weight_dtype that they have"
            )
        raise OSError(
            f"{path}: expected factors, {len(factors)} are missing, among them {factors[0]}; "
            f"{type(model).__name__}.from_dense converts a dense model"
        )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    encoder = sorted(key for key in missing if key.startswith(prefix) and not key.startswith(f"{prefix}pooler."))
    if encoder:
        raise OSError(
            f"{path}: expected every tensor of the encoder, {len(encoder)} are missing, among them {encoder[0]}"
        )
