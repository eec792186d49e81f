"""What a distillation compares inside a BERT, gathered while the model runs: embedding, queries, keys, FFN outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel

FFN_PLACES = ("layer", "dense")


class Captured(NamedTuple):
    """What one forward computed, every tensor ``(batch, length, hidden)``, with its place in the autograd graph.

    ``queries``, ``keys`` and ``ffn`` hold one tensor a layer, in the order of the layers; what was not asked for is
    None or empty.
    """

    embedding: Tensor | None
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    ffn: tuple[Tensor, ...] = ()


def encoder_of(model: nn.Module) -> BertModel:
    """The one BertModel in ``model``, whatever is around it: a head, DistributedDataParallel, torch.compile.

    Raises TypeError where there is none, or more than one.
    """
    encoders = [module for module in model.modules() if isinstance(module, BertModel)]
    if len(encoders) != 1:
        raise TypeError(
            f"model: expected a BertModel of transformers or a model around one, got {type(model).__name__} with "
            f"{len(encoders)} of them"
        )
    return encoders[0]


class Tape:
    """What the last forward of a captured model left; made by :func:`capture`."""

    def __init__(self) -> None:
        self._embedding: Tensor | None = None
        self._lists: dict[str, list[Tensor]] = {"queries": [], "keys": [], "ffn": []}
        self._running = self._complete = False
        self._grad_enabled = True

    def take(self) -> Captured:
        """What the last forward computed; the tape is empty after it, so that nothing is held longer than needed.

        Raises RuntimeError where no forward has run to its end since the last ``take``.
        """
        if not self._complete:
            raise RuntimeError("take: expected a forward of the captured model since the last take, got none")
        taken = Captured(self._embedding, **{name: tuple(each) for name, each in self._lists.items()})
        self._clear()
        return taken

    def _clear(self) -> None:
        self._complete = False
        self._embedding = None
        for each in self._lists.values():
            each.clear()

    def _start(self, *_: Any) -> None:
        self._clear()
        self._running, self._grad_enabled = True, torch.is_grad_enabled()

    def _stop(self, *_: Any) -> None:
        self._running, self._complete = False, True

    def _embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._running:
            self._embedding = output

    def _keep(self, name: str, tensor: Tensor) -> None:
        # Gradient checkpointing runs layers once more in the backward pass: that is not a forward of the model.
        if not self._running:
            return
        if torch.is_grad_enabled() != self._grad_enabled:
            raise RuntimeError(
                "gradient checkpointing: expected use_reentrant=False while a model is captured, got the reentrant "
                "form, which computes layers without a graph: no gradient would reach the student"
            )
        self._lists[name].append(tensor)

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: self._keep(name, output)


@contextmanager
def capture(
    model: nn.Module, *, embedding: bool = True, scores: bool = True, ffn: bool = True, ffn_at: str = "layer"
) -> Iterator[Tape]:
    """Gather what each forward of ``model`` computes inside, for as long as the context lasts.

    ``model`` is a BertModel of transformers, KronBert, or either with a head, with fused layers or without, also inside
    DistributedDataParallel. Student and teacher are captured each by a context of its own. Fused layers project
    queries, keys and values one by one meanwhile and are as fused as ever in the rest, with the exception below.
    Sequences are computed with their padding (``fuse_`` leaves it out otherwise, in inference), so that positions of
    student and teacher are the same. Non-reentrant gradient checkpointing works.

    Args:
        model: what will run.
        embedding: keep the output of the embeddings, after norm and dropout.
        scores: keep queries and keys as they are projected, bias included, of every layer.
        ffn: keep the output of every feed-forward block.
        ffn_at: "layer" for a layer's output, after residual, dropout and norm: the hidden state of TinyBERT; "dense"
            for that of the second matrix alone. Fused layers then compute their FFN one matrix at a time.

    Yields:
        The :class:`Tape`; ``take`` it after each forward.

    Raises:
        TypeError: no BertModel in ``model``, or several.
        ValueError: a decoder, a model that is being captured already, an unknown ``ffn_at``, or "dense" where the
            feed-forward blocks are computed in chunks.
        RuntimeError: in the forward, with reentrant gradient checkpointing.
    """
    if ffn_at not in FFN_PLACES:
        raise ValueError(f"ffn_at: expected 'layer' or 'dense', got {ffn_at!r}")
    bert: Any = encoder_of(model)
    if bert.config.is_decoder:
        raise ValueError("model: expected an encoder, got a decoder")
    if "takes_packing" in vars(bert.encoder):
        raise ValueError("model: expected one that is not captured already, got one inside another capture")
    if ffn and ffn_at == "dense" and bert.config.chunk_size_feed_forward:
        raise ValueError(
            "ffn_at: expected 'layer' where the feed-forward blocks are computed in chunks, got 'dense' with "
            f"chunk_size_feed_forward={bert.config.chunk_size_feed_forward}"
        )
    tape = Tape()
    with ExitStack() as undo:

        def hook(module: nn.Module, function: Callable[..., None]) -> None:
            undo.callback(module.register_forward_hook(function).remove)

        undo.callback(bert.register_forward_pre_hook(tape._start).remove)
        hook(bert, tape._stop)
        # A class attribute of fused encoders; no part of the configuration, which may be saved meanwhile.
        bert.encoder.takes_packing = False
        undo.callback(delattr, bert.encoder, "takes_packing")
        if embedding:
            hook(bert.embeddings, tape._embedded)
        for layer in bert.encoder.layer:
            if scores:
                # In training these layers take as long one by one as in the joint op, which hooks keep them from.
                hook(layer.attention.self.query, tape._keeper("queries"))
                hook(layer.attention.self.key, tape._keeper("keys"))
            if ffn:
                hook(layer if ffn_at == "layer" else layer.output.dense, tape._keeper("ffn"))
        yield tape
