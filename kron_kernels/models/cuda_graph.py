"""A model's forward as one CUDA graph: small batches spend their time on starting kernels, and a graph starts once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP = 3


class CapturedModel:
    """A model's forward for one batch size and length, replayed.

    Called with ``input_ids (batch, length)`` and, where captured with ``padded``, ``attention_mask``; both as the model
    takes them, on any device. Returns the model's output of that call, in tensors that nothing writes to afterwards;
    ``copy=False`` returns those of the graph, which the next call overwrites.

    The graph reads the parameters where they were at the capture: changed in place, they hold; exchanged for others or
    moved, the model has to be captured again.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, padded: bool, record: Callable[..., Any]) -> None:
        device = _device(model)
        self.input_ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.token_type_ids = torch.zeros_like(self.input_ids)
        # A mask (batch, 1, length, length), which transformers takes as it is: making one reads the data, and a graph
        # cannot.
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device) if padded else None
        self._mask = mask
        given = {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "attention_mask": None if mask is None else mask.expand(-1, -1, length, -1),
        }
        self._replay, self._output = record(lambda: model(**given), device)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        copy: bool = True,
    ) -> Any:
        if attention_mask is not None and self._mask is None:
            raise ValueError("attention_mask: expected None, for the model was captured without padding, got a tensor")
        for name, given in (
            ("input_ids", input_ids),
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
        ):
            if given is not None and given.shape != self.input_ids.shape:
                raise ValueError(f"{name}: expected shape {tuple(self.input_ids.shape)}, got {tuple(given.shape)}")
        self.input_ids.copy_(input_ids)
        if self._mask is not None:
            if attention_mask is None:
                self._mask.fill_(True)
            else:
                self._mask.copy_(attention_mask.bool()[:, None, None, :])
        if token_type_ids is None:
            self.token_type_ids.zero_()
        else:
            self.token_type_ids.copy_(token_type_ids)
        self._replay()
        if not copy:
            return self._output
        return type(self._output)(**{name: _copied(value) for name, value in self._output.items()})


def capture(model: nn.Module, batch: int, length: int, *, padded: bool = False) -> CapturedModel:
    """Capture the forward of a BERT on a CUDA device for ``(batch, length)`` token ids; ``padded``: with a mask.

    Raises ValueError for a batch or length below 1, a length above the position table and a model in training mode,
    RuntimeError for a model that is not on a CUDA device.
    """
    for name, size in (("batch", batch), ("length", length)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    config: Any = model.config
    if length > config.max_position_embeddings:
        raise ValueError(
            f"length: expected at most {config.max_position_embeddings} (max_position_embeddings), got {length}"
        )
    if model.training:
        raise ValueError("model: expected a model in evaluation mode (model.eval()), got one in training mode")
    device = _device(model)
    if device.type != "cuda":
        raise RuntimeError(f"model: expected a model on a CUDA device to capture, got one on {device.type}")
    return CapturedModel(model, batch, length, padded, record)


@torch.no_grad()
def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """What replays ``run``, and the output it writes to. Runs before the capture compile kernels and fill caches."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
    return graph.replay, output


def _device(model: nn.Module) -> torch.device:
    return next(tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
