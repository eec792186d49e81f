"""Training form: a call is right whatever wrote the weights before it, and whatever was called before that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kron_kernels.nn import KronLinear, QuantizedKronLinear
from kron_kernels.nn.quantized import dequantize, to_quantized_

X = torch.linspace(-1, 1, 2 * 48).view(2, 48)


@pytest.fixture(scope="module", autouse=True)
def group() -> Any:
    """A process group of one over gloo, whose collectives no version counter counts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def other(tensor: Tensor) -> Tensor:
    return torch.randint_like(tensor, -127, 127) if tensor.dtype is torch.int8 else torch.randn_like(tensor)


def shared_memory(tensor: Tensor, new: Tensor) -> None:
    tensor.data = tensor.data.clone().share_memory_()
    alias = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, tensor.shape)  # as another process
    alias.copy_(new)


def storage_refilled(tensor: Tensor, new: Tensor) -> None:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)  # as FSDP2 frees a shard
    storage.resize_(size)
    tensor.data.copy_(new)


def optimizer_step(tensor: Tensor, new: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.requires_grad_().grad = new
        torch.optim.AdamW([tensor], lr=0.1).step()


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "through_data": lambda tensor, new: tensor.data.copy_(new),
    "data_exchanged": lambda tensor, new: setattr(tensor, "data", new),
    "one_row_through_data": lambda tensor, new: tensor.data[0, -1].copy_(new[0, -1]),
    "numpy_alias": lambda tensor, new: np.copyto(tensor.detach().numpy(), new.numpy()),
    "scatter": lambda tensor, new: dist.scatter(tensor.data, [new], 0),
    "all_gather": lambda tensor, new: dist.all_gather([tensor.data], new),
    "in_inference_mode": torch.inference_mode()(lambda tensor, new: tensor.detach().copy_(new)),
    **{write.__name__: write for write in (shared_memory, storage_refilled, optimizer_step)},
}


def expected(layer: KronLinear) -> Tensor:
    """Return the layer's result from what its tensors hold now, by plain torch on copies."""
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    a = state["a"] if "a" in state else dequantize(state["a_int8"], state["a_scale"], 24)
    return F.linear(X, torch.kron(a[0], state["b"][0]), state["bias"])


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("write", WRITES)
def test_every_write_shows_in_the_next_call(write: str, int8: bool) -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)))
    if int8:
        to_quantized_(layer, "int8")
        assert type(layer) is QuantizedKronLinear
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    for grad in (False, True):
        for name, tensor in tensors:
            with torch.set_grad_enabled(grad):
                layer(X)
                layer(X)
            before = expected(layer)
            if name != "bias":
                WRITES[write](tensor, other(tensor))
                assert write == "optimizer_step" or not torch.equal(before, expected(layer))
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(X), expected(layer), rtol=1e-4, atol=1e-3)


def test_functional_calls_and_parametrizations() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)), bias=False)
    a, b = torch.randn(1, 24, 24), torch.randn(1, 2, 2)
    with torch.no_grad():
        result = torch.func.functional_call(layer, {"a": a, "b": b}, X)
        torch.testing.assert_close(result, X @ torch.kron(a[0], b[0]).T, rtol=1e-4, atol=1e-4)
        clone = copy.deepcopy(layer)
        nn.utils.parametrize.register_parametrization(layer, "a", nn.Tanh())
        clone.a.data.tanh_()
        torch.testing.assert_close(layer(X), clone(X))
