"""A small random ViT with Kronecker-factored layers: converted in place, checked, saved and loaded."""

from __future__ import annotations

import copy
import tempfile

import torch
from toy import relative_error, small_vit
from transformers import ViTForImageClassification

from kron_kernels.convert.kronify import kronify_
from kron_kernels.models.vit import load_kronified, vit_config
from kron_kernels.nn import KronLinear


@torch.no_grad()
def main(hidden: int = 192, layers: int = 4) -> dict[str, float]:
    dense = small_vit(hidden, layers)
    model = copy.deepcopy(dense)
    report = kronify_(model, vit_config("K8"))
    print(f"{report.params_before:,} -> {report.params_after:,} parameters, {report.compression:.1f}x fewer")

    # The baseline: a dense model of the same weights.
    for name, module in model.named_modules():
        if isinstance(module, KronLinear):
            dense.get_submodule(name).weight.data = module.dense_weight().detach()
    images = torch.randn(4, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        logits = model(images).logits
        error = relative_error(logits, dense(images).logits)
        model.save_pretrained(folder)
        loaded = load_kronified(ViTForImageClassification, folder).eval()
        reloaded = float((loaded(images).logits - logits).abs().max())
    print(f"relative error against the built weights: {error:.1e}; loaded model differs by {reloaded}")
    return {"compression": report.compression, "error": error, "reloaded": reloaded}


if __name__ == "__main__":
    main()
