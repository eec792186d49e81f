"""TiedDecoder: the output layer of an embedding that cannot share its parameters one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TiedDecoder(nn.Module):
    """Output layer over the vocabulary, ``hidden @ table^T + bias``, by the ``decode`` of a factored embedding.

    ``hidden`` is ``(..., embedding_dim)``, the result ``(..., num_embeddings)``. The table stays the embedding's: the
    state dict here holds the bias, if there is one.
    """

    embedding: Any

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # Not as a submodule: the model has the embedding elsewhere.
        vars(self)["embedding"] = embedding
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.embedding.decode(hidden, self.bias)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, {self.embedding.extra_repr()}"
