"""What a capture gathers: the very tensors the modules compute, by every way a BERT may compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, BertModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.distill.hidden_states import Captured, capture, encoder_of
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel, bert_layers, blocks, fuse_

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[5, 9, 2, 30, 7, 11], [8, 3, 40, 1, 0, 0], [4, 0, 0, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def kronified() -> nn.Module:
    model = BertModel(BertConfig(**SIZES))
    kronify_(model, "K8")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: BertModel(BertConfig(**SIZES)),
    "dense with a head": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "kronified": kronified,
    "kronified and fused": lambda: fuse_(kronified()),
    "KronBert": lambda: KronBertModel(KronBertConfig(**SIZES)),
    "KronBert with a head": lambda: KronBertForMaskedLM(KronBertConfig(**SIZES)),
}
models = pytest.mark.parametrize("kind", MODELS)


def plain_record(model: nn.Module, ffn_at: str = "layer") -> Captured:
    """The same tensors by hooks on a copy whose layers are transformers' own."""
    plain = {fused: theirs for theirs, fused in bert_layers._FUSED.items()}
    bert: Any = encoder_of(copy.deepcopy(model))
    bert._forward_pre_hooks.clear()
    for module in bert.modules():
        module.__class__ = plain.get(type(module), type(module))
    found: dict[str, list[Tensor]] = {"embedding": [], "queries": [], "keys": [], "ffn": []}

    def keep(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, args, output: found[name].append(output))

    keep(bert.embeddings, "embedding")
    for layer in bert.encoder.layer:
        keep(layer.attention.self.query, "queries")
        keep(layer.attention.self.key, "keys")
        keep(layer if ffn_at == "layer" else layer.output.dense, "ffn")
    bert(**INPUTS)
    return Captured(found["embedding"][0], tuple(found["queries"]), tuple(found["keys"]), tuple(found["ffn"]))


def flat(captured: Captured) -> list[Tensor]:
    assert captured.embedding is not None
    return [captured.embedding, *captured.queries, *captured.keys, *captured.ffn]


@models
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ffn_at", ["layer", "dense"])
def test_capture_gathers_what_the_modules_compute(kind: str, training: bool, ffn_at: str) -> None:
    model = MODELS[kind]().train(training)
    with capture(model, ffn_at=ffn_at) as tape, torch.set_grad_enabled(training):
        model(**INPUTS)
        captured = tape.take()
    expected = plain_record(model, ffn_at)
    assert [len(each) for each in captured[1:]] == [3, 3, 3]
    for one, right in zip(flat(captured), flat(expected), strict=True):
        assert one.shape == (3, 6, 48)  # padding included, in inference too
        assert one.requires_grad == training
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


@models
def test_gradients_flow_through_what_was_captured(kind: str) -> None:
    model = MODELS[kind]().train()

    def gradients(captured: Captured) -> list[Tensor]:
        bert: Any = encoder_of(model)
        first = bert.encoder.layer[0]
        weights = [bert.embeddings.LayerNorm.weight, first.attention.self.query.bias, first.intermediate.dense.bias]
        return list(torch.autograd.grad(sum(each.square().sum() for each in flat(captured)), weights))

    with capture(model) as tape:
        model(**INPUTS)
        found = gradients(tape.take())
    found_by_hooks = []
    for module in encoder_of(model).encoder.layer:  # every layer by itself, and its inputs and outputs by hand
        for each in (module, module.attention.self.query, module.attention.self.key):
            found_by_hooks.append(each.register_forward_hook(lambda module, args, output: kept.append(output)))
    kept: list[Tensor] = []
    encoder_of(model).embeddings.register_forward_hook(lambda module, args, output: kept.append(output))
    model.config.padding_free = False
    model(**INPUTS)
    expected = gradients(Captured(kept[0], tuple(kept[1:])))
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-3)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_inside_distributed_data_parallel() -> None:
    model = KronBertModel(KronBertConfig(**SIZES), add_pooling_layer=False).train()
    with capture(DistributedDataParallel(model)) as tape:
        model(**INPUTS)
        captured = tape.take()
    for one, right in zip(flat(captured), flat(plain_record(model)), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


def test_the_fused_ops_stay_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("kron_embedding", "kron_qkv", "kron_matmul_norm", "kron_ffn"):
        module = bert_layers if name == "kron_embedding" else blocks
        op = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _op=op, _name=name, **k: (calls.append(_name), _op(*args, **k))[1]
        )
    model = KronBertModel(KronBertConfig(**SIZES)).eval()
    with capture(model), torch.no_grad():
        model(**INPUTS)
    assert calls == ["kron_embedding", *["kron_matmul_norm", "kron_ffn"] * 3]
    calls.clear()
    with capture(model, scores=False), torch.no_grad():
        model(**INPUTS)
    assert calls == ["kron_embedding", *["kron_qkv", "kron_matmul_norm", "kron_ffn"] * 3]


def test_padding_is_left_out_again_after_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KronBertModel(KronBertConfig(**SIZES)).eval()
    seen: list[torch.Size] = []
    ids = torch.zeros(8, 20, dtype=torch.long)
    ids[:, 0] = 5
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        with capture(model) as tape:
            model(**inputs)
            assert tape.take().ffn[2].shape == (8, 20, 48)
        model(**inputs)
    assert [each[:2] for each in seen] == [(8, 20), (1, 8)]


def test_only_what_is_asked_for_is_kept() -> None:
    model = KronBertModel(KronBertConfig(**SIZES))
    for wanted in ("embedding", "scores", "ffn"):
        options = {name: name == wanted for name in ("embedding", "scores", "ffn")}
        with capture(model, **options) as tape:
            model(**INPUTS)
            captured = tape.take()
        assert (captured.embedding is not None) == (wanted == "embedding")
        assert len(captured.queries) == len(captured.keys) == (3 if wanted == "scores" else 0)
        assert len(captured.ffn) == (3 if wanted == "ffn" else 0)


def test_take_is_of_the_last_forward_and_empties_the_tape() -> None:
    model = BertModel(BertConfig(**SIZES)).eval()
    message = "take: expected a forward of the captured model since the last take, got none"
    with capture(model) as tape:
        with pytest.raises(RuntimeError, match=message):
            tape.take()
        model(IDS)
        last = model(IDS[:1]).last_hidden_state
        captured = tape.take()
        assert torch.equal(captured.ffn[-1], last)
        assert [len(each) for each in captured[1:]] == [3, 3, 3]
        with pytest.raises(RuntimeError, match=message):
            tape.take()
        with pytest.raises(IndexError):  # half a forward is none
            model(torch.tensor([[50]]))
        with pytest.raises(RuntimeError, match=message):
            tape.take()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("kind", ["dense", "KronBert"])
def test_gradient_checkpointing_without_reentrance_gives_the_same(kind: str) -> None:
    model: Any = MODELS[kind]().train()

    def run() -> list[Tensor]:
        with capture(model) as tape:
            model(**INPUTS)
            captured = tape.take()
            loss = sum(each.square().sum() for each in flat(captured))
            found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
            assert [len(each) for each in captured[1:]] == [3, 3, 3]
            # Layers that run once more in the backward pass are no forward.
            model(**INPUTS).last_hidden_state.sum().backward()
            assert [len(each) for each in tape.take()[1:]] == [3, 3, 3]
        return [each for each in found if each is not None]

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, right)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_reentrant_gradient_checkpointing_is_an_error() -> None:
    model: Any = MODELS["KronBert"]().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with capture(model), pytest.raises(RuntimeError, match="gradient checkpointing: expected use_reentrant=False"):
        model(**INPUTS)


def test_models_that_cannot_be_captured() -> None:
    with (
        pytest.raises(TypeError, match=r"model: expected a BertModel .*, got Linear with 0 of them"),
        capture(nn.Linear(2, 2)),
    ):
        pass
    two = nn.ModuleList([MODELS["dense"](), MODELS["dense"]()])
    with pytest.raises(TypeError, match="got ModuleList with 2 of them"), capture(two):
        pass
    decoder = BertModel(BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(ValueError, match="model: expected an encoder, got a decoder"), capture(decoder):
        pass
    model = MODELS["KronBert"]()
    with (
        pytest.raises(ValueError, match="ffn_at: expected 'layer' or 'dense', got 'output'"),
        capture(model, ffn_at="output"),
    ):
        pass
    with (
        capture(model),
        pytest.raises(ValueError, match="model: expected one that is not captured already"),
        capture(model),
    ):
        pass
    model = BertModel(BertConfig(**SIZES, chunk_size_feed_forward=2))
    with pytest.raises(ValueError, match=r"got 'dense' with chunk_size_feed_forward=2"), capture(model, ffn_at="dense"):
        pass
