"""PEFT's LoKr layers computed from their factors, against PEFT's own: forward, backward, and what stays PEFT's."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kron_kernels.integrations.versions import check_version
from kron_kernels.testing.accuracy import assert_accurate

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft.tuners.lokr import layer as lokr  # noqa: E402

from kron_kernels.integrations import peft_lokr  # noqa: E402
from kron_kernels.integrations.peft_lokr import (  # noqa: E402
    apply_kron_kernels_to_peft,
    kron_kernels_in_peft,
    remove_kron_kernels_from_peft,
)

CLASSES = (lokr.LoKrLayer, lokr.Linear, lokr.Conv1d, lokr.Conv2d)
# What PEFT's forward and delta are before any test; every test must leave the classes so.
OWN = {cls: dict(vars(cls)) for cls in CLASSES}
Make = Callable[[], nn.Module]


linear = partial(nn.Linear, 24, 40)
conv1d = partial(nn.Conv1d, 24, 40, kernel_size=1)
conv2d = partial(nn.Conv2d, 24, 40, kernel_size=1)
SHAPES = {"Linear": (2, 5, 24), "Conv1d": (2, 24, 5), "Conv2d": (2, 24, 5, 4)}
FULL, LOW = {"r": 64}, {"r": 2}
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "linear-full": (linear, FULL),
    "linear-low-rank": (linear, LOW),
    "linear-no-bias": (partial(linear, bias=False), FULL),
    "linear-both-low-rank": (linear, {"r": 2, "decompose_both": True, "decompose_factor": -1}),
    "linear-rank-dropout": (linear, {**FULL, "rank_dropout": 0.5}),
    "linear-rank-dropout-scaled": (linear, {**LOW, "rank_dropout": 0.5, "rank_dropout_scale": True}),
    "linear-module-dropout": (linear, {**LOW, "module_dropout": 0.5}),
    "conv1d-low-rank": (conv1d, LOW),
    "conv1d-stride": (partial(conv1d, stride=2), FULL),
    "conv2d-low-rank": (conv2d, {**LOW, "use_effective_conv2d": True}),
    "conv2d-stride": (partial(conv2d, stride=(2, 3), padding="valid"), FULL),
    "conv2d-rank-dropout": (conv2d, {**FULL, "rank_dropout": 0.5, "rank_dropout_scale": True}),
}


@pytest.fixture(autouse=True)
def _classes_are_left_as_they_were() -> Iterator[None]:
    yield
    remove_kron_kernels_from_peft()
    for cls in CLASSES:
        assert dict(vars(cls)) == OWN[cls]


def adapted(make: Make, dtype: torch.dtype = torch.float32, adapters: int = 1, **options: Any) -> Any:
    """A model of one layer with adapters of random values in ``dtype``, training."""
    torch.manual_seed(1)
    model: Any = nn.Sequential(OrderedDict(layer=make()))
    config = {"target_modules": ["layer"], "decompose_factor": 4, "alpha": 3, "init_weights": False, **options}
    names = [f"adapter{index}" for index in range(adapters)]
    model = peft.get_peft_model(model, peft.LoKrConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoKrConfig(**config))
    model.base_model.set_adapter(names)
    return model.to(dtype).train()


def make_x(make: Make) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(SHAPES[type(make()).__name__], generator=generator)


def outcome(model: nn.Module, x: Tensor, seed: int = 0, autocast: bool = False) -> dict[str, Tensor]:
    """Output, and the gradients of its product with fixed weights, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    model.zero_grad()
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "draw": torch.rand(1)}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients
    return found | {name: torch.zeros(1) if grad is None else grad for name, grad in gradients.items()}


def assert_equals_peft(model: Any, x: Tensor, seed: int = 0, autocast: bool = False) -> dict[str, Tensor]:
    """Output and gradients of the patched model err at most twice as much as PEFT's own, against float64."""
    oracle = outcome(copy.deepcopy(model).double(), x.double(), seed)
    own = outcome(model, x, seed, autocast)
    with kron_kernels_in_peft(model):
        ours = outcome(model, x, seed, autocast)
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        assert value.dtype == own[name].dtype
        assert_accurate(value, own[name], oracle[name], name)
    return ours


IN_BF16 = ("linear-full", "linear-low-rank", "linear-rank-dropout-scaled", "conv2d-stride")


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in IN_BF16)]
)
def test_output_gradients_and_draws_are_those_of_peft(case: str, dtype: torch.dtype) -> None:
    make, options = CASES[case]
    model = adapted(make, dtype, **options)
    seen = [assert_equals_peft(model, make_x(make).to(dtype), seed)["y"] for seed in range(4 if "drop" in case else 1)]
    if "dropout" in case:
        assert not all(torch.equal(y, seen[0]) for y in seen), "something is dropped"
        model.eval()
        assert_equals_peft(model, make_x(make).to(dtype))


@pytest.mark.parametrize("options", [FULL, LOW, {**FULL, "rank_dropout": 0.5}], ids=["full", "low-rank", "dropout"])
def test_autocast_is_that_of_peft(options: dict[str, Any]) -> None:
    found = assert_equals_peft(adapted(linear, **options), make_x(linear), autocast=True)
    assert found["y"].dtype is torch.float32


def test_what_is_not_active_takes_no_part() -> None:
    model, x = adapted(linear, adapters=2, **FULL), make_x(linear)
    one = model(x)
    with kron_kernels_in_peft(model):
        model.base_model.set_adapter(["adapter0"])
        assert not torch.allclose(model(x), one)
        assert_equals_peft(model, x)
        with model.disable_adapter():
            assert torch.equal(model(x), model.base_model.model.layer.base_layer(x))


def test_merging_and_unmerging_are_as_before() -> None:
    model, x = adapted(linear, **LOW).eval(), make_x(linear)
    plain = model(x)
    with kron_kernels_in_peft(model):
        model.merge_adapter()
        assert torch.allclose(model(x), plain, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(x), plain, atol=1e-5)
        merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.layer) is nn.Linear
    assert torch.allclose(merged(x), plain, atol=1e-5)


def test_patching_a_model_leaves_the_classes_and_other_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "kron", _refuse)
    model, other, x = adapted(linear, **FULL), adapted(linear, **FULL), make_x(linear)
    layer = model.base_model.model.layer
    state = dict(vars(layer))
    for _ in range(2):
        apply_kron_kernels_to_peft(model)
    assert isinstance(layer, lokr.Linear)
    model(x)
    copy.deepcopy(model)(x)
    pickle.loads(pickle.dumps(layer))(x)
    with pytest.raises(AssertionError, match="weight"):
        other(x)
    for _ in range(2):
        remove_kron_kernels_from_peft(model)
    assert type(layer) is lokr.Linear
    assert vars(layer) == state
    with pytest.raises(AssertionError, match="weight"):
        model(x)


@pytest.mark.parametrize("of_classes", [False, True], ids=["model", "classes"])
def test_a_context_undoes_what_it_did_and_no_more(of_classes: bool) -> None:
    model = adapted(linear, **FULL)
    layer, scope = model.base_model.model.layer, None if of_classes else model
    with pytest.raises(KeyError), kron_kernels_in_peft(scope):  # noqa: PT012
        assert type(layer).forward is peft_lokr._forward
        raise KeyError
    assert type(layer).forward is OWN[lokr.LoKrLayer]["forward"]
    apply_kron_kernels_to_peft(scope)
    with kron_kernels_in_peft(scope):
        pass
    assert type(layer).forward is peft_lokr._forward


def _refuse(*_: Any) -> Tensor:
    raise AssertionError("the weight was built")


class Subclass(lokr.Linear):
    """Of a user: it may compute anything."""

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._get_delta_activations(adapter_name, input, *args, **kwargs)


UNSUPPORTED = {
    "kernel": (partial(conv2d, kernel_size=3), r"kernel size \(3, 3\)", lambda layer: None),
    "padding": (partial(conv2d, padding=1), r"padding \(1, 1\)", lambda layer: None),
    "subclass": (linear, "class Subclass", lambda layer: setattr(layer, "__class__", Subclass)),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_keeps_pefts_path_with_one_warning(case: str) -> None:
    make, named, change = UNSUPPORTED[case]
    model, x = adapted(make, **{**FULL, "rank_dropout": 0.5}), make_x(make)
    change(model.base_model.model.layer)
    want = outcome(model, x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        apply_kron_kernels_to_peft(model)
        found = [outcome(model, x) for _ in range(2)]
    assert re.fullmatch(
        f"PEFT LoKr: a .*{named}.* keeps PEFT's own computation, which builds the weight", str(warned[0].message)
    )
    assert len(warned) == 1
    assert all(torch.equal(one[name], want[name]) for one in found for name in want)


def test_versions_and_models_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(ImportError, match=r"peft: expected version >=0\.\d+,<0\.\d+, got 0\.9\.9"):
        importlib.reload(peft_lokr)
    monkeypatch.undo()
    with pytest.raises(ImportError, match="no-such-package: expected version >=1, got none: it is not installed"):
        check_version("no-such-package", ">=1")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or None, got str"):
        apply_kron_kernels_to_peft("model")
    with pytest.raises(ValueError, match="model: expected a model with LoKr layers of PEFT, got Linear without"):
        apply_kron_kernels_to_peft(nn.Linear(2, 2))


def test_what_hooks_saw_is_not_overwritten() -> None:
    model, x = adapted(linear, **FULL), make_x(linear)
    base_layer = model.base_model.model.layer.base_layer
    whole, want, seen = model(x), base_layer(x).detach(), []
    base_layer.register_forward_hook(lambda module, operands, result: seen.append(result))
    with kron_kernels_in_peft(model):
        assert torch.allclose(model(x), whole, atol=1e-5)
    assert torch.equal(seen[0], want)


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that ``run()`` makes, whoever makes it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("options", [{**FULL, "decompose_factor": 8}, {**LOW, "decompose_factor": 2}])
def test_nothing_of_the_weights_size_is_made(options: dict[str, Any]) -> None:
    model = adapted(lambda: nn.Linear(256, 384), **options)
    weight = 256 * 384 * 4
    x = torch.randn(3, 256)
    assert largest_allocation(lambda: outcome(model, x)) >= weight
    with kron_kernels_in_peft(model):
        # Small factors, and activations of three rows.
        assert largest_allocation(lambda: outcome(model, x)) <= weight / 16


def test_checkpointing_works() -> None:
    model, x = adapted(linear, adapters=2, **{**LOW, "rank_dropout": 0.5}), make_x(linear).requires_grad_()
    with kron_kernels_in_peft(model):
        found = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            torch.manual_seed(0)
            found.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear-full", "linear-low-rank", "conv2d-stride"])
def test_a_patched_model_compiles_to_one_graph(case: str) -> None:
    make, options = CASES[case]
    model, x = adapted(make, **options), make_x(make)
    with kron_kernels_in_peft(model):
        plain = outcome(model, x)
        torch.compiler.reset()
        found = outcome(torch.compile(model, fullgraph=True), x)
    for name in ("y", "x"):
        assert torch.allclose(found[name], plain[name], atol=1e-5), name
    assert all(torch.allclose(found[f"_orig_mod.{name}"], plain[name], atol=1e-4) for name in plain if "lokr" in name)


def test_empty_batches() -> None:
    model = adapted(linear, adapters=2, **FULL)
    with kron_kernels_in_peft(model):
        for shape in ((0, 24), (2, 0, 24)):
            assert outcome(model, torch.ones(shape))["y"].shape == (*shape[:-1], 40)
