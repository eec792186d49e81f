"""PEFT's LoKr layers computed from their factors, against PEFT's own: forward, backward, and what stays PEFT's."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kron_kernels.convert.versions import check_version
from kron_kernels.testing.accuracy import assert_accurate

peft = pytest.importorskip("peft", reason="peft is not installed")

from peft.tuners.lokr import layer as lokr  # noqa: E402

from kron_kernels.integrations import peft_lokr  # noqa: E402
from kron_kernels.integrations.peft_lokr import (  # noqa: E402
    PEFT_VERSIONS,
    apply_kron_kernels_to_peft,
    kron_kernels_in_peft,
    remove_kron_kernels_from_peft,
)

CLASSES = (lokr.LoKrLayer, lokr.Linear, lokr.Conv1d, lokr.Conv2d)
# What PEFT's forward and delta are before any test; every test must leave the classes so.
OWN = {cls: dict(vars(cls)) for cls in CLASSES}
Make = Callable[[], nn.Module]


def linear() -> nn.Module:
    return nn.Linear(24, 40)


def conv1d() -> nn.Module:
    return nn.Conv1d(24, 40, 1)


def conv2d(**options: Any) -> nn.Module:
    return nn.Conv2d(24, 40, **{"kernel_size": 1, **options})


SHAPES = {"Linear": (2, 5, 24), "Conv1d": (2, 24, 5), "Conv2d": (2, 24, 5, 4)}
FULL, LOW = {"r": 64}, {"r": 2}
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "linear-full": (linear, FULL),
    "linear-low-rank": (linear, LOW),
    "linear-no-bias": (lambda: nn.Linear(24, 40, bias=False), FULL),
    "linear-near-square": (linear, {"r": 64, "decompose_factor": -1}),
    "linear-both-low-rank": (linear, {"r": 2, "decompose_both": True, "decompose_factor": -1}),
    "linear-rank-dropout": (linear, {**FULL, "rank_dropout": 0.5}),
    "linear-rank-dropout-scaled": (linear, {**LOW, "rank_dropout": 0.5, "rank_dropout_scale": True}),
    "linear-module-dropout": (linear, {**LOW, "module_dropout": 0.5}),
    "linear-both-dropouts": (linear, {**LOW, "module_dropout": 0.3, "rank_dropout": 0.3}),
    "conv1d-full": (conv1d, FULL),
    "conv1d-low-rank": (conv1d, LOW),
    "conv1d-stride": (lambda: nn.Conv1d(24, 40, 1, stride=2), FULL),
    "conv2d-full": (conv2d, FULL),
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


class Model(nn.Module):
    """One layer to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(make: Make, dtype: torch.dtype = torch.float32, adapters: int = 1, **options: Any) -> Any:
    """A model of one layer with adapters of random values in ``dtype``, training."""
    torch.manual_seed(1)
    model: Any = Model(make())
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
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in IN_BF16)],
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
        model.base_model.model.layer._active_adapter = ["adapter0", "of another layer"]
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


def test_patching_the_classes_reaches_every_layer_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "kron", _refuse)
    model, x = adapted(linear, **FULL), make_x(linear)
    for _ in range(2):
        apply_kron_kernels_to_peft()
    model(x)
    adapted(conv2d, **LOW)(make_x(conv2d))
    remove_kron_kernels_from_peft()
    assert {cls: dict(vars(cls)) for cls in CLASSES} == OWN
    with pytest.raises(AssertionError, match="weight"):
        model(x)
    remove_kron_kernels_from_peft()


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


class Wrapped(Tensor):
    """A factor of a class of its own, such as a quantised one."""


UNSUPPORTED = {
    "kernel": (partial(conv2d, kernel_size=3), r"kernel size \(3, 3\)", lambda layer: None),
    "groups": (partial(conv2d, groups=2), "2 groups", lambda layer: None),
    "padding": (partial(conv2d, padding=1), r"padding \(1, 1\)", lambda layer: None),
    "conv1d": (lambda: nn.Conv1d(24, 40, 3, padding="same"), r"kernel size \(3,\)", lambda layer: None),
    "subclass": (linear, "class Subclass", lambda layer: setattr(layer, "__class__", Subclass)),
    "factor": (
        linear,
        "factor of class Wrapped",
        lambda layer: setattr(layer.lokr_w1["adapter0"], "__class__", Wrapped),
    ),
}


@pytest.mark.parametrize("of_classes", [False, True], ids=["model", "classes"])
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_keeps_pefts_path_with_one_warning(case: str, of_classes: bool) -> None:
    make, named, change = UNSUPPORTED[case]
    model, x = adapted(make, **{**FULL, "rank_dropout": 0.5}), make_x(make)
    change(model.base_model.model.layer)
    want = outcome(model, x)
    scope = None if of_classes else model
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        apply_kron_kernels_to_peft(scope)
        found = [outcome(model, x) for _ in range(2)]
        apply_kron_kernels_to_peft(scope)
    assert re.fullmatch(
        f"PEFT LoKr: a .*{named}.* keeps PEFT's own computation, which builds the weight", str(warned[0].message)
    )
    assert len(warned) == 1
    assert all(torch.equal(one[name], want[name]) for one in found for name in want)
    remove_kron_kernels_from_peft(scope)


def test_versions_and_models_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(ImportError, match=r"peft: expected version >=0\.\d+,<0\.\d+, got 0\.9\.9"):
        importlib.reload(peft_lokr)
    monkeypatch.undo()
    with pytest.raises(ImportError, match="no-such-package: expected version >=1, got none: it is not installed"):
        check_version("no-such-package", ">=1")
    check_version("peft", PEFT_VERSIONS)
    for function in (apply_kron_kernels_to_peft, remove_kron_kernels_from_peft):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or None, got str"):
            function("model")
        with pytest.raises(ValueError, match="model: expected a model with LoKr layers of PEFT, got Linear without"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (24,)], ids=str)
def test_the_product_is_added_into_what_a_plain_layer_gave(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *operands: given.append(plain(*operands)) or given[-1])
    model, x = adapted(lambda: nn.Linear(24, 40, bias=bias), adapters=2, **FULL), torch.randn(shape)
    want, given[:] = outcome(model, x), []
    with kron_kernels_in_peft(model):
        y = model(x)
        assert y.data_ptr() == given[0].data_ptr()
        found = outcome(model, x)
        assert all(torch.allclose(found[name], want[name], atol=1e-5) for name in want)
        given.clear()
        with torch.inference_mode():
            assert model(x).data_ptr() == given[0].data_ptr()


class GivesInput(nn.Linear):
    """A layer that hands on what it got."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class GivesKept(nn.Linear):
    """A layer that gives a view of what it keeps, and needs for its backward."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input).exp()
        return self.kept[:]


@pytest.mark.parametrize("kind", [GivesInput, GivesKept])
def test_what_other_layers_give_is_not_overwritten(kind: type[nn.Linear]) -> None:
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(Model(kind(24, 24)), peft.LoKrConfig(target_modules=["layer"], init_weights=False))
    x = make_x(linear)
    before = x.clone()
    assert_equals_peft(model, x)
    with kron_kernels_in_peft(model):
        y = model(x)
    assert torch.equal(x, before)
    if kind is GivesKept:
        base_layer = model.base_model.model.layer.base_layer
        assert torch.equal(base_layer.kept, F.linear(x, base_layer.weight, base_layer.bias).exp())
        assert not torch.allclose(y, base_layer.kept)


@pytest.mark.parametrize("hooked", ["forward", "backward"])
def test_what_hooks_saw_is_not_overwritten(hooked: str) -> None:
    model, x = adapted(linear, **FULL), make_x(linear)
    base_layer = model.base_model.model.layer.base_layer
    whole, want, seen = model(x), base_layer(x).detach(), []
    if hooked == "forward":
        base_layer.register_forward_hook(lambda module, operands, result: seen.append(result))
    else:
        base_layer.register_full_backward_hook(lambda module, before, after: seen.append(after[0]))
    with kron_kernels_in_peft(model):
        y = model(x.requires_grad_())
        assert torch.allclose(y, whole, atol=1e-5)
    y.backward(want)
    assert torch.equal(seen[0], want), "the result, or the gradient of it"


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that ``run()`` makes, whoever makes it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


MEMORY = {
    "full": {**FULL, "decompose_factor": 8},
    "low-rank": {**LOW, "decompose_factor": 2},  # its w2 would be a quarter of the weight
    "dropout": {**LOW, "decompose_factor": 2, "rank_dropout": 0.1},
}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
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


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("options", [FULL, LOW], ids=["full", "low-rank"])
def test_batched_gradients_are_those_of_peft(options: dict[str, Any], adapters: int) -> None:
    model = adapted(linear, adapters=adapters, **options)
    x = torch.randn(3, 24, requires_grad=True)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def gradients() -> list[Tensor]:
        y = model(x)
        rows = torch.eye(y.numel()).view(-1, *y.shape)
        batched = torch.autograd.grad(y, wanted, rows, is_grads_batched=True)
        return [jacobian(model, x, vectorize=True), *batched]

    plain = gradients()
    with kron_kernels_in_peft(model):
        for got, want in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("shape", [(0, 24), (0, 5, 24), (2, 0, 24)], ids=str)
def test_empty_batches(shape: tuple[int, ...], adapters: int, autocast: bool) -> None:
    model, x = adapted(linear, adapters=adapters, **FULL), torch.randn(shape, requires_grad=True)
    with kron_kernels_in_peft(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 40), torch.float32)
    y.sum().backward()
    assert x.grad.shape == shape


CONDITIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "no gradients": ({"inference": True}, True),
    "two adapters": ({"adapters": 2}, False),
    "trained layer": ({"trained": True}, False),
    "hook before": ({"hook": True}, False),
    "rank dropout": ({"rank_dropout": 0.5}, False),
    "adapter of another dtype": ({"adapter_dtype": torch.float64}, False),
    "autocast": ({"autocast": True}, False),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_one_adapter_on_a_plain_frozen_layer_shares_its_gradient(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, shared = CONDITIONS[condition]
    options = {name: changes[name] for name in ("adapters", "rank_dropout") if name in changes}
    model, x = adapted(linear, **FULL, **options), make_x(linear)
    layer = model.base_model.model.layer
    layer.base_layer.weight.requires_grad_("trained" in changes)
    if "hook" in changes:
        layer.base_layer.register_forward_pre_hook(lambda module, operands: (2 * operands[0],))
    if "adapter_dtype" in changes:
        layer.lokr_w2.to(changes["adapter_dtype"])
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in changes):
        want = model(x)
    calls = []
    op = peft_lokr.frozen_linear_kron
    monkeypatch.setattr(peft_lokr, "frozen_linear_kron", lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
    torch.manual_seed(0)
    with (
        kron_kernels_in_peft(model),
        torch.inference_mode("inference" in changes),
        torch.autocast("cpu", torch.bfloat16, enabled="autocast" in changes),
    ):
        y = model(x)
    assert torch.allclose(
        y, want, rtol=0.02 if "autocast" in changes else 1e-4, atol=0.1 if "autocast" in changes else 1e-4
    )
    assert bool(calls) == shared
