"""``optimize_for_inference``: the same results, nothing to write to, and a clear error for what its form cannot do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from kron_kernels import optimize_for_inference
from kron_kernels.convert.quantize import quantize_
from kron_kernels.models import KronBertForMaskedLM, KronBertForSequenceClassification, KronBertModel
from kron_kernels.nn import AdaptiveEmbedding, KronEmbedding, PackedKronLinear, is_quantized
from tests.models.bert_cases import IDS, make, run


@pytest.mark.parametrize(
    ("kron", "kind"),
    [
        ("K8", KronBertModel),
        ("K21", KronBertForMaskedLM),
        ("K21", KronBertForSequenceClassification),
        ("low-rank", KronBertModel),
        ("low-rank", KronBertForMaskedLM),
    ],
)
def test_results_are_those_of_the_training_form(kron: str, kind: Any) -> None:
    model = make(kron, kind)
    wanted = run(model)
    assert optimize_for_inference(model) is model
    torch.testing.assert_close(run(model), wanted, rtol=1e-5, atol=1e-5)
    assert list(model.parameters()) == []
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert optimize_for_inference(model) is model


def test_dtypes_are_converted_first() -> None:
    model = make("K8", KronBertForMaskedLM)
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        other = copy.deepcopy(model)
        wanted = run(copy.deepcopy(model).to(expected))
        torch.testing.assert_close(run(optimize_for_inference(other, dtype)), wanted, rtol=0.1, atol=0.1)
        assert other.dtype is expected


@pytest.mark.parametrize(("kron", "weight_dtype"), [("K8", "int8"), ("K8", "int4"), ("low-rank", "int4")])
def test_stored_integers_are_converted_first(kron: str, weight_dtype: str) -> None:
    model = make(kron, KronBertForMaskedLM)
    quantize_(model, weight_dtype=weight_dtype)
    wanted = run(model)
    torch.testing.assert_close(run(optimize_for_inference(model)), wanted, rtol=1e-4, atol=1e-4)
    words: Any = model.get_input_embeddings()
    assert type(words) is (KronEmbedding if kron == "K8" else AdaptiveEmbedding)
    assert model.get_output_embeddings().embedding is words
    assert not is_quantized(model)


@pytest.mark.parametrize("kron", ["K8", "low-rank"])
def test_copies_and_pickles(kron: str) -> None:
    model = optimize_for_inference(make(kron, KronBertForMaskedLM))
    wanted = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        torch.testing.assert_close(run(other), wanted, rtol=0, atol=0)
        assert kron != "low-rank" or other.get_output_embeddings().embedding is other.get_input_embeddings()
        with pytest.raises(RuntimeError, match="training form"):
            other.train()


REFUSED: dict[str, Any] = {
    "half": lambda model: model.half(),
    "meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "part": lambda model: model.encoder.layer[0].attention.self.query.double(),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}),
    "train": lambda model: model.train(),
    "requires_grad_": lambda model: model.requires_grad_(),
    "resize": lambda model: model.resize_token_embeddings(60),
    "another dtype": lambda model: optimize_for_inference(model, "bf16"),
    "gradients": lambda model: model(inputs_embeds=torch.randn(2, 5, 48, requires_grad=True)),
}


@pytest.mark.parametrize("use", REFUSED)
def test_what_the_inference_form_cannot_do_is_an_error(use: str) -> None:
    model = optimize_for_inference(make())
    wanted = run(model)
    with pytest.raises(RuntimeError, match="expected a model in training form, got one that optimize_for_inference"):
        REFUSED[use](model)
    torch.testing.assert_close(run(model), wanted, rtol=0, atol=0)


def test_saving_leaves_no_file_and_moves_to_the_same_place_are_allowed(tmp_path: Any) -> None:
    model = optimize_for_inference(make())
    with pytest.raises(RuntimeError, match=r"save_pretrained\(\): expected a model in training form"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast: expected it off"):
        model(IDS)
    assert model.to("cpu").float().eval().requires_grad_(False) is model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.register_forward_hook(print), "layers without hooks, got encoder.layer.0.output.dense"),
        (lambda layer: register_parametrization(layer, "a", nn.Identity()), "plain factors, got a parametrization of"),
        (lambda layer: layer.to("meta"), r"whole weights in memory, got encoder\.layer\.0\.\S+ as the meta device"),
    ],
)
def test_models_that_cannot_be_frozen_stay_as_they_are(change: Any, message: str) -> None:
    model = make()
    change(model.encoder.layer[0].output.dense)
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(model)
    assert not any(isinstance(module, PackedKronLinear) for module in model.modules())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dtype: expected None or one of 'fp32', 'bf16', 'fp16', got 'int8'"):
        optimize_for_inference(make(), "int8")
    with pytest.raises(ValueError, match="model: expected factored layers, as of kronify_, got a Linear without any"):
        optimize_for_inference(nn.Linear(2, 2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast: expected it off"):
        optimize_for_inference(make())
