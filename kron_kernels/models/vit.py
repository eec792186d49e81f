"""Vision transformers of transformers with Kronecker-factored attention and feed-forward layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..convert.kronify import kronify_
from ..convert.presets import KronConfig, preset
from .checkpoint import factor_names

# ViT and models of the same layers: DeiT, ViTMAE, ViTMSN. The patch embedding, a convolution, and the head match none.
VIT_PATTERNS: dict[str, tuple[str, ...]] = {
    "attention": (r"(^|\.)layers\.\d+\.attention\.[qkvo]_proj$",),
    "ffn_in": (r"(^|\.)layers\.\d+\.mlp\.fc1$",),
    "ffn_out": (r"(^|\.)layers\.\d+\.mlp\.fc2$",),
}
# Not those of GPT-2, which leave half of its blocks out by names that a ViT does not have.
VIT_PRESETS = ("K8", "K19", "K21")


def vit_config(name: str = "K8") -> KronConfig:
    """What ``kronify_`` makes of a ViT: the attention and feed-forward shapes of the preset ``name``, as "ViT-K8" etc.

    On ViT-base (768 wide, 3072 in between) K8's are 384x384 (x) 2x2 and 8x2 (x) 384x384, 8.0 times fewer parameters in
    the encoder's weights. Patch embedding, class token, positions, norms and head stay dense.

    Raises ValueError for a preset that is none of ``VIT_PRESETS``.
    """
    if name not in VIT_PRESETS:
        raise ValueError(f"name: expected one of {', '.join(VIT_PRESETS)}, got {name!r}")
    rules = {role: rule for role, rule in preset(name).rules.items() if role in VIT_PATTERNS}
    return KronConfig(rules, name=f"ViT-{name}", patterns=VIT_PATTERNS)


def load_kronified(model_class: type[PreTrainedModel], folder: str | Path, **options: Any) -> Any:
    """The model that ``kronify_`` changed in place and ``save_pretrained`` wrote to ``folder``.

    ``model_class`` is the class it had, ``options`` go to its ``from_pretrained``. transformers saves a ViT under the
    names of older releases, so that a plain ``load_state_dict`` of the file does not do. Raises ValueError where the
    folder's configuration has no ``kron``, and OSError where factors are missing from its tensors.
    """

    class Kronified(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if getattr(config, "kron", None) is None:
                raise ValueError(f"folder: expected a configuration with kron, as kronify_ leaves it, got {folder}")
            kronify_(self, config.kron, fit=False)

    # transformers finds its renamings by the class's name, and makes none for classes of other packages.
    Kronified.__name__, Kronified.__module__ = model_class.__name__, model_class.__module__
    model, info = Kronified.from_pretrained(folder, output_loading_info=True, **options)
    model.__class__ = model_class
    if missing := sorted(factor_names(model).intersection(info["missing_keys"])):
        raise OSError(f"{folder}: expected Kronecker factors, {len(missing)} are missing, among them {missing[0]}")
    return model
