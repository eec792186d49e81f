"""How close a converted model is to the dense one: cosine of hidden states, errors of layer outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import KronLinear
from .calibrate import Calibration


@torch.inference_mode()
def hidden_agreement(
    model: nn.Module, other: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, centred: bool = False
) -> float:
    """Return the mean cosine of the last hidden states of two encoders, over all tokens that are not padding.

    ``batches`` holds the keyword arguments of calls: ``input_ids (batch, length)`` and, for padded ones,
    ``attention_mask``. A model with a head is compared by its encoder. ``centred`` takes each batch's mean off the
    states first: an encoder's states share a direction, which keeps the plain cosine high whatever else they hold.
    Raises ValueError where there is no token.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        wanted, got = (
            getattr(each, "base_model", each)(**batch).last_hidden_state[real].double() for each in (model, other)
        )
        if centred:
            wanted, got = wanted - wanted.mean(0), got - got.mean(0)
        cosines = F.cosine_similarity(wanted, got, dim=-1)
        total, tokens = total + float(cosines.sum()), tokens + cosines.numel()
    if not tokens:
        raise ValueError("batches: expected at least one token, got none")
    return total / tokens


def output_errors(dense: nn.Module, model: nn.Module, moments: Calibration) -> dict[str, float]:
    """Measure the relative error of each compressed linear layer's output, ``||y - y_kron|| / ||W x||``, by its name.

    The inputs x are those behind ``moments``: a calibration of ``dense`` on text that the fit has not seen tells how
    it generalises. With D the difference of the weights, d that of the biases, C and u the second moment and the mean
    of x, the mean of ``||D x + d||^2`` is the trace of ``D C D^T`` plus ``2 d . D u + ||d||^2``.
    """
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, KronLinear):
            linear: Any = dense.get_submodule(name)
            moment, weight = moments[name].double(), linear.weight.detach().double()
            difference = weight - module.dense_weight().detach().double()
            shift = torch.zeros(len(weight)) if module.bias is None else (linear.bias - module.bias).detach()
            shift = shift.to(weight)
            squared = (difference @ moment * difference).sum()
            squared += shift @ (2 * difference @ moments.input_mean[name].double() + shift)
            errors[name] = float((squared / (weight @ moment * weight).sum()).sqrt())
    return errors
