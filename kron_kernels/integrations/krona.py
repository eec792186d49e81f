"""KronA adapters: a trained Kronecker product in parallel to a frozen layer or block.

Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..convert.kronify import named_roles
from ..convert.presets import KronConfig, as_kron_config
from ..convert.rules import ShapeRule
from ..nn import Shapes
from ..nn.factored import check_product_shape, empty_factors
from ..ops import frozen_linear_kron, kron_addmm, kron_addmm_
from ..ops.frozen_linear import is_fresh, is_plain_frozen
from ..schemas.reference import kron_weight
from ..schemas.torch_internals import in_place_is_observed

FORMAT = "1"


class KronAdapter(nn.Module):
    """Base class of the forms of KronA: ``scale * sum_s A_s (x) B_s`` beside ``base``, a module that is not changed.

    ``a`` is ``(S, m1, n1)`` and ``b`` ``(S, m2, n2)``, in the dtype and on the device of ``base``. A is drawn as the
    weight of an nn.Linear, B is zero: at first the adapter changes no output.
    """

    def __init__(self, base: nn.Module, shapes: Shapes, terms: int, scale: float) -> None:
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale!r}")
        super().__init__()
        like = next((parameter for parameter in base.parameters() if parameter.is_floating_point()), torch.empty(0))
        self.base = base
        self.a, self.b = empty_factors(shapes, terms, {"dtype": like.dtype, "device": like.device})
        self.scale = float(scale)
        bound = 1 / math.sqrt(shapes[0][1])
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)
        self.train(base.training)

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters, without those of ``base``."""
        return dict(self.named_parameters(recurse=False))

    def options(self) -> dict[str, Any]:
        """Return JSON-able arguments that rebuild this adapter around the same module."""
        return {
            "shapes": [list(self.a.shape[1:]), list(self.b.shape[1:])],
            "terms": self.a.shape[0],
            "scale": self.scale,
        }

    def extra_repr(self) -> str:
        (_, m1, n1), (terms, m2, n2) = self.a.shape, self.b.shape
        return f"factors={m1}x{n1} (x) {m2}x{n2}, terms={terms}, scale={self.scale:g}"


class KronA(KronAdapter):
    """``W x + bias + scale * (sum_s A_s (x) B_s) x`` around a frozen nn.Linear (Edalati et al., 2022: KronA).

    ``x`` is ``(..., in_features)``, the result ``(..., out_features)``; ``shapes`` is ``((m1, n1), (m2, n2))`` with
    ``m1 * m2 == out_features`` and ``n1 * n2 == in_features``. No weight is built. The product is added in
    place to the layer's result unless something else can hold that result, such as a hook.
    Raises ValueError for shapes, terms or a scale that do not fit, TypeError where ``base`` is not an nn.Linear.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, shapes: Shapes, terms: int = 1, scale: float = 1.0) -> None:
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base: expected an nn.Linear, got {type(base).__name__}")
        check_product_shape(shapes, base.out_features, base.in_features)
        super().__init__(base, shapes, terms, scale)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged and is_plain_frozen(self.base):
            return frozen_linear_kron(x, self.base.weight, self.base.bias, self.a, self.b, alpha=self.scale)
        y = self.base(x)
        if self.merged:
            return y
        add = kron_addmm_ if is_fresh(self.base, y) and not in_place_is_observed() else kron_addmm
        return add(y, x, self.a, self.b, alpha=self.scale)

    def merge(self) -> None:
        """Add the product to the weight of ``base``: from then on the layer costs the same as without an adapter.

        The factors get no gradients while merged. A merged layer is left as it is.
        """
        if not self.merged:
            self._add_to_weight(self.scale)

    def unmerge(self) -> None:
        """Undo ``merge`` up to rounding: in bfloat16 and float16 the rounding of the merge stays in the weight."""
        if self.merged:
            self._add_to_weight(-self.scale)

    @torch.no_grad()
    def _add_to_weight(self, factor: float) -> None:
        wide = torch.float32 if self.a.element_size() < 4 else self.a.dtype
        self.base.weight.add_(kron_weight(self.a.to(wide), self.b.to(wide)), alpha=factor)
        self.merged = not self.merged


class KronABlock(KronAdapter):
    """``block(x) + scale * (sum_s A_s (x) B_s) x`` (Edalati et al., 2022: KronA^B), with ``residual`` also
    ``+ residual_scale * x`` (KronA^B_res).

    ``block`` is any module that takes ``x (..., in_features)`` first and gives ``(..., out_features)``, such as a
    feed-forward block; it has nonlinearities, so the product cannot be merged. ``residual_scale`` () is
    learned and starts at zero. Raises ValueError where shapes, terms or scale do not fit, and for a residual where
    ``in_features`` and ``out_features`` differ; TypeError in ``forward`` for a block that does not return a tensor.
    """

    def __init__(
        self, block: nn.Module, shapes: Shapes, terms: int = 1, scale: float = 1.0, residual: bool = False
    ) -> None:
        (m1, n1), (m2, n2) = shapes
        if residual and m1 * m2 != n1 * n2:
            raise ValueError(
                f"residual: expected False, or as many outputs as inputs, got shapes with {m1 * m2} and {n1 * n2}"
            )
        super().__init__(block, shapes, terms, scale)
        self.residual_scale = nn.Parameter(self.a.new_zeros(())) if residual else None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "residual": self.residual_scale is not None}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(f"base: expected a block that gives a Tensor, got {type(y).__name__}")
        # Not in place: the block's own backward may need its output.
        y = kron_addmm(y, x, self.a, self.b, alpha=self.scale)
        return y if self.residual_scale is None else torch.addcmul(y, x, self.residual_scale)


_FORMS: dict[str, type[KronA] | type[KronABlock]] = {"KronA": KronA, "KronABlock": KronABlock}


def add_krona_(model: nn.Module, config: KronConfig | Mapping[str, Any] | str, *, scale: float = 1.0) -> list[str]:
    """Put KronA beside the linear layers that ``config`` names, freeze everything else, and return the layers' names.

    Roles, patterns, shapes, terms and ``skip`` are those of ``kronify_``: ``KronConfig({"attention":
    ShapeRule(b=(32, 24))})`` adapts the attention of BERT-like models; ``patterns`` are for other models. Parameters of
    a new head are frozen too: ``model.classifier.requires_grad_()`` afterwards trains it along.

    Raises ValueError for a role without modules, another class than nn.Linear, a shape that does not divide it, and
    a model that has adapters; the model is left as it was. Load a dense checkpoint first: names of tensors change.
    """
    config = as_kron_config(config)
    _check_bare(model)
    adapters: dict[str, KronA] = {}
    for name, role, module in named_roles(model, config):
        if not isinstance(module, nn.Linear):
            raise ValueError(f"model: expected {name} ({role}) to be nn.Linear, got {type(module).__name__}")
        rule = config.rule_of(name, role)
        if not isinstance(rule, ShapeRule):
            raise ValueError(f"{name} ({role}): expected the shape of a factor, a or b, got {rule}")
        try:
            shapes = rule.resolve(module.out_features, module.in_features)
        except ValueError as error:
            raise ValueError(f"{name} ({role}): {error}") from None
        adapters[name] = KronA(module, shapes, rule.terms, scale)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    freeze_but_krona_(model)
    return list(adapters)


def freeze_but_krona_(model: nn.Module) -> None:
    """Let only the tensors of KronA adapters have gradients, for adapters that were put in place by hand."""
    model.requires_grad_(False)
    for _, adapter in _adapters(model):
        for parameter in adapter.own_tensors().values():
            parameter.requires_grad_()


def remove_krona_(model: nn.Module, *, merge: bool = True) -> None:
    """Replace the adapters by their layers, with the products merged into them (``merge``) or dropped.

    Frozen parameters stay frozen. Raises ValueError for ``merge`` with a KronABlock, which cannot be merged, and
    changes nothing then.
    """
    adapters = list(_adapters(model))
    for name, adapter in adapters:
        if merge and not isinstance(adapter, KronA):
            raise ValueError(f"merge: expected False, got True for {name}: {type(adapter).__name__} cannot be merged")
    # From the inside out: an adapter may lie in the block of another.
    for name, adapter in reversed(adapters):
        if isinstance(adapter, KronA):
            adapter.merge() if merge else adapter.unmerge()
        model.set_submodule(name, adapter.base)


def save_krona(model: nn.Module, path: str | Path) -> None:
    """Write only the adapters' tensors and their options to a safetensors file.

    Raises ValueError for a model without adapters.
    """
    adapters = dict(_adapters(model))
    if not adapters:
        raise ValueError("model: expected KronA adapters, got none")
    tensors = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, adapter in adapters.items()
        for key, tensor in adapter.own_tensors().items()
    }
    layers = {name: {"form": type(adapter).__name__, **adapter.options()} for name, adapter in adapters.items()}
    save_file(tensors, path, metadata={"krona": FORMAT, "layers": json.dumps(layers)})


def load_krona_(model: nn.Module, path: str | Path) -> list[str]:
    """Put the adapters of a file of ``save_krona`` into ``model``, a dense one; freeze the rest, return the names.

    Raises ValueError for a file that ``save_krona`` did not write, for a model that has adapters, and where a layer is
    missing or of another size; the model is left as it was.
    """
    _check_bare(model)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("krona") != FORMAT:
            got = f"{metadata.get('krona')!r} in {path}"
            raise ValueError(f"path: expected a file of save_krona, format {FORMAT!r}, got {got}")
        layers = json.loads(metadata["layers"])
        try:
            for name, options in layers.items():
                _load_adapter_(model, name, options, file)
        except ValueError:
            remove_krona_(model, merge=False)
            raise
    freeze_but_krona_(model)
    return list(layers)


@torch.no_grad()
def _load_adapter_(model: nn.Module, name: str, options: dict[str, Any], file: Any) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model: expected a module {name}, got none") from None
    try:
        form = _FORMS[options.pop("form")]
        adapter = form(module, **options)  # type: ignore[arg-type]  # KronA raises for other modules
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    for key, tensor in adapter.own_tensors().items():
        tensor.copy_(file.get_tensor(f"{name}.{key}"))
    model.set_submodule(name, adapter)


def _adapters(model: nn.Module) -> Iterator[tuple[str, KronAdapter]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, KronAdapter))


def _check_bare(model: nn.Module) -> None:
    for name, _ in _adapters(model):
        raise ValueError(f"model: expected one without KronA adapters, got one at {name}; remove_krona_ takes them out")
