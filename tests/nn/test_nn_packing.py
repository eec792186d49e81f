"""The cache of packed factors: made once, anew after every change of a parameter, never while gradients are on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from kron_kernels.nn import KronLinear, packing


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was packed, in order: a copy of the factors, whether or not the kernels here have a layout of their own."""
    made: list[Tensor] = []

    def pack(a: Tensor, b: Tensor) -> Tensor:
        made.append(torch.cat([a.detach().flatten(), b.detach().flatten()]))
        return made[-1]

    monkeypatch.setattr(packing, "pack_factors", pack)
    # The op would read its operand by the layout of its own.
    monkeypatch.setattr("kron_kernels.nn.linear.kron_matmul", lambda x, *factors, **options: options["packed"])
    return made


def layer(**options) -> KronLinear:
    return KronLinear(12, 12, ((3, 3), (4, 4)), **options)


def forward(module: KronLinear) -> Tensor | None:
    """The packed factors that a forward pass hands to the op."""
    with torch.no_grad():
        return module(torch.ones(2, 12, dtype=module.a.dtype))


def of(module: KronLinear) -> Tensor:
    return torch.cat([module.a.detach().flatten(), module.b.detach().flatten()])


def test_packed_once_for_many_calls(packed):
    module = layer()
    first = forward(module)
    assert torch.equal(first, of(module))
    assert forward(module) is first
    with torch.inference_mode():
        assert module.packed() is first
        assert module.operands()[3] is first
    assert len(packed) == 1


def scale_in_place(module: KronLinear) -> None:
    with torch.no_grad():
        module.b.mul_(2)


def step(module: KronLinear) -> None:
    module.zero_grad()
    (module.a.sum() * module.b.sum()).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def step_adam(module: KronLinear) -> None:
    (module.a.sum() * module.b.sum()).backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def load(module: KronLinear) -> None:
    module.load_state_dict(layer().state_dict())


def assign(module: KronLinear) -> None:
    module.load_state_dict(layer().state_dict(), assign=True)


def to_double_and_back(module: KronLinear) -> None:
    module.double()
    forward(module)
    module.float()


def replace(module: KronLinear) -> None:
    module.a = nn.Parameter(torch.randn(1, 3, 3))


def reset(module: KronLinear) -> None:
    module.reset_parameters()


def load_factors(module: KronLinear) -> None:
    module.load_factors(torch.randn(1, 3, 3), torch.randn(1, 4, 4))


def new_data(module: KronLinear) -> None:
    module.a.data = torch.randn(1, 3, 3)


def transposed_data(module: KronLinear) -> None:
    module.b.data = module.b.data.mT


def fewer_terms(module: KronLinear) -> None:
    module.a.data, module.b.data = module.a.data[:1], module.b.data[:1]


def write_through_an_alias(module: KronLinear) -> None:
    module.a.detach()[0, 0, 0] = 7


CHANGES = (
    scale_in_place,
    step,
    step_adam,
    load,
    assign,
    to_double_and_back,
    replace,
    reset,
    load_factors,
    new_data,
    transposed_data,
    fewer_terms,
    write_through_an_alias,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_packed_anew_after_a_change(change, packed):
    module = layer(terms=2 if change is fewer_terms else 1)
    old = forward(module)
    change(module)
    new = forward(module)
    assert new is not old
    assert torch.equal(new, of(module))
    assert forward(module) is new


def test_a_dtype_of_its_own(packed):
    module = layer()
    forward(module)
    assert forward(module.double()).dtype is torch.float64
    assert forward(module.to(torch.bfloat16)).dtype is torch.bfloat16
    assert len(packed) == 3


def test_nothing_is_packed_while_gradients_are_on(packed):
    module = layer()
    assert module.packed() is None
    assert module(torch.ones(2, 12)) is None
    frozen = layer().requires_grad_(False)
    assert frozen.packed() is None
    assert packed == []


def test_packed_before_training_and_made_anew_after_it(packed):
    module = layer()
    old = forward(module)
    assert module(torch.ones(2, 12)) is None, "a training step works on the parameters themselves"
    step(module)
    assert not torch.equal(forward(module), old)
    assert len(packed) == 2


def test_copies_and_pickles_start_empty(packed):
    module = layer()
    old = forward(module)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        scale_in_place(clone)
        assert torch.equal(forward(clone), of(clone))
        assert forward(module) is old
    assert len(packed) == 3


def test_parameters_made_in_inference_mode_are_not_packed(packed):
    with torch.inference_mode():
        module = layer()
        assert module.packed() is None
        module.a.mul_(2)
        assert module.packed() is None
    assert packed == []


def test_a_parameter_of_inference_mode_in_place_of_another(packed):
    module = layer()
    forward(module)
    with torch.inference_mode():
        module.a = nn.Parameter(torch.randn(1, 3, 3))
    assert forward(module) is None
    assert len(packed) == 1


def test_clearing(packed):
    module = layer()
    old = forward(module)
    module.a.data[0, 0, 0] += 1
    module._cache.clear()
    assert torch.equal(forward(module), of(module))
    assert not torch.equal(old, of(module))


def test_other_devices_and_compilers(packed, monkeypatch):
    module = layer()
    with torch.no_grad():
        assert layer(device="meta").packed() is None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert module.packed() is None
    assert packed == []


def test_factors_that_are_no_parameters(packed):
    module, other = layer(), layer(bias=False)
    a, b = torch.randn(1, 3, 3), torch.randn(1, 4, 4)
    with torch.no_grad():
        result = torch.func.functional_call(other, {"a": a, "b": b}, torch.ones(2, 12))
        assert torch.equal(result, torch.cat([a.flatten(), b.flatten()]))
        nn.utils.parametrize.register_parametrization(module, "a", nn.Identity())
        assert module.operands()[3] is None, "made anew for every call: not worth packing"
