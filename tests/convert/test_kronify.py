"""kronify_: the converted encoder computes what its factors say, stays tied, and an error leaves the model alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetModel,
)

from kron_kernels.convert.calibrate import calibrate
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig, preset
from kron_kernels.convert.rules import BandRule, LowRankRule, ShapeRule
from kron_kernels.nn import KronDecoder, KronEmbedding, KronLinear, TiedDecoder

SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[5, 9, 2, 30, 7], [8, 3, 40, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

# As many terms as the smaller factor has entries: every weight can be written exactly.
EXACT = KronConfig(
    {
        "attention": ShapeRule(b=(2, 2), terms=4),
        "ffn_in": ShapeRule(a=(4, 2), terms=8),
        "ffn_out": ShapeRule(a=(2, 4), terms=8),
        "embedding": ShapeRule(b=(1, 4), terms=4),
    }
)

MODELS = {
    "bert": (BertModel, BertConfig),
    "bert-mlm": (BertForMaskedLM, BertConfig),
    "mpnet": (MPNetModel, MPNetConfig),
    "mpnet-mlm": (MPNetForMaskedLM, MPNetConfig),
}


def make_model(name: str = "bert", **options) -> nn.Module:
    model_class, config_class = MODELS[name]
    config = config_class(vocab_size=50, max_position_embeddings=20, initializer_range=0.2, **SIZES, **options)
    return model_class(config).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK)[0]


def reconstructed(dense: nn.Module, kron: nn.Module) -> nn.Module:
    """The dense model with every replaced weight built from its factors."""
    dense = copy.deepcopy(dense)
    for name, module in kron.named_modules():
        if isinstance(module, (KronLinear, KronEmbedding)):
            dense.get_submodule(name).weight.data = module.dense_weight().detach()
    dense.tie_weights()
    return dense


@pytest.mark.parametrize("name", MODELS)
def test_full_terms_reproduce_the_original_model(name):
    dense = make_model(name)
    kron = copy.deepcopy(dense)
    report = kronify_(kron, EXACT)
    assert len(report.layers) == 13
    assert max(layer.relative_error for layer in report.layers) < 1e-5
    torch.testing.assert_close(outputs(kron), outputs(dense), rtol=1e-4, atol=1e-4)


def test_output_is_that_of_the_reconstructed_weights():
    dense = make_model("bert-mlm")
    kron = copy.deepcopy(dense)
    kronify_(kron, preset("K8"))
    torch.testing.assert_close(outputs(kron), outputs(reconstructed(dense, kron)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(kron), outputs(dense), atol=0.1)


@pytest.mark.parametrize("name", ["bert-mlm", "mpnet-mlm"])
def test_tied_decoder_stays_tied(name, tmp_path):
    model = make_model(name)
    kronify_(model, "K21")
    embedding, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(decoder, KronDecoder)
    model.tie_weights()
    assert decoder.a is embedding.a
    assert decoder.b is embedding.b
    model.save_pretrained(tmp_path)
    loaded = type(model)(model.config).eval()
    kronify_(loaded, json.loads((tmp_path / "config.json").read_text())["kron"], fit=False)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert not [key for key in saved if "decoder" in key]
    loaded.load_state_dict(saved, strict=False)
    torch.testing.assert_close(outputs(loaded), outputs(model))


def test_decoder_with_a_weight_of_its_own_stays_dense():
    model = make_model("bert-mlm", tie_word_embeddings=False)
    kronify_(model, "K8")
    assert type(model.get_output_embeddings()) is nn.Linear


def test_report_counts_and_serialises():
    model = make_model()
    before = sum(parameter.numel() for parameter in model.parameters())
    seen = []
    report = kronify_(model, "K8", progress=lambda *state: seen.append(state))
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (report.params_before, report.params_after) == (before, after)
    assert report.compression == before / after
    query = report.layers[1]
    assert (query.name, query.role) == ("encoder.layer.0.attention.self.query", "attention")
    assert query.structure == "24x24 (x) 2x2"
    assert 0 < query.relative_error < 1
    assert seen[-1][:2] == (13, 13)
    data = json.loads(json.dumps(report.to_dict()))
    assert KronConfig.from_dict(data["config"]) == report.config
    assert model.config.kron == report.config.to_dict()


def test_calibration_lowers_output_errors_and_corrects_means():
    model = make_model()
    batches = [{"input_ids": torch.randint(2, 50, (16, 8))} for _ in range(4)]
    calibration = calibrate(model, batches)
    plain, aware = copy.deepcopy(model), copy.deepcopy(model)
    kronify_(plain, "K8")
    report = kronify_(aware, "K8", calibration=calibration)
    fits = [layer for layer in report.layers if layer.role != "embedding"]
    assert all(layer.weighted_error is not None for layer in fits)
    name = "encoder.layer.0.output.dense"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        handle.remove()
        x = torch.cat(inputs).flatten(0, 1)
        wanted = model.get_submodule(name)(x)
        errors = [m.get_submodule(name)(x) - wanted for m in (plain, aware)]
    assert errors[1].norm() < 0.9 * errors[0].norm()
    torch.testing.assert_close(errors[1].mean(0), torch.zeros(48), rtol=0, atol=1e-4)


def test_skipped_modules_stay_dense():
    model = make_model()
    kronify_(model, KronConfig(preset("K8").rules, skip=(r"layer\.0\.", "embedding")))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["encoder.layer.0.output.dense"] is nn.Linear
    assert kinds["embeddings.word_embeddings"] is nn.Embedding
    assert kinds["encoder.layer.1.output.dense"] is KronLinear


def test_patterns_extend_to_other_architectures():
    dense = DistilBertModel(DistilBertConfig(vocab_size=50, dim=48, hidden_dim=192, n_layers=2, n_heads=4)).eval()
    patterns = {
        "attention": (r"attention\.(q|k|v|out)_lin$",),
        "ffn_in": (r"ffn\.lin1$",),
        "ffn_out": (r"ffn\.lin2$",),
        "embedding": (r"word_embeddings$",),
    }
    kron = copy.deepcopy(dense)
    assert len(kronify_(kron, KronConfig(EXACT.rules, patterns=patterns)).layers) == 13
    torch.testing.assert_close(outputs(kron), outputs(dense), rtol=1e-4, atol=1e-4)


def test_structure_only_runs_on_the_meta_device():
    with torch.device("meta"):
        model = make_model()
    report = kronify_(model, "K8", fit=False)
    assert all(layer.relative_error is None for layer in report.layers)
    assert all(parameter.is_meta for parameter in model.parameters())


def nan_weight(model):
    model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan


def shared_weight(model):
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight


ODD = preset("K8").rules


@pytest.mark.parametrize(
    ("spoil", "config", "match"),
    [
        (
            None,
            KronConfig({**ODD, "ffn_out": ShapeRule(a=(5, 1))}),
            r"encoder.layer.0.output.dense \(ffn_out\): a: .*5x1",
        ),
        (None, KronConfig({**ODD, "embedding": ShapeRule(b=(2, 2))}), r"\(embedding\): b: expected a row vector .*2x2"),
        (None, KronConfig(ODD, patterns=dict.fromkeys(ODD, ("nothing",))), "no module plays the role 'attention'"),
        (nan_weight, "K8", "model: expected finite weights, got NaN or inf in encoder.layer.1.output.dense"),
        (shared_weight, "K8", "model: encoder.layer.0.output.dense shares its weight: .*, encoder.layer.1.output"),
        (None, "K9", "preset: expected one of K8, K19, K21, KnGPT2, TQCompressor, TQCompressor-QKV, got 'K9'"),
    ],
)
def test_errors_leave_the_model_as_it_was(spoil, config, match):
    model = make_model()
    if spoil is not None:
        spoil(model)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=match):
        kronify_(model, config)
    assert dict(model.named_modules()) == modules
    assert not hasattr(model.config, "kron")


def test_converting_twice_is_refused():
    model = make_model()
    kronify_(model, "K8")
    with pytest.raises(ValueError, match="model: expected a dense model, got one that has factored layers already"):
        kronify_(model, "K8")


LOW_RANK = KronConfig(
    {
        "attention": LowRankRule(48),
        "ffn_in": LowRankRule(48),
        "ffn_out": LowRankRule(48),
        "embedding": BandRule(((10, 48), (None, 48))),
    }
)


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_reproduces_the_model_with_its_ties(name):
    dense = make_model(name).double()
    wanted = outputs(dense)
    calibration = calibrate(dense, [{"input_ids": IDS, "attention_mask": MASK}])
    assert calibration.token_counts.tolist() == torch.bincount(IDS[MASK.bool()], minlength=50).tolist()
    report = kronify_(dense, LOW_RANK, calibration=calibration)
    torch.testing.assert_close(outputs(dense), wanted, rtol=1e-6, atol=1e-6)
    assert dense.get_input_embeddings().places[IDS[MASK.bool()]].max() < IDS[MASK.bool()].unique().numel()
    assert {layer.structure for layer in report.layers} == {"rank 48", "bands 10x48, 40x48"}
    assert max(layer.relative_error for layer in report.layers) < 1e-5
    assert (type(dense.get_output_embeddings()) is TiedDecoder) == name.endswith("mlm")


def test_layers_have_rules_of_their_own():
    model = make_model("bert-mlm")
    own = {"encoder.layer.1.output.dense": LowRankRule(3), "layer.0.output.dense": ShapeRule(b=(2, 2))}
    report = kronify_(model, replace(preset("K8"), layers=own), fit=False)
    found = {layer.name: layer.structure for layer in report.layers if layer.role == "ffn_out"}
    assert found == {
        "bert.encoder.layer.0.output.dense": "24x96 (x) 2x2",
        "bert.encoder.layer.1.output.dense": "rank 3",
    }
    for name in ("encoder.layer.2.output.dense", "cls.predictions.decoder"):
        with pytest.raises(ValueError, match=f"layers: expected names of modules to replace, got {name}"):
            kronify_(make_model("bert-mlm"), replace(preset("K8"), layers={name: LowRankRule(3)}), fit=False)


def test_a_layer_without_calibration_is_named():
    model = make_model()
    calibration = calibrate(model, [{"input_ids": IDS}], ["encoder.layer.0.output.dense"])
    with pytest.raises(ValueError, match=r"calibration: expected a moment for encoder.layer.* got none"):
        kronify_(model, "K8", calibration=calibration)
