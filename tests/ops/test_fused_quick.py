"""The short way of the fused functions: straight to the op where nothing observes a call, and what it refuses named."""

from __future__ import annotations

import pytest
import torch

from kron_kernels import AddNorm, kron_embedding, kron_ffn, kron_matmul_norm, kron_qkv
from kron_kernels.ops import blocks

QUICK = ("_NORM_IS_QUICK", "_FFN_IS_QUICK", "_QKV_IS_QUICK", "_EMBEDDING_IS_QUICK")
CHECKS = ("check_norm", "check_ffn", "check_projections", "check_embedding")

X = torch.randn(5, 12)
A, B, BIAS = torch.randn(3, 3), torch.randn(4, 4), torch.randn(12)
NORM = AddNorm(torch.randn(5, 12), torch.rand(12), torch.randn(12), 1e-5)
IDS = torch.tensor([[1, 0, 6], [2, 2, 5]])

CALLS = {
    "norm": lambda x=X, b=B: kron_matmul_norm(x, A, b, BIAS, NORM),
    "ffn": lambda x=X, b=B: kron_ffn(x, A, B, BIAS, A, b, None),
    "ffn-norm": lambda x=X, b=B: kron_ffn(x, A, B, None, A, b, BIAS, activation="relu", norm=NORM),
    "qkv": lambda x=X, b=B: torch.stack(kron_qkv(x, [A, A.mT], [B, b], [BIAS, -BIAS])),
    "qkv-no-bias": lambda x=X, b=B: torch.stack(kron_qkv(x, [A, A.mT], [B, b])),
    "embedding": lambda x=X, b=B[:1]: kron_embedding(
        IDS, torch.arange(21.0).view(7, 3), b, type_ids=IDS % 2, type_weight=X[:2], norm_weight=BIAS, norm_bias=BIAS
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every op had a compiled kernel."""
    for flag in QUICK:
        monkeypatch.setattr(blocks, flag, True)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks of the longer way that have run."""
    ran: list[str] = []
    for name in CHECKS:
        check = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *args, n=name, c=check: (ran.append(n), c(*args)))
    return ran


@every_call
def test_the_short_way_gives_the_same_without_a_check(name, monkeypatch, checked):
    for flag in QUICK:
        monkeypatch.setattr(blocks, flag, False)
    expected = CALLS[name]()
    assert checked
    checked.clear()
    for flag in QUICK:
        monkeypatch.setattr(blocks, flag, True)
    assert torch.equal(CALLS[name](), expected)
    assert checked == []


@every_call
def test_what_the_op_refuses_is_named(name, quick, checked):
    with pytest.raises((TypeError, ValueError), match=r"^(x|a2, b2|b): expected"):
        CALLS[name](b=torch.randn(5, 7))
    assert checked


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"embedding"}))
def test_a_wrong_dtype_is_named(name, quick):
    with pytest.raises(TypeError, match=r"expected the dtype of x, torch.float64, got torch.float32"):
        CALLS[name](x=X.double())


def test_what_the_op_cannot_see_is_checked_before(quick):
    norm = NORM._replace(eps=-1.0)
    for call in (
        lambda: kron_matmul_norm(X, A, B, BIAS, norm),
        lambda: kron_ffn(X, A, B, BIAS, A, B, BIAS, norm=norm),
    ):
        with pytest.raises(ValueError, match=r"norm\.eps: expected a number of at least 0, got -1\.0"):
            call()
    table = torch.randn(7, 3)
    for name in ("position", "type"):
        with pytest.raises(ValueError, match=f"{name}_weight: expected a Tensor along with {name}_ids, got None"):
            kron_embedding(IDS, table, B[:1], **{f"{name}_ids": IDS})
        with pytest.raises(ValueError, match=f"{name}_ids: expected a Tensor along with {name}_weight, got None"):
            kron_embedding(IDS, table, B[:1], **{f"{name}_weight": X})
    with pytest.raises(ValueError, match="norm_bias: expected both norm_weight and norm_bias or neither"):
        kron_embedding(IDS, table, B[:1], norm_weight=BIAS)


def test_an_index_outside_is_the_ops_to_name(quick, checked):
    with pytest.raises(IndexError, match=r"ids: expected indices in \[0, 4\), got 6"):
        kron_embedding(IDS, torch.randn(4, 3), B[:1])
    assert checked == []


@pytest.mark.parametrize("observer", [None, "gradients", "autocast", "backend"])
def test_observed_calls_take_the_longer_way(observer, quick, monkeypatch):
    asked = []
    observed = blocks._observed
    monkeypatch.setattr(blocks, "_observed", lambda *args, **options: asked.append(1) or observed(*args, **options))
    a = A.clone().requires_grad_(observer == "gradients")
    backend = "reference" if observer == "backend" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=observer == "autocast"):
        y = kron_ffn(X, a, B, BIAS, A, B, None, backend=backend)
    assert asked == [1] * (observer is not None)
    assert y.requires_grad == (observer == "gradients")
    assert y.dtype is (torch.bfloat16 if observer == "autocast" else torch.float32)
