"""Replace a model's linear layers and word embedding by factored ones, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..nn import KronDecoder, TiedDecoder
from ..nn.quantized import to_quantized_
from .calibrate import Calibration, Progress
from .conv1d import is_conv1d
from .counting import count_parameters
from .layers import EMBEDDINGS, FACTORED, Target, fitted_layer, fresh_layer
from .presets import KronConfig, as_kron_config
from .ties import tie_decoders_, tied_decoders


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer. Errors are relative, None where nothing was fitted; see ``nearest_kronecker``.

    ``structure`` is "48x384 (x) 2x16", "2 of 24x24 (x) 16x16", "rank 28" or "bands 2000x192, 28522x24".
    """

    name: str
    role: str
    structure: str
    params_before: int
    params_after: int
    relative_error: float | None
    weighted_error: float | None


@dataclass(frozen=True)
class ConversionReport:
    """The replaced layers and the parameters of the whole model before and after, dense parts included."""

    config: KronConfig
    layers: tuple[LayerReport, ...]
    params_before: int
    params_after: int

    @property
    def compression(self) -> float:
        return self.params_before / self.params_after

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "config": self.config.to_dict(),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "compression": self.compression,
            "layers": [asdict(layer) for layer in self.layers],
        }


def kronify_(
    model: nn.Module,
    config: KronConfig | Mapping[str, Any] | str,
    *,
    calibration: Calibration | None = None,
    fit: bool = True,
    weight_dtype: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Replace the layers that ``config`` names by their nearest Kronecker products, in place.

    Works on models whose module names match the config's patterns: BERT-like encoders with any head, MPNet, and GPT-2,
    whose Conv1D layers (weights of (in, out)) become what an nn.Linear of the transposed weight does. Poolers, heads,
    LayerNorms, position and type embeddings stay as they are. An output layer tied to the word embedding becomes one
    on the embedding's factors and stays tied. The conversion is recorded in the ``kron`` field of a transformers
    configuration. The files of a model converted in place load into one given the same structure with ``fit=False``;
    those of ``KronBertModel.from_dense`` and the like load by themselves.

    Args:
        model: changed only once every layer has been fitted; after an error it is as it was.
        config: a KronConfig, its dict, or a preset's name.
        calibration: the second moments and means of the layers' inputs (see ``calibrate``). The fit then minimises
            the error of each layer's output, its mean error taken up by the bias (see ``fit_linear``).
        fit: False leaves the new factors freshly drawn: the structure only, for a state dict to be loaded into.
        weight_dtype: "int8" or "int4" stores large factors so, as ``quantize_`` does after the conversion; None leaves
            that to the config. The errors reported are those of the fit.
        progress: called as ``progress(done, total, name)`` after each layer.

    Raises:
        ValueError: a role without modules, a module of a role that is not nn.Linear, Conv1D or nn.Embedding or
            shares its weight, a shape that does not divide, a layer without calibration, a model converted before.
    """
    config = as_kron_config(config)
    if weight_dtype is not None:
        config = replace(config, weight_dtype=weight_dtype)
    targets = plan_layers(model, config, calibration if fit else None, fit)
    params_before = count_parameters(model)
    replacements: list[nn.Module] = []
    layers = []
    for done, target in enumerate(targets, 1):
        module, relative_error, weighted_error = (
            fitted_layer(target, calibration) if fit else (fresh_layer(target), None, None)
        )
        if config.weight_dtype is not None:
            to_quantized_(module, config.weight_dtype)
        replacements.append(module)
        layers.append(
            LayerReport(
                target.name,
                target.role,
                target.structure(),
                count_parameters(target.module),
                count_parameters(module),
                relative_error,
                weighted_error,
            )
        )
        if progress is not None:
            progress(done, len(targets), target.name)
    for target, replacement in zip(targets, replacements, strict=True):
        decoders = tied_decoders(model, target.module)
        model.set_submodule(target.name, replacement)
        if isinstance(replacement, EMBEDDINGS):
            tie_decoders_(model, decoders, replacement)
    model_config: Any = getattr(model, "config", None)
    if isinstance(model_config, PreTrainedConfig):
        model_config.kron = config.to_dict()
    return ConversionReport(config, tuple(layers), params_before, count_parameters(model))


def kronified_copy(
    dense: nn.Module, config: KronConfig | Mapping[str, Any] | str, **options: Any
) -> tuple[nn.Module, ConversionReport]:
    """Return a converted copy of a model, and its report; ``options`` are those of ``kronify_``, and so are the errors.

    The copy shares every parameter that is not converted; the original stays as it is.
    """
    shadow = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    return shadow, kronify_(shadow, config, **options)


def plan_layers(model: nn.Module, config: KronConfig, calibration: Calibration | None, fit: bool) -> list[Target]:
    """List every layer to replace, in the order of the model, after all checks that need no fit."""
    if any(isinstance(module, (*FACTORED, KronDecoder, TiedDecoder)) for module in model.modules()):
        raise ValueError("model: expected a dense model, got one that has factored layers already")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets = []
    for name, role, module in named_roles(model, config):
        target = _target(name, role, module, config)
        shared = len(owners[id(target.module.weight)]) - 1 - len(tied_decoders(model, module))
        if shared:
            raise ValueError(f"model: {name} shares its weight: {', '.join(owners[id(target.module.weight)])}")
        if fit:
            _check_fit(target, calibration)
        targets.append(target)
    return targets


def named_roles(model: nn.Module, config: KronConfig) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield name, role and module of all that ``config`` names and does not skip.

    Raises ValueError, at the end, for a role and for a name in ``layers`` without any.
    """
    roles, unused = set(), set(config.layers)
    for name, module in model.named_modules():
        role = config.role_of(name)
        if role is None or role not in config.rules:
            continue
        roles.add(role)
        if not config.skips(name):
            unused.discard(config.own_name(name) or "")
            yield name, role, module
    for role in config.rules:
        if role not in roles:
            patterns = ", ".join(config.patterns[role])
            raise ValueError(f"model: no module plays the role {role!r}; its patterns: {patterns}")
    if unused:
        raise ValueError(f"layers: expected names of modules to replace, got {', '.join(sorted(unused))}")


def init_factored_(module: nn.Module, std: float) -> bool:
    """Draw a factored layer as transformers draws weights, biases zero; False for other modules."""
    if not isinstance(module, FACTORED):
        return False
    module.reset_parameters(std)
    if (bias := getattr(module, "bias", None)) is not None:
        nn.init.zeros_(bias)
    return True


def _target(name: str, role: str, module: nn.Module, config: KronConfig) -> Target:
    if not isinstance(module, (nn.Linear, nn.Embedding)) and not is_conv1d(module):
        got = type(module).__name__
        raise ValueError(f"model: expected {name} ({role}) to be nn.Linear, Conv1D or nn.Embedding, got {got}")
    if not module.weight.is_floating_point():
        raise ValueError(f"model: expected {name} ({role}) to have a floating-point weight, got {module.weight.dtype}")
    target = Target(name, role, module, config.rule_of(name, role))
    try:
        target.check()
    except ValueError as error:
        raise ValueError(f"{name} ({role}): {error}") from None
    return target


def _check_fit(target: Target, calibration: Calibration | None) -> None:
    if not torch.isfinite(target.module.weight).all():
        raise ValueError(f"model: expected finite weights, got NaN or inf in {target.name}")
    if calibration is None or isinstance(target.module, nn.Embedding):
        return
    if target.name not in calibration:
        raise ValueError(f"calibration: expected a moment for {target.name}, got none")
