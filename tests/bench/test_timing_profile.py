"""Time by part: ops are told apart by their order, fused or not, and the parts make up the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kron_kernels.testing import profile
from kron_kernels.testing.encoder import encoders, random_ids
from kron_kernels.testing.profile import PARTS, Op, Profile, profile_forward, sort_ops

LINEAR, SDPA, NORM, ADD, GELU = (
    f"aten::{name}" for name in ("linear", "scaled_dot_product_attention", "layer_norm", "add", "gelu")
)
KRON = "kron_kernels::"
EMBEDDING = [("aten::embedding", 1), ("aten::embedding", 1), (ADD, 1), (NORM, 1), ("aten::dropout", 1)]
DENSE_LAYER = [
    *[(LINEAR, 10), ("aten::view", 1), ("aten::transpose", 1)] * 3,
    *[(SDPA, 20), ("aten::transpose", 1), ("aten::reshape", 1), (LINEAR, 30), (ADD, 2), (NORM, 3)],
    *[(LINEAR, 100), (GELU, 5), (LINEAR, 100), (ADD, 2), (NORM, 3)],
]
FUSED_LAYER = [
    *[(KRON + "kron_qkv", 10), ("aten::view", 1), ("aten::transpose", 1)],
    *[(SDPA, 20), ("aten::transpose", 1), ("aten::is_set_to", 2), (KRON + "kron_matmul_norm", 30)],
    *[("aten::is_set_to", 2), ("aten::is_set_to", 2), (KRON + "kron_ffn", 100)],
]
POOLER = [("aten::select", 1), (LINEAR, 7), ("aten::tanh", 1)]


def sorted_parts(*ops: tuple[str, float]) -> dict[str, float]:
    found = sort_ops([Op(*op) for op in ops])
    assert set(found) == set(PARTS)
    assert sum(found.values()) == sum(seconds for _, seconds in ops), "nothing is lost"
    return {part: seconds for part, seconds in found.items() if seconds}


def test_a_dense_encoder_is_sorted() -> None:
    assert sorted_parts(("aten::ones", 4), *EMBEDDING, *DENSE_LAYER, *DENSE_LAYER, *POOLER) == {
        "framework": 4 + 1,  # what comes before the embedding, and its dropout
        "embedding": 4,
        "QKV": 2 * 30,
        "attention": 2 * (6 + 20 + 2),
        "output projection": 2 * 30,
        "FFN": 2 * 205,
        "LayerNorm": 2 * 10,
        "pooler": 9,
    }


def test_fused_ops_are_recognised() -> None:
    assert sorted_parts((KRON + "kron_embedding", 6), *FUSED_LAYER, *FUSED_LAYER, *POOLER) == {
        "embedding": 6,
        "QKV": 2 * 10,
        "attention": 2 * (2 + 20 + 1),
        "output projection": 2 * 30,
        "FFN": 2 * 100,
        "pooler": 9,
        "framework": 2 * 6,  # asking whether packed factors hold good
    }


def test_half_fused_layers_are_sorted() -> None:
    attention = [(KRON + "kron_matmul", 10)] * 3 + [(SDPA, 20), (KRON + "kron_matmul", 30), (ADD, 2), (NORM, 3)]
    ffn_and_norm = [(KRON + "kron_ffn", 100), (ADD, 2), (NORM, 3)]
    product_and_norm = [(KRON + "kron_matmul", 50), (KRON + "kron_matmul_norm", 60)]
    expected = {"embedding": 4, "framework": 1, "QKV": 30, "attention": 20, "output projection": 30}
    assert sorted_parts(*EMBEDDING, *attention, *ffn_and_norm) == {**expected, "FFN": 100, "LayerNorm": 10}
    assert sorted_parts(*EMBEDDING, *attention, *product_and_norm) == {**expected, "FFN": 110, "LayerNorm": 5}
    # The next layer's products are QKV again.
    twice = sorted_parts(*EMBEDDING, *attention, *product_and_norm, *attention, *ffn_and_norm)
    assert (twice["QKV"], twice["output projection"], twice["FFN"]) == (60, 60, 210)


def test_attention_that_is_not_sdpa_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ops: expected scaled_dot_product_attention among them"):
        sort_ops([Op(name, 1.0) for name, _ in (*EMBEDDING, (LINEAR, 1), ("aten::softmax", 1))])


def test_gap_is_of_the_sum_over_the_untraced_time() -> None:
    assert Profile({"FFN": 3.0, "QKV": 1.5}, traced=4.4, untraced=4.0).gap == pytest.approx(0.125)
    assert Profile({"FFN": 3.0}, traced=3.0, untraced=4.0).gap == pytest.approx(-0.25)


def test_what_lies_between_the_ops_is_the_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = [Op(*op) for op in (*EMBEDDING, *DENSE_LAYER)]
    spent = sum(op.seconds for op in ops)
    traces = iter([[(spent + 7.0, ops)], [(spent + 9.0, ops)], [(spent + 50.0, ops)]])
    monkeypatch.setattr(profile, "_trace", lambda model, ids, calls: next(traces))
    monkeypatch.setattr(profile, "_timed", lambda model, ids: 100.0)
    found = profile_forward(nn.Identity(), torch.zeros(1, 1), seconds=1)
    assert found.parts["framework"] == 9.0 + 1  # and the embedding's dropout
    assert (found.traced, found.untraced) == (spent + 9.0, 100.0)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    sizes = {"vocab_size": 50, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    return encoders(["K21"], torch.float32, num_hidden_layers=2, max_position_embeddings=64, **sizes)


@pytest.mark.parametrize("name", ["dense", "K21"])
def test_a_real_forward_has_every_part(name: str, models: dict[str, nn.Module]) -> None:
    found = profile_forward(models[name], random_ids(models[name], 2, 64), seconds=0.05)
    fused = {"LayerNorm"} if name == "K21" else set()  # may be part of the ops before it
    assert tuple(found.parts) == PARTS
    assert all(seconds > 0 for part, seconds in found.parts.items() if part not in fused)
    assert found.untraced > 0
    assert found.traced > 0


def test_ops_of_a_trace_fit_into_their_forward(models: dict[str, nn.Module]) -> None:
    traces = profile._trace(models["dense"], random_ids(models["dense"], 2, 64), calls=3)
    assert len(traces) == 3
    for total, ops in traces:
        assert 0 < sum(op.seconds for op in ops) <= total * 1.0001
        # Two layers of six products, and the pooler: nothing nested, nothing left out.
        assert [op.name for op in ops].count("aten::linear") == 13
        assert [op.name for op in ops].count("aten::scaled_dot_product_attention") == 2
