"""Small random models and checks that several examples share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification


def small_vit(hidden: int = 192, layers: int = 2) -> ViTForImageClassification:
    """A random ViT of 4 heads on images of 32 x 32, in patches of 8 x 8."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)).eval()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest deviation, over the largest magnitude of ``wanted``."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
