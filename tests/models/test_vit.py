"""kronify_ on vision transformers: the shapes, what the factors say, and saved models that load."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeiTModel, ViTConfig, ViTForImageClassification, ViTMAEModel, ViTModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.models.vit import load_kronified, vit_config
from kron_kernels.nn import KronLinear, QuantizedKronLinear
from kron_kernels.testing.accuracy import assert_accurate

SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make_model(kind: type = ViTForImageClassification) -> nn.Module:
    torch.manual_seed(0)
    options = {"mask_ratio": 0.0} if kind is ViTMAEModel else {}
    return kind(kind.config_class(**SIZES, image_size=16, patch_size=8, initializer_range=0.2, **options)).eval()


def run(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # ViTMAE shuffles its patches
    return model(IMAGES.to(model.dtype))[0]


def test_presets_have_their_shapes_on_vit_base():
    with torch.device("meta"):
        model = ViTModel(ViTConfig())
    report = kronify_(model, vit_config("K21"), fit=False)
    assert len(report.layers) == 12 * 6
    found = {layer.name.removeprefix("layers.3."): layer.structure for layer in report.layers}
    assert found["attention.k_proj"] == "384x48 (x) 2x16"
    assert (found["mlp.fc1"], found["mlp.fc2"]) == ("16x2 (x) 192x384", "2x16 (x) 384x192")
    with pytest.raises(ValueError, match="name: expected one of K8, K19, K21, got 'KnGPT2'"):
        vit_config("KnGPT2")


@pytest.mark.parametrize("kind", [ViTForImageClassification, DeiTModel, ViTMAEModel])
def test_output_and_gradients_are_those_of_the_weights_built(kind):
    kron, built = make_model(kind), make_model(kind)
    kronify_(kron, vit_config("K8"))
    for path, module in kron.named_modules():
        if isinstance(module, KronLinear):
            built.get_submodule(path).weight.data = module.dense_weight().detach()
    models = kron, built, copy.deepcopy(built).double()
    outputs = [run(model) for model in models]
    assert_accurate(*outputs, "output")
    for output in outputs:
        output.square().sum().backward()
    for key in ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"):
        assert_accurate(*(getattr(model, "vit", model).get_parameter(key).grad for model in models), key)


@pytest.mark.parametrize(("kind", "weight_dtype"), [(ViTForImageClassification, None), (DeiTModel, "int4")])
def test_saved_models_load(kind, weight_dtype, tmp_path):
    model = make_model(kind)
    kronify_(model, vit_config("K8"), weight_dtype=weight_dtype)
    model.save_pretrained(tmp_path)
    loaded = load_kronified(kind, tmp_path)
    assert type(loaded) is kind
    assert torch.equal(run(loaded.eval()), run(model))
    assert any(isinstance(module, QuantizedKronLinear) for module in loaded.modules()) == (weight_dtype is not None)


def test_folders_without_factors_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder: expected a configuration with kron, as kronify_ leaves it, got "):
        load_kronified(ViTForImageClassification, tmp_path)
    kronify_(model, vit_config("K8"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".a"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"expected Kronecker factors, 1 are missing, among them vit.layers.0.att"):
        load_kronified(ViTForImageClassification, tmp_path)
