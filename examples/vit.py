"""A small random ViT with Kronecker-factored layers: converted in place, checked, saved and loaded."""

from __future__ import annotations

import copy
import tempfile

import torch
from transformers import ViTConfig, ViTForImageClassification

from kron_kernels.convert.kronify import kronify_
from kron_kernels.models.vit import load_kronified, vit_config
from kron_kernels.nn import KronLinear


@torch.no_grad()
def main(hidden: int = 192, layers: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    dense = ViTForImageClassification(config).eval()
    model = copy.deepcopy(dense)
    report = kronify_(model, vit_config("K8"))
    print(f"{report.params_before:,} -> {report.params_after:,} parameters, {report.compression:.1f}x fewer")

    # The materialised way: the same weights, built.
    for name, module in model.named_modules():
        if isinstance(module, KronLinear):
            dense.get_submodule(name).weight.data = module.dense_weight().detach()
    images = torch.randn(4, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        logits = model(images).logits
        error = float((logits - dense(images).logits).abs().max() / logits.abs().max())
        model.save_pretrained(folder)
        loaded = load_kronified(ViTForImageClassification, folder).eval()
        reloaded = float((loaded(images).logits - logits).abs().max())
    print(f"relative error against the weights built: {error:.1e}; loaded model differs by {reloaded}")
    return {"compression": report.compression, "error": error, "reloaded": reloaded}


if __name__ == "__main__":
    main()
