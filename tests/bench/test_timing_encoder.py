"""The encoders that are timed, and the float64 copies they are checked against."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kron_kernels.models import bert_layers
from kron_kernels.nn import KronEmbedding, KronLinear
from kron_kernels.testing.encoder import (
    TOLERANCE,
    EncoderProblem,
    compare_encoders,
    encoder_error,
    encoders,
    forward,
    plain_way,
    random_ids,
    reference_copy,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return encoders(["K8", "K21"], torch.float32, **SIZES)


def test_compressed_encoders_are_checked_and_timed(models: dict[str, nn.Module]) -> None:
    results = compare_encoders(models, batch=2, sequence=8, seconds=0.02)
    assert [result.name for result in results] == ["dense", "K8", "K21"]
    assert all(result.timing is not None and result.error <= TOLERANCE[torch.float32] for result in results)
    assert results[0].parameters > results[1].parameters > results[2].parameters


def test_a_wrong_encoder_gets_no_time(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    right = bert_layers.kron_ffn
    monkeypatch.setattr(bert_layers, "kron_ffn", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    timings = {result.name: result.timing for result in compare_encoders(models, 1, 8, seconds=0.02)}
    assert timings["dense"] is not None
    assert timings["K8"] is None
    assert timings["K21"] is None


@pytest.mark.parametrize(("damaged", "shows"), [(0, True), (7, True), (1, False)])
def test_of_a_large_batch_the_ends_and_some_between_are_checked(
    damaged: int, shows: bool, models: dict[str, nn.Module]
) -> None:
    way = plain_way("K8", models["K8"])

    def run(ids: torch.Tensor) -> torch.Tensor:
        hidden = way.run(ids).clone()
        hidden[damaged] *= 1.01
        return hidden

    problem = EncoderProblem(random_ids(models["dense"], 8, 4))
    assert problem.error(way) <= way.tolerance
    assert (problem.error(dataclasses.replace(way, run=run)) > way.tolerance) is shows


def test_reference_copy_has_no_kronecker_layer_and_computes_the_same(models: dict[str, nn.Module]) -> None:
    twin = reference_copy(models["K8"])
    assert not any(isinstance(module, (KronLinear, KronEmbedding)) for module in twin.modules())
    assert any(isinstance(module, KronLinear) for module in models["K8"].modules()), "the original is left alone"
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    ids = torch.randint(0, 50, (2, 8))
    torch.testing.assert_close(forward(twin, ids).float(), forward(models["K8"], ids), rtol=1e-4, atol=1e-5)


def test_reference_copy_runs_no_fused_op(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    twin, ids = reference_copy(models["K8"]), torch.randint(0, 50, (2, 8))
    for name in ("kron_ffn", "kron_qkv", "kron_matmul_norm", "kron_embedding"):
        monkeypatch.setattr(bert_layers, name, None)
    forward(twin, ids)
    with pytest.raises(TypeError):
        forward(models["K8"], ids)


def test_reference_copy_keeps_a_layers_activation() -> None:
    model = nn.Sequential(KronLinear(6, 6, ((2, 3), (3, 2)), activation="relu"))
    x = torch.randn(5, 6)
    with torch.no_grad():
        y = reference_copy(model)(x.double())
        torch.testing.assert_close(y.float(), model(x))
        assert (y >= 0).all()


def test_bfloat16_is_judged_by_its_own_tolerance() -> None:
    models = encoders(["K8"], torch.bfloat16, **SIZES)
    ids = torch.randint(0, 50, (2, 8))
    assert 1e-4 < encoder_error(models["K8"], ids) <= TOLERANCE[torch.bfloat16]
