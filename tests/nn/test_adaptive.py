"""AdaptiveEmbedding: equal to the dense table of its bands in every use, its fit, its resizing, its tied decoder."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kron_kernels.nn import AdaptiveEmbedding, TiedDecoder, fit_adaptive

BANDS = ((3, 6), (5, 4), (4, 1))
IDS = torch.tensor([[0, 11, 3], [3, 7, 1]])


def shuffled(bands=BANDS, dim: int = 6, **options) -> AdaptiveEmbedding:
    """Return an embedding whose means differ and whose tokens are in no order."""
    size = sum(tokens for tokens, _ in bands)
    embedding = AdaptiveEmbedding(size, dim, bands, **options)
    with torch.no_grad():
        embedding.means.normal_()
        embedding.places.copy_(torch.randperm(size))
    return embedding


def by_definition(embedding: AdaptiveEmbedding) -> Tensor:
    rows = [
        table[row] @ projection + mean
        for table, projection, mean in zip(embedding.tables, embedding.projections, embedding.means, strict=True)
        for row in range(len(table))
    ]
    return torch.stack([rows[place] for place in embedding.places.tolist()])


@pytest.mark.parametrize("bands", [BANDS, ((12, 2),)])
def test_lookup_and_decode_equal_the_dense_table(bands) -> None:
    embedding = shuffled(bands, dtype=torch.float64)
    table = by_definition(embedding)
    assert (embedding.bands, embedding.dtype) == (bands, torch.float64)
    torch.testing.assert_close(embedding.dense_weight(), table)
    torch.testing.assert_close(embedding(IDS), table[IDS])
    torch.testing.assert_close(embedding(IDS.int()), table[IDS])
    assert embedding(torch.tensor(4)).shape == (6,)
    assert embedding(IDS[:0]).shape == (0, 3, 6)
    torch.testing.assert_close(embedding.to_embedding()(IDS), table[IDS])
    hidden, bias = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(embedding.decode(hidden, bias), hidden @ table.T + bias)
    torch.testing.assert_close(embedding.decode(hidden), hidden @ table.T)
    for index in (12, -1):
        with pytest.raises(IndexError, match=rf"ids: expected indices in \[0, 12\), got {index}"):
            embedding(torch.tensor([[2, index]]))


def test_gradients_are_those_of_the_dense_table() -> None:
    embedding = shuffled(((2, 3), (3, 1)), 3, dtype=torch.float64)
    names, leaves = zip(*embedding.named_parameters(), strict=True)
    hidden, ids = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2, 0])

    def call(hidden: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, values, strict=True))
        rows = torch.func.functional_call(embedding, given, ids)
        decoder = nn.Module()
        decoder.embedding, decoder.forward = embedding, embedding.decode
        return rows, torch.func.functional_call(decoder, {f"embedding.{name}": given[name] for name in given}, hidden)

    assert torch.autograd.gradcheck(call, (hidden, *leaves), check_forward_ad=True)


def test_transforms_map_and_differentiate_it() -> None:
    embedding = shuffled(padding_idx=3)
    torch.testing.assert_close(torch.func.vmap(embedding)(IDS), embedding(IDS))
    parameters = dict(embedding.named_parameters())
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, tangent = torch.func.jvp(
        lambda values: torch.func.functional_call(embedding, values, IDS), (parameters,), (directions,)
    )
    epsilon = 1e-3
    with torch.no_grad():
        moved = {name: value + epsilon * directions[name] for name, value in parameters.items()}
        difference = (torch.func.functional_call(embedding, moved, IDS) - embedding(IDS)) / epsilon
    difference[IDS == 3] = 0  # a padding row has no gradient
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=2e-2)


def test_padding_row_starts_at_zero_and_gets_no_gradient() -> None:
    embedding = AdaptiveEmbedding(12, 6, BANDS, padding_idx=-8)
    assert embedding.padding_idx == 4
    assert torch.equal(embedding(torch.tensor(4)), torch.zeros(6))
    assert embedding(torch.arange(12)).any(-1).sum() == 11
    embedding.means.data.normal_()  # a loaded row need not be zero
    parameters = list(embedding.parameters())
    padded, plain = (
        torch.autograd.grad((embedding(ids) ** 2).sum(), parameters)
        for ids in (torch.tensor([4, 2, 4, 9]), torch.tensor([2, 9]))
    )
    torch.testing.assert_close(padded, plain)


def test_initial_rows_have_the_deviation_asked_for() -> None:
    embedding = AdaptiveEmbedding(3000, 32, ((1000, 16), (2000, 4)))
    embedding.reset_parameters(0.2)
    rows = embedding.dense_weight()
    for band in (rows[:1000], rows[1000:]):
        torch.testing.assert_close(band.std(), torch.tensor(0.2), rtol=0.2, atol=0)


def test_state_dict_copies_and_moves() -> None:
    embedding = shuffled()
    assert list(embedding.state_dict()) == [
        *("means", "places", "tables.0", "tables.1", "tables.2"),
        *("projections.0", "projections.1", "projections.2"),
    ]
    assert embedding.places.dtype is torch.int16
    assert AdaptiveEmbedding(2**15 + 1, 2, ((2**15 + 1, 1),), device="meta").places.dtype is torch.int32
    assert "  12, 6, padding_idx=None, bands=3x6, 5x4, 4x1\n" in repr(embedding)
    fresh = AdaptiveEmbedding(12, 6, BANDS)
    fresh.load_state_dict(embedding.state_dict())
    for other in (fresh, copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(IDS), embedding(IDS))
    assert embedding.bfloat16()(IDS).dtype is torch.bfloat16
    assert embedding.places.dtype is torch.int16


def test_a_tied_decoder_reads_the_embedding_through_copies_and_pickles() -> None:
    model = nn.ModuleDict({"words": shuffled()})
    model["head"] = model["words"].tied_decoder(nn.Parameter(torch.randn(12)))
    assert type(model["head"]) is TiedDecoder
    assert [name for name in model.state_dict() if name.startswith("head")] == ["head.bias"]
    hidden = torch.randn(2, 6)
    wanted = model["head"](hidden)
    torch.testing.assert_close(wanted, F.linear(hidden, by_definition(model["words"]), model["head"].bias))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other["head"](hidden), wanted)
        assert other["head"].embedding is other["words"]
        other["words"].means.data.add_(1)
        assert not torch.equal(other["head"](hidden), wanted)
    assert torch.equal(model["head"](hidden), wanted)
    assert model.double()["head"](hidden.double()).dtype is torch.float64


@pytest.mark.slow
@pytest.mark.compile
def test_compiles_once_for_every_number_of_tokens() -> None:
    embedding = shuffled(padding_idx=0)
    decoder = embedding.tied_decoder()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(ids: Tensor) -> Tensor:
        return decoder(embedding(ids))

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 8, 17):
            ids = torch.randint(0, 12, (2, tokens))
            got, wanted = compiled(ids), decoder(embedding(ids))
            torch.testing.assert_close(got, wanted)
            leaves = list(embedding.parameters())
            torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), leaves) for each in (got, wanted)))


def test_fit_is_exact_at_full_rank_and_weighs_frequent_tokens() -> None:
    dense = nn.Embedding(60, 8, padding_idx=0).eval()
    exact, error = fit_adaptive(dense, ((20, 8), (40, 8)))
    assert error < 1e-5
    assert (exact.padding_idx, exact.training) == (0, False)
    torch.testing.assert_close(exact.dense_weight(), dense.weight)
    assert torch.equal(exact.places.long(), torch.arange(60))  # without counts by id
    counts = torch.zeros(60, dtype=torch.long)
    counts[40:50] = torch.arange(1000, 1010)
    layer, error = fit_adaptive(dense, ((10, 8), (50, 2)), counts)
    assert layer.places[40:50].tolist() == list(range(9, -1, -1))
    assert layer.places[:3].tolist() == [10, 11, 12]  # tokens that were not seen keep their order
    torch.testing.assert_close(layer.dense_weight()[40:50], dense.weight[40:50])
    weights = (counts + 0.3).double().sqrt()
    tables = layer.dense_weight() - dense.weight, dense.weight
    lost, whole = (weights @ table.double().square().sum(1) for table in tables)
    assert error == pytest.approx(float(lost / whole) ** 0.5)
    flat, _ = fit_adaptive(dense, ((60, 2),))
    skewed, _ = fit_adaptive(dense, ((60, 2),), counts)
    seen = [(each.dense_weight() - dense.weight)[40:50].norm() for each in (skewed, flat)]
    assert seen[0] < 0.9 * seen[1]
    assert fit_adaptive(nn.Embedding(20, 8, dtype=torch.bfloat16), ((20, 3),))[0].dtype is torch.bfloat16


@pytest.mark.parametrize("size", [9, 12, 17])
def test_resizing_keeps_the_tokens_that_stay(size: int) -> None:
    embedding = shuffled(padding_idx=10)
    embedding.places.copy_(torch.tensor([11, 0, 10, 1, 9, 2, 8, 3, 7, 4, 6, 5]))
    before = embedding.dense_weight()
    new = embedding.resized(size)
    kept = min(size, 12)
    torch.testing.assert_close(new.dense_weight()[:kept], before[:kept])
    torch.testing.assert_close(new.dense_weight()[kept:], embedding.means[-1:].expand(size - kept, 6))
    assert (new.num_embeddings, new.padding_idx) == (size, 10 if size > 10 else None)
    assert sum(tokens for tokens, _ in new.bands) == size
    assert new.means.requires_grad
    assert embedding.dense_weight().shape == (12, 6)
    assert not embedding.requires_grad_(False).resized(size).means.requires_grad


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: AdaptiveEmbedding(12, 6, ((3, 6),)),
            r"bands: expected positive counts that sum to 12, got \[\(3",
        ),
        (lambda: AdaptiveEmbedding(3, 6, ((3, 6), (0, 1))), "bands: expected positive counts that sum to 3"),
        (
            lambda: AdaptiveEmbedding(3, 6, ((3, 7),)),
            r"bands: expected ranks from 1 to embedding_dim = 6, got",
        ),
        (lambda: AdaptiveEmbedding(3, 6, ((3, 2),), 3), "padding_idx: expected an index into 3 embeddings, got 3"),
        (lambda: fit_adaptive(nn.Embedding(9, 6, max_norm=1.0), ((9, 2),)), "embedding: expected one without max_norm"),
        (
            lambda: fit_adaptive(nn.Embedding(9, 6), ((9, 2),), torch.ones(8)),
            r"counts: expected shape \(9,\), got \(8",
        ),
        (lambda: AdaptiveEmbedding(5, 6, ((2, 2), (3, 1))).resized(2), "bands: expected positive counts that sum to 2"),
    ],
)
def test_bad_input(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
