"""Parameters of a model, and the floating-point operations of its encoder's linear layers."""

from __future__ import annotations

from torch import nn

from ..factorize import factor_shape
from ..nn import KronLinear, LowRankLinear
from ..nn.quantized import Quantized
from .presets import KronConfig, preset

_LINEAR_ROLES = ("attention", "ffn_in", "ffn_out")


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of ``model``, shared ones once; works on the meta device.

    The values of factors stored as integers count, though torch knows them as buffers; their scales do not.
    """
    stored = sum(module.numel() for module in model.modules() if isinstance(module, Quantized))
    return stored + sum(parameter.numel() for parameter in model.parameters())


def layer_flops(layer: nn.Linear | KronLinear | LowRankLinear) -> int:
    """Count the multiplications and additions a token of a layer's product, without the bias.

    An inner product of length n is n multiplications and n - 1 additions. A Kronecker layer counts the cheaper
    contraction order; its S terms are summed within the second product.
    """
    if isinstance(layer, KronLinear):
        return factor_shape(layer.out_features, layer.in_features, layer.shapes[0], layer.terms).flops
    if isinstance(layer, LowRankLinear):
        return 2 * (layer.u.numel() + layer.v.numel()) - layer.rank - layer.out_features
    return 2 * layer.weight.numel() - layer.out_features


def linear_flops(model: nn.Module, tokens: int, config: KronConfig | None = None) -> int:
    """Count the operations of an encoder's attention and feed-forward linear layers on ``tokens`` tokens.

    ``config`` tells the layers' roles by its patterns (default: those of BERT-like encoders); embeddings, attention
    scores, pooler and heads do not count. Raises ValueError where no module plays such a role.
    """
    config = config or preset("K8")
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, KronLinear, LowRankLinear)) and config.role_of(name) in _LINEAR_ROLES
    ]
    if not layers:
        raise ValueError("model: expected linear layers that match the config's patterns, got none")
    return tokens * sum(map(layer_flops, layers))
