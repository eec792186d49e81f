"""kronify_ on vision transformers: the shapes, what the factors say, and saved models that load."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig, ShapeRule
from kron_kernels.models.vit import VIT_PATTERNS, load_kronified, vit_config
from kron_kernels.nn import Int8KronLinear, KronLinear
from kron_kernels.testing.accuracy import assert_accurate

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

MODELS = {
    "vit": (ViTModel, ViTConfig),
    "vit-classifier": (ViTForImageClassification, ViTConfig),
    "deit": (DeiTModel, DeiTConfig),
    "mae": (ViTMAEModel, ViTMAEConfig),
    "msn": (ViTMSNModel, ViTMSNConfig),
}


def make_model(name: str = "vit-classifier") -> nn.Module:
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    options = {"mask_ratio": 0.0} if name == "mae" else {}
    return model_class(config_class(**SIZES, **options)).eval()


def run(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)  # ViTMAE shuffles its patches
    return model(IMAGES.to(model.dtype))[0]


def reconstructed(dense: nn.Module, kron: nn.Module) -> nn.Module:
    """The dense model with every replaced weight built from its factors."""
    dense = copy.deepcopy(dense)
    for name, module in kron.named_modules():
        if isinstance(module, KronLinear):
            dense.get_submodule(name).weight.data = module.dense_weight().detach()
    return dense


@pytest.mark.parametrize(
    ("preset", "attention", "ffn"),
    [("K8", ((384, 384), (2, 2)), ((8, 2), (384, 384))), ("K21", ((384, 48), (2, 16)), ((16, 2), (192, 384)))],
)
def test_presets_have_their_shapes_on_vit_base(preset, attention, ffn):
    with torch.device("meta"):
        model = ViTModel(ViTConfig())
    report = kronify_(model, vit_config(preset), fit=False)
    assert report.config.name == f"ViT-{preset}"
    assert len(report.layers) == 12 * 6
    found = {
        layer.name.removeprefix("layers.3."): (layer.a, layer.b) for layer in report.layers if "layers.3." in layer.name
    }
    assert found == {
        **{f"attention.{letter}_proj": attention for letter in "qkvo"},
        "mlp.fc1": ffn,
        "mlp.fc2": tuple(shape[::-1] for shape in ffn) if preset == "K8" else ((2, 16), (384, 192)),
    }
    weights = sum(layer.a[0] * layer.a[1] + layer.b[0] * layer.b[1] for layer in report.layers)
    # as the docstring says, of the encoder's weights
    assert preset != "K8" or 7.9 < 12 * 12 * 768 * 768 / weights < 8.1


@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_those_of_the_weights_built(name):
    dense = make_model(name)
    kron = copy.deepcopy(dense)
    kronify_(kron, vit_config("K8"))
    built = reconstructed(dense, kron)
    oracle = copy.deepcopy(built).double()
    outputs = [run(model) for model in (kron, built, oracle)]
    assert_accurate(*outputs, "output")
    for output in outputs:
        output.square().sum().backward()
    for key in ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"):
        grads = []
        for model in (kron, built, oracle):
            encoder = model.vit if name == "vit-classifier" else model
            grads.append(encoder.get_parameter(key).grad)
        assert_accurate(*grads, key)


def test_all_terms_reproduce_the_model_and_the_rest_stays():
    dense = make_model()
    kron = copy.deepcopy(dense)
    rules = {
        "attention": ShapeRule(b=(2, 2), terms=4),
        "ffn_in": ShapeRule(a=(4, 2), terms=8),
        "ffn_out": ShapeRule(a=(2, 4), terms=8),
    }
    kronify_(kron, KronConfig(rules, patterns=VIT_PATTERNS))
    torch.testing.assert_close(run(kron), run(dense), rtol=1e-4, atol=1e-4)
    replaced = {f"{name}.weight" for name, module in kron.named_modules() if isinstance(module, KronLinear)}
    assert len(replaced) == 12
    before, after = dense.state_dict(), kron.state_dict()
    assert set(before) - set(after) == replaced
    kept = set(before) - replaced
    assert {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"} <= kept
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.parametrize(("name", "weight_dtype"), [("vit-classifier", None), ("vit", "int8"), ("mae", None)])
def test_saved_models_load(name, weight_dtype, tmp_path):
    model = make_model(name)
    kronify_(model, vit_config("K8"), weight_dtype=weight_dtype)
    model.save_pretrained(tmp_path)
    loaded = load_kronified(type(model), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(run(loaded.eval()), run(model))
    assert any(isinstance(module, Int8KronLinear) for module in loaded.modules()) == (weight_dtype == "int8")


def test_folders_without_factors_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match=r"folder: expected a configuration with kron, as kronify_ leaves it, got .*dense"
    ):
        load_kronified(ViTForImageClassification, tmp_path / "dense")
    kronify_(model, vit_config("K8"))
    model.save_pretrained(tmp_path / "kron")
    tensors = load_file(tmp_path / "kron" / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(".a"))
    del tensors[lost]
    save_file(tensors, tmp_path / "kron" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"kron: expected Kronecker factors, 1 are missing, among them vit.layers.0.att"):
        load_kronified(ViTForImageClassification, tmp_path / "kron")


@pytest.mark.parametrize("name", ["K9", "KnGPT2"])
def test_presets_that_are_none_of_a_vit_are_named(name):
    with pytest.raises(ValueError, match=f"name: expected one of K8, K19, K21, got '{name}'"):
        vit_config(name)
