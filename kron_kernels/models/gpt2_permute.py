"""Orders of GPT-2's channels: applied without changing what the model computes, and searched for better factors.

TQCompressor (Abronin et al., 2024) permutes the rows and columns of each weight before factoring it, and gathers
activations in each layer to undo that. Orders that the neighbouring weights can take over need no gather:

    residual     the channels of the residual stream, one order for the whole model: embeddings, LayerNorms, and the
                 inputs and outputs of every layer take it over, the head too
    h.N.hidden   the hidden units of a feed-forward: c_fc's outputs, c_proj's inputs
    h.N.value    the value channels of each head: the last third of c_attn's outputs, attn.c_proj's inputs
    h.N.query    the query and key channels of each head, together: their inner products do not see the order
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, GPT2Model

from ..convert.conv1d import as_linear
from ..convert.kronify import Target, plan_layers
from ..convert.presets import KronConfig, as_kron_config
from ..factorize.permutations import OrderedWeight, PermutationSearch, Place, search_permutations

# A parameter, the dimension that an order runs along, and where on it the order begins.
_Use = tuple[Tensor, int, int]


def permute_gpt2_(model: GPT2LMHeadModel | GPT2Model, permutations: Mapping[str, Tensor]) -> None:
    """Put the channels of a dense GPT-2 in another order, in place; what it computes stays the same.

    Logits, losses and generated text are those of before but for rounding; hidden states come in the new order where
    ``permutations`` has "residual".

    Args:
        permutations: order names (see above) to index tensors: the channel at i is the one that was at
            ``permutations[name][i]``. "residual" (n_embd,), "h.N.hidden" (n_inner,), "h.N.value" and "h.N.query"
            (n_embd,), whose channels must stay in their head.

    Raises:
        TypeError: another class of model. ValueError: an unknown name, a tensor that is no permutation of its size or
            moves a channel to another head, a model with cross-attention or converted layers.
    """
    orders = _orders(model)
    width = {name: size for name, (size, _, _) in orders.items()}
    checked = {name: _checked(name, order, orders) for name, order in permutations.items()}
    with torch.no_grad():
        for name, order in checked.items():
            for parameter, dim, start in orders[name][2]:
                part = parameter.narrow(dim, start, width[name])
                part.copy_(part.index_select(dim, order.to(parameter.device)))


def search_gpt2_permutations(
    model: GPT2LMHeadModel | GPT2Model,
    config: KronConfig | Mapping[str, Any] | str,
    *,
    rounds: int = 10,
    seed: int = 0,
) -> PermutationSearch:
    """Orders for ``permute_gpt2_`` under which the layers that ``config`` names factor with less error.

    The model stays as it is. The errors are those of these layers, in the order of the model, without calibration;
    ``rounds`` and ``seed`` are those of ``factorize.permutations.search_permutations``, which says what is searched.

    Raises ValueError as that function, ``kronify_`` and ``permute_gpt2_``: tiny factors must be on the right.
    """
    orders = _orders(model)
    places: dict[int, tuple[list[Place], list[Place]]] = {}
    for name, (_, _, uses) in orders.items():
        for parameter, dim, start in uses:
            places.setdefault(id(parameter), ([], []))[dim].append((name, start))
    weights = [_ordered(target, places) for target in plan_layers(model, as_kron_config(config), None, True)]
    used = {name for weight in weights for name, _ in (*weight.rows, *weight.columns)}
    return search_permutations(
        weights,
        {name: size for name, (size, _, _) in orders.items() if name in used},
        blocks={name: block for name, (_, block, _) in orders.items() if name in used},
        rounds=rounds,
        seed=seed,
    )


def _ordered(target: Target, places: Mapping[int, tuple[list[Place], list[Place]]]) -> OrderedWeight:
    module = target.module
    first, second = places[id(module.weight)]
    if isinstance(module, nn.Embedding):
        weight, rows, columns = module.weight, first, second
    else:  # a Conv1D, whose weight is (in, out)
        weight, rows, columns = as_linear(module).weight, second, first
    return OrderedWeight(weight, target.shapes[0], target.terms, tuple(rows), tuple(columns))


def _orders(model: GPT2LMHeadModel | GPT2Model) -> dict[str, tuple[int, int, list[_Use]]]:
    """Each order's size, the run that its channels must stay in, and all that it covers."""
    if not isinstance(model, (GPT2LMHeadModel, GPT2Model)):
        raise TypeError(f"model: expected GPT2LMHeadModel or GPT2Model, got {type(model).__name__}")
    base: Any = model if isinstance(model, GPT2Model) else model.transformer
    if model.config.add_cross_attention:
        raise ValueError("model: expected a GPT-2 without cross-attention, got one with it")
    if not isinstance(base.wte, nn.Embedding) or any(not hasattr(layer, "nx") for layer in _layers(base)):
        raise ValueError("model: expected a dense GPT-2, got one with converted layers")
    width = model.config.n_embd
    residual: list[_Use] = [(base.wte.weight, 1, 0), (base.wpe.weight, 1, 0)]
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not base.wte.weight:
        residual.append((head.weight, 1, 0))
    orders: dict[str, tuple[int, int, list[_Use]]] = {"residual": (width, width, residual)}
    for norm in [base.ln_f, *(norm for block in base.h for norm in (block.ln_1, block.ln_2))]:
        residual += [(norm.weight, 0, 0), (norm.bias, 0, 0)]
    for index, block in enumerate(base.h):
        attention, mlp = block.attn, block.mlp
        for layer in (attention.c_attn, mlp.c_fc):
            residual.append((layer.weight, 0, 0))
        for layer in (attention.c_proj, mlp.c_proj):
            residual += [(layer.weight, 1, 0), (layer.bias, 0, 0)]
        hidden: list[_Use] = [(mlp.c_fc.weight, 1, 0), (mlp.c_fc.bias, 0, 0), (mlp.c_proj.weight, 0, 0)]
        orders[f"h.{index}.hidden"] = (mlp.c_fc.nf, mlp.c_fc.nf, hidden)
        # c_attn's outputs are queries, keys and values, each ``width`` wide.
        q, k, v = ([(attention.c_attn.weight, 1, i * width), (attention.c_attn.bias, 0, i * width)] for i in range(3))
        orders[f"h.{index}.value"] = (width, attention.head_dim, [*v, (attention.c_proj.weight, 0, 0)])
        orders[f"h.{index}.query"] = (width, attention.head_dim, [*q, *k])
    return orders


def _layers(base: Any) -> Iterator[Any]:
    for block in base.h:
        yield from (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)


def _checked(name: str, order: Tensor, orders: Mapping[str, tuple[int, int, list[_Use]]]) -> Tensor:
    if name not in orders:
        raise ValueError(f"permutations: expected names among residual, h.N.hidden, .value and .query, got {name!r}")
    size, block, _ = orders[name]
    order = torch.as_tensor(order).cpu().long()
    if order.shape != (size,) or not torch.equal(order.sort().values, torch.arange(size)):
        raise ValueError(f"permutations: expected {name} to permute {size} channels, got shape {tuple(order.shape)}")
    if not torch.equal(order // block, torch.arange(size) // block):
        raise ValueError(f"permutations: expected {name} to keep channels in their heads of {block}, got others")
    return order
