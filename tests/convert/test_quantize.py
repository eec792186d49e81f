"""int8 factors: what is stored, what it costs in accuracy, files, ties, and the errors."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from kron_kernels.convert.counting import count_parameters
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig, preset
from kron_kernels.convert.quantize import hidden_agreement, quantize_, weight_bytes
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel
from kron_kernels.nn import (
    Int8Factored,
    Int8KronDecoder,
    Int8KronEmbedding,
    Int8KronLinear,
    KronDecoder,
    KronEmbedding,
    KronLinear,
)
from kron_kernels.nn.int8 import quantize_rows, to_int8_

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
IDS = torch.tensor([[5, 9, 2, 30, 7], [8, 3, 40, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def make_model(kind: type[Any] = KronBertModel, kron: str = "K8") -> Any:
    return kind(KronBertConfig(kron=kron, initializer_range=0.2, **SIZES)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]


@DTYPES
def test_rows_are_rounded_to_the_nearest_step(dtype: torch.dtype) -> None:
    factor = torch.randn(2, 7, 33).mul(torch.rand(2, 7, 1)).to(dtype)
    factor[1, 3] = 0
    values, scale = quantize_rows(factor)
    assert (values.dtype, values.shape) == (torch.int8, factor.shape)
    assert (scale.dtype, scale.shape) == (dtype, (2, 7))
    assert scale[1, 3] == 0
    assert not values[1, 3].any()
    steps = scale.double().unsqueeze(-1)
    error = (factor.double() - values * steps).abs()
    # Half a step; the largest value may be clipped by as much as the scale was rounded.
    assert (error <= (0.5 + 127 * torch.finfo(dtype).eps) * steps).all()
    peaks = values.abs().amax(-1)
    assert ((peaks == 127) | (scale == 0)).all()


def test_scales_belong_to_rows() -> None:
    factor = torch.tensor([[[1.0, -2.0], [0.001, 0.0005]]])
    values, scale = quantize_rows(factor)
    assert values.tolist() == [[[64, -127], [127, 64]]]
    torch.testing.assert_close(scale, torch.tensor([[2 / 127, 0.001 / 127]]))


@pytest.mark.parametrize(
    ("shapes", "stored"),
    [
        (((24, 24), (2, 2)), ("a_int8", "a_scale", "b")),
        (((8, 2), (24, 24)), ("a", "b_int8", "b_scale")),
        (((8, 8), (6, 6)), ("a_int8", "a_scale", "b_int8", "b_scale")),
    ],
)
def test_large_factors_are_int8_and_the_layer_computes_their_product(shapes: Any, stored: tuple[str, ...]) -> None:
    (m1, n1), (m2, n2) = shapes
    layer = KronLinear(n1 * n2, m1 * m2, shapes, terms=2, activation="gelu")
    wanted = copy.deepcopy(layer)
    to_int8_(layer)
    assert type(layer) is Int8KronLinear
    assert layer.factor_names() == stored
    assert set(layer.state_dict()) == {*stored, "bias"}
    assert (layer.shapes, layer.terms, layer.dtype) == (shapes, 2, torch.float32)
    assert copy.deepcopy(layer).to(torch.bfloat16).dtype is torch.bfloat16
    assert "int8=" + "+".join(name for name in "ab" if f"{name}_int8" in stored) in repr(layer)
    wanted.load_factors(layer.a, layer.b)
    x = torch.randn(3, 5, n1 * n2)
    torch.testing.assert_close(layer(x), wanted(x), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted(x), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_frozen_factors() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)))
    to_int8_(layer)
    x = torch.randn(4, 48)
    with torch.inference_mode():
        layer(x)  # a call in inference mode leaves nothing behind
    plain = KronLinear(48, 48, ((24, 24), (2, 2)))
    plain.load_factors(layer.a, layer.b)
    plain.bias.data.copy_(layer.bias)
    gradients = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        module(inputs).square().sum().backward()
        gradients.append((inputs.grad, module.b.grad, module.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert {name for name, _ in layer.named_parameters()} == {"b", "bias"}


def test_a_change_of_the_stored_factor_is_noticed() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)), bias=False)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    to_int8_(layer)
    to_int8_(other)
    x = torch.randn(2, 48)
    with torch.no_grad():
        before = layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        assert not torch.allclose(layer(x), before)
        layer.a_scale.mul_(2)
        torch.testing.assert_close(layer(x), 2 * other(x))
        layer.to(torch.float64)
        assert layer(x.double()).dtype is torch.float64


def test_copies_and_pickles() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)))
    to_int8_(layer)
    x = torch.randn(2, 48)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), wanted)
        file = io.BytesIO()
        torch.save(layer, file)
        # The floating-point form that a run has left behind is not written.
        assert len(file.getvalue()) < 24 * 24 * 4 + 4000


@DTYPES
def test_embedding_gathers_int8_rows(dtype: torch.dtype) -> None:
    layer = KronEmbedding(300, 48, 4, terms=2, padding_idx=3, dtype=dtype)
    to_int8_(layer)
    assert type(layer) is Int8KronEmbedding
    assert layer.num_embeddings == 300
    wanted = KronEmbedding(300, 48, 4, terms=2, padding_idx=3, dtype=dtype)
    wanted.load_factors(layer.a, layer.b)
    ids = torch.randint(0, 300, (2, 7))
    assert torch.equal(layer(ids), wanted(ids))
    assert not layer(torch.tensor(3)).any()
    assert layer.to_embedding().weight.shape == (300, 48)
    torch.testing.assert_close(layer.decode(torch.ones(48, dtype=dtype)), wanted.decode(torch.ones(48, dtype=dtype)))
    with pytest.raises(IndexError):
        layer(torch.tensor([300]))


def test_a_look_up_never_builds_the_table() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                self.numel = max(self.numel, result.numel())
            return result

    layer = KronEmbedding(3000, 48, 4)
    to_int8_(layer)
    with torch.no_grad(), Largest() as seen:
        layer(torch.tensor([[1, 2, 3]]))
    assert seen.numel <= 3000  # the scales


def test_report_of_a_model() -> None:
    model = make_model()
    dense = {name: module.dense_weight().detach().clone() for name, module in model.named_modules() if is_kron(module)}
    parameters, before = count_parameters(model), weight_bytes(model)
    report = quantize_(model)
    assert report.bytes_before == before == sum(t.nbytes for t in make_model().state_dict().values())
    assert report.bytes_after == weight_bytes(model) < before
    assert count_parameters(model) == parameters
    assert [layer.name for layer in report.layers] == list(dense)
    for layer in report.layers:
        module: Any = model.get_submodule(layer.name)
        error = float((module.dense_weight().detach() - dense[layer.name]).norm() / dense[layer.name].norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-3)
        assert 0.001 < error < 0.02
        assert layer.bytes_after == sum(t.nbytes for t in module.state_dict().values()) < layer.bytes_before
    assert json.loads(json.dumps(report.to_dict()))["bytes_after"] == report.bytes_after
    assert model.config.kron["weight_dtype"] == "int8"


def is_kron(module: nn.Module) -> bool:
    return isinstance(module, (KronLinear, KronEmbedding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kron", ["K8", "K21"])
def test_hidden_states_hardly_change(kron: str, dtype: torch.dtype) -> None:
    model = make_model(kron=kron).to(dtype)
    quantized = copy.deepcopy(model)
    quantize_(quantized)
    assert 0.999 < hidden_agreement(model, quantized, [BATCH]) < 1 - 1e-7


def test_int8_layers_run_the_fused_ops() -> None:
    class Names(TorchDispatchMode):
        seen: set[str] = set()  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    model = make_model()
    quantize_(model)
    with torch.no_grad(), Names() as names:
        model(IDS[:1])
    assert {"kron_qkv", "kron_ffn", "kron_matmul_norm"} <= names.seen
    assert "kron_embedding" not in names.seen  # it would need the table in floating point


def test_agreement_leaves_padding_out_and_takes_heads() -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        states = [each(**BATCH).last_hidden_state for each in (model, other)]
    cosines = torch.cosine_similarity(*states, dim=-1)
    wanted = float(cosines[BATCH["attention_mask"].bool()].double().mean())
    assert hidden_agreement(model, other, [BATCH]) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(float(cosines.mean()), rel=1e-5)
    unpadded = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}]
    assert hidden_agreement(make_model(KronBertForMaskedLM), model, unpadded) < 1
    assert hidden_agreement(model, model, unpadded) == pytest.approx(1)
    with pytest.raises(ValueError, match="batches: expected at least one token, got none"):
        hidden_agreement(model, model, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_hold_int8_and_load_through_the_auto_class(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype)
    quantize_(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["embeddings.word_embeddings.a_int8"].dtype is torch.int8
    assert stored["encoder.layer.1.intermediate.dense.b_int8"].dtype is torch.int8
    assert stored["encoder.layer.1.intermediate.dense.b_scale"].dtype is dtype
    assert "encoder.layer.1.intermediate.dense.b" not in stored
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is KronBertModel
    assert KronConfig.from_dict(loaded.config.kron).weight_dtype == "int8"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(loaded.eval()), output(model))
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encoder.layer[0].output.dense.b_int8.dtype is torch.int8
    assert half.encoder.layer[0].output.dense.b_scale.dtype is torch.bfloat16
    assert output(half.eval()).dtype is torch.bfloat16


def test_a_tied_decoder_stays_tied(tmp_path: Path) -> None:
    model = make_model(KronBertForMaskedLM)
    before = output(model)
    quantize_(model)
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(decoder) is Int8KronDecoder
    assert decoder.embedding is embedding
    assert "int8=a" in repr(decoder)
    assert decoder.bias is model.cls.predictions.bias
    after = output(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0.05 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "decoder" in name]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().embedding is loaded.get_input_embeddings()
    assert torch.equal(output(loaded), after)
    encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert torch.equal(encoder.embeddings.word_embeddings.a_int8, embedding.a_int8)
    clone = copy.deepcopy(model)
    assert clone.get_output_embeddings().embedding is clone.get_input_embeddings()
    assert clone.get_input_embeddings() is not embedding


def test_a_fresh_model_of_an_int8_configuration() -> None:
    config = KronBertConfig(kron={**preset("K8").to_dict(), "version": 2, "weight_dtype": "int8"}, **SIZES)
    model = KronBertForMaskedLM(config).eval()
    embedding = model.get_input_embeddings()
    assert type(embedding) is Int8KronEmbedding
    assert not embedding(torch.tensor(0)).any()  # padding
    assert embedding(torch.tensor(1)).any()
    weight = model.bert.encoder.layer[0].attention.self.query.dense_weight()
    torch.testing.assert_close(weight.std(), torch.tensor(0.02), rtol=0.5, atol=0)
    assert torch.isfinite(output(model)).all()


@pytest.mark.parametrize("dense_class", [BertModel, BertForMaskedLM])
def test_kronify_makes_int8_as_quantize_does(dense_class: type[Any]) -> None:
    dense = dense_class(BertConfig(initializer_range=0.2, **SIZES)).eval()
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    report = kronify_(once, "K8", weight_dtype="int8")
    assert report.config.weight_dtype == "int8"
    same = kronify_(twice, "K8")
    quantize_(twice)
    assert report.params_after == same.params_after
    assert once.config.kron == twice.config.kron
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert torch.equal(output(once), output(twice))


def test_from_dense_takes_an_int8_config() -> None:
    dense = BertModel(BertConfig(**SIZES)).eval()
    config = KronConfig.from_dict({**preset("K21").to_dict(), "version": 2, "weight_dtype": "int8"})
    model = KronBertModel.from_dense(dense, config)
    wanted = KronBertModel.from_dense(dense, "K21")
    quantize_(wanted)
    assert torch.equal(output(model), output(wanted))


def test_checkpoints_of_the_other_weight_dtype_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "float")
    quantize_(model)
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(OSError, match=r"float: expected int8 factors, .* got factors in floating point"):
        KronBertModel.from_pretrained(tmp_path / "float", config=model.config)
    with pytest.raises(OSError, match=r"int8: expected factors in floating point, .* got int8 ones"):
        KronBertModel.from_pretrained(tmp_path / "int8", config=make_model().config)


def test_bad_requests_leave_the_model_alone() -> None:
    with pytest.raises(ValueError, match=r"model: expected Kronecker layers \(kronify_ makes them\), got none"):
        quantize_(BertModel(BertConfig(**SIZES)))
    model = make_model()
    model.encoder.layer[1].output.dense.b.data[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model: expected finite factors, got NaN or inf in encoder.layer.1.output"):
        quantize_(model)
    assert not any(isinstance(module, Int8Factored) for module in model.modules())
    assert "weight_dtype" not in model.config.kron

    class Mine(KronLinear):
        pass

    with pytest.raises(ValueError, match="expected 0 to be KronLinear or KronEmbedding, got Mine"):
        quantize_(nn.Sequential(Mine(4, 4, ((2, 2), (2, 2)))))
    model = make_model()
    quantize_(model)
    with pytest.raises(ValueError, match=r"model: expected factors in floating point, got int8 ones in embeddings"):
        quantize_(model)
    with pytest.raises(ValueError, match="expected factors in floating point to resize, got int8 ones"):
        model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="weight_dtype: expected None or 'int8', got 'int4'"):
        kronify_(BertModel(BertConfig(**SIZES)), "K8", weight_dtype="int4")


def test_decoders_of_other_embeddings_are_left_alone() -> None:
    one, two = KronEmbedding(20, 8, 2), KronEmbedding(20, 8, 2)
    model = nn.ModuleDict({"one": one, "head": two.tied_decoder()})
    quantize_(model)
    assert type(model["head"]) is KronDecoder


@pytest.mark.compile
def test_int8_layers_compile_and_export() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2))).eval()
    to_int8_(layer)
    x = torch.randn(3, 48)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
        exported = torch.export.export(layer, (x,))
    assert exported.state_dict["a_int8"].dtype is torch.int8
    torch.testing.assert_close(exported.module()(x), wanted)
