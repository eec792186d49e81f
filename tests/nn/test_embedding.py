"""KronEmbedding and its tied decoder: equal to the dense table, without ever building it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kron_kernels.nn import KronEmbedding


class LargestTensor(TorchDispatchMode):
    """Notes the largest floating-point tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors if tensor.is_floating_point())])
        return result


@pytest.mark.parametrize("terms", [1, 3])
def test_lookup_and_decode_equal_the_dense_table(terms):
    embedding = KronEmbedding(11, 12, 4, terms=terms, dtype=torch.float64)
    table = sum(torch.kron(a, b) for a, b in zip(embedding.a, embedding.b, strict=True))
    ids = torch.tensor([[0, 10, 3], [3, 7, 1]])
    torch.testing.assert_close(embedding(ids), table[ids])
    assert embedding(torch.tensor(4)).shape == (12,)
    assert embedding(ids[:0]).shape == (0, 3, 12)
    with pytest.raises(IndexError):
        embedding(torch.tensor([11]))
    hidden, bias = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    torch.testing.assert_close(embedding.decode(hidden, bias), hidden @ table.T + bias)
    torch.testing.assert_close(embedding.decode(hidden), hidden @ table.T)


def test_neither_lookup_nor_decode_builds_the_table():
    embedding = KronEmbedding(1000, 64, 16)
    with LargestTensor() as seen:
        embedding.decode(embedding(torch.arange(5))).sum().backward()
    assert embedding.a.grad is not None
    # A and its gradient, 1000 x 4, against the table's 1000 x 64; logits are 5 x 1000
    assert seen.numel <= 5000


def test_padding_row_starts_at_zero_and_gets_no_gradient():
    embedding = KronEmbedding(9, 12, 4, terms=2, padding_idx=-9)
    assert embedding.padding_idx == 0
    assert torch.equal(embedding(torch.tensor([0])), torch.zeros(1, 12))
    with torch.no_grad():
        embedding.a[:, 0] = 1.0  # a loaded row need not be zero
    weight = torch.randn(4, 12)
    (embedding(torch.tensor([0, 2, 0, 5])) * weight).sum().backward()
    assert torch.equal(embedding.a.grad[:, 0], torch.zeros(2, 3))
    padded = embedding.b.grad.clone()
    embedding.zero_grad()
    (embedding(torch.tensor([2, 5])) * weight[[1, 3]]).sum().backward()
    torch.testing.assert_close(padded, embedding.b.grad)


def test_full_terms_reproduce_the_dense_embedding_both_ways():
    dense = nn.Embedding(10, 12, padding_idx=1)
    dense.weight.data[1] = 0.5
    embedding = KronEmbedding.from_embedding(dense, 4, terms=4)
    ids = torch.arange(10)
    torch.testing.assert_close(embedding(ids), dense(ids))
    back = embedding.to_embedding()
    torch.testing.assert_close(back.weight, dense.weight)
    assert back.padding_idx == embedding.padding_idx == 1


def test_copies_keep_values_and_a_tied_decoder_the_factors():
    embedding = KronEmbedding(10, 12, 4)
    assert repr(embedding) == "KronEmbedding(10, 12, factors=10x3 (x) 1x4, terms=1, compression=3.53x)"
    assert list(embedding.state_dict()) == ["a", "b"]
    ids = torch.arange(10)
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(ids), embedding(ids))
    decoder = embedding.tied_decoder(nn.Parameter(torch.randn(10)))
    assert decoder.a is embedding.a
    assert decoder.b is embedding.b
    hidden = torch.randn(3, 12)
    torch.testing.assert_close(decoder(hidden), embedding.decode(hidden, decoder.bias))
    assert embedding.bfloat16()(ids).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((10, 12, 5), "factor: expected a divisor of embedding_dim = 12, got 5"),
        ((10, 12, 4, 1, 10), "padding_idx: expected an index into 10 embeddings, got 10"),
        ((10, 12, 4, True), "terms: expected an integer of at least 1, got True"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        KronEmbedding(*arguments)
    with pytest.raises(ValueError, match="embedding: expected one without max_norm, scale_grad_by_freq and sparse"):
        KronEmbedding.from_embedding(nn.Embedding(10, 12, max_norm=1.0), 4)
