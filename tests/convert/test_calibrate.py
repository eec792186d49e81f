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


def test_model_is_left_as_it_was() -> None:
    model = Attention().train()
    model.query.eval()
    calibrate(model, token_batches())
    with pytest.raises(IndexError):
        calibrate(model, [{"input_ids": torch.full((2, 4), 99)}])
    assert model.training
    assert model.dropout.training
    assert not model.query.training
    assert not any(module._forward_pre_hooks for module in model.modules())


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
        (None, {"modules": ["querry"]}, ValueError, "modules: 'querry' is no module of the model; is it 'query'?"),
        (None, {"modules": "query"}, TypeError, "modules: expected a sequence of names, got the string 'query'"),
        (None, {"modules": ["unused"]}, ValueError, "modules: unused did not run"),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 1, 4)}],
            {},
            ValueError,
            r"attention_mask: expected a tensor \(B, L\), got shape \(2, 1, 1, 4\)",
        ),
    ],
)
def test_bad_input(batches: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(Attention(), token_batches() if batches is None else batches, **arguments)


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="batches: the inputs of 0 hold NaN or inf"):
        calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.full((2, 4), torch.nan)])
    with pytest.raises(ValueError, match=r"model: expected at least one nn\.Linear, got none"):
        calibrate(nn.Tanh(), [torch.ones(2, 4)])
