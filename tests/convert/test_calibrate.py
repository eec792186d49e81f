"""Calibration: moments of the right tokens, once for shared inputs, the model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kron_kernels.convert.calibrate import calibrate


class Attention(nn.Module):
    """Three layers fed one tensor, one fed their sum: the layer inputs of an encoder block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, 4)
        self.unused = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.dropout(self.embed(input_ids))
        return self.output(self.query(hidden) + self.key(hidden) + self.value(input=hidden))


def token_batches() -> list[dict[str, Tensor]]:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    return [
        {"input_ids": torch.randint(11, (2, 4)), "attention_mask": mask},
        {"input_ids": torch.randint(11, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)},
    ]


def test_moment_and_mean_of_unpadded_tokens() -> None:
    model, batches = Attention(), token_batches()
    calibration = calibrate(model, batches)
    rows = torch.cat([model.embed(b["input_ids"])[b["attention_mask"].bool()] for b in batches]).detach()
    assert len(rows) == 4 + 15
    torch.testing.assert_close(calibration["query"], rows.T @ rows / len(rows))
    torch.testing.assert_close(calibration.input_mean["query"], rows.mean(0))
    inner = sum(layer(rows) for layer in (model.query, model.key, model.value)).detach()
    torch.testing.assert_close(calibration["output"], inner.T @ inner / len(rows))
    assert calibration.tokens == dict.fromkeys(("query", "key", "value", "output"), 19)


def test_layers_with_one_input_share_one_moment() -> None:
    calibration = calibrate(Attention(), token_batches())
    assert list(calibration) == ["query", "key", "value", "output"]
    assert calibration["query"] is calibration["key"] is calibration["value"]
    assert calibration["output"] is not calibration["query"]


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            self.first(x)
            return self.second(x.mul_(2))

    calibration = calibrate(InPlace(), [torch.randn(9, 4)])
    torch.testing.assert_close(calibration["second"], 4 * calibration["first"])


def test_a_layer_that_runs_several_times_counts_every_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.other(x)
            return self.layer(x) + self.layer(y)

    x, y = torch.randn(5, 4), torch.randn(5, 4)
    calibration = calibrate(Twice(), [(x, y)])
    both = torch.cat([x, y])
    torch.testing.assert_close(calibration["layer"], both.T @ both / 10)
    torch.testing.assert_close(calibration["other"], x.T @ x / 5)


@pytest.mark.parametrize("shape", [(2, 4, 3), (8, 3)])
def test_mask_applies_to_stacked_and_flattened_tokens(shape: tuple[int, ...]) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pooled = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.pooled(self.layer(x.reshape(shape)).reshape(2, 4, 3)[:, 0])

    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    calibration = calibrate(Flat(), [{"x": x, "attention_mask": mask}])
    kept = x[mask.bool()]
    torch.testing.assert_close(calibration["layer"], kept.T @ kept / 5)
    assert calibration.tokens["pooled"] == 2


def test_low_precision_inputs_are_summed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kron_kernels.convert.input_moments._CHUNK_ROWS", 100)
    model, x = nn.Linear(4, 4).bfloat16(), (torch.randn(3000, 4) + 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        calibration = calibrate(model, [x])
    exact = x.double().T @ x.double() / 3000
    torch.testing.assert_close(calibration[""].double(), exact, rtol=1e-4, atol=0)


def test_real_encoder_groups_its_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=20
    )
    calibration = calibrate(transformers.BertModel(config), token_batches_for(20))
    assert len(calibration) == 2 * 6 + 1
    assert len({id(moment) for moment in calibration.values()}) == 2 * 4 + 1
    assert calibration["encoder.layer.1.output.dense"].shape == (12, 12)
    assert calibration.tokens["encoder.layer.1.output.dense"] == 4
    assert calibration.tokens["pooler.dense"] == 2


def token_batches_for(vocab: int) -> list[dict[str, Tensor]]:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    return [{"input_ids": torch.randint(vocab, (2, 4)), "attention_mask": mask}]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_model_is_left_as_it_was() -> None:
    model = Attention().train()
    model.query.eval()
    calibrate(model, token_batches())
    assert model.training
    assert model.dropout.training
    assert not model.query.training
    assert hooks_of(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = Attention().train()
    with pytest.raises(IndexError):
        calibrate(model, [{"input_ids": torch.full((2, 4), 99)}])
    assert model.training
    assert hooks_of(model) == 0


def test_inputs_shared_in_the_first_batch_only() -> None:
    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x if len(x) == 1 else x + 1)

    with pytest.raises(RuntimeError, match="first and second share their inputs in the first batch but not in a later"):
        calibrate(Switching(), [torch.ones(1, 4), torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("batches", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "batches: expected at least one batch, got none"),
        (["text"], {}, ValueError, "batches: expected mappings, tuples or tensors, got str"),
        (None, {"modules": ["querry"]}, ValueError, "modules: 'querry' is no module of the model; is it 'query'?"),
        (None, {"modules": "query"}, TypeError, "modules: expected a sequence of names, got the string 'query'"),
        (None, {"modules": ["unused"]}, ValueError, "modules: unused did not run"),
        (
            None,
            {"modules": ["embed"]},
            ValueError,
            r"modules: embed must take floating-point rows \(..., n\), got torch.int64",
        ),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 1, 4)}],
            {},
            ValueError,
            r"attention_mask: expected a tensor \(B, L\), got shape \(2, 1, 1, 4\)",
        ),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}],
            {},
            ValueError,
            "batches: attention_mask leaves no token for query",
        ),
    ],
)
def test_bad_input(batches: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(Attention(), token_batches() if batches is None else batches, **arguments)


def test_inputs_that_are_not_finite_or_change_width() -> None:
    with pytest.raises(ValueError, match="batches: the inputs of 0 hold NaN or inf"):
        calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.full((2, 4), torch.nan)])
    with pytest.raises(ValueError, match="modules: 0 takes inputs 4 wide and 5 wide"):
        calibrate(nn.Sequential(nn.Tanh()), [torch.ones(2, 4), torch.ones(2, 5)], ["0"])
    with pytest.raises(ValueError, match=r"model: expected at least one nn\.Linear, got none"):
        calibrate(nn.Tanh(), [torch.ones(2, 4)])
