"""Write ONNX models: the ops of kron_kernels as operations that ONNX has.

Each product is a reshape and two MatMuls a term, in the order that takes fewer operations; no Kronecker product of
factors is ever built.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..schemas import reference
from ..schemas.pack import reject_packed
from ..schemas.product import stacks
from ..schemas.registry import ACTIVATION_CODES
from .package import HASH_KEY, HASH_PLACEHOLDER, INFO_KEY, INPUTS, PackageInfo, require, write_onnx_hash

_ACTIVATIONS = {code: reference.ACTIVATIONS[name] if name else None for name, code in ACTIVATION_CODES.items()}


def kron_matmul(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int = 0, packed: Tensor | None = None
) -> Tensor:
    """The product as MatMuls. The larger factor stands on the right, where one GEMM takes the rows of all tokens.

    Where that is A, the grid of a token is transposed on the way in and out, since ``Y^T = B X^T A^T``: as a MatMul of
    A with every token's narrow matrix the same product was measured ten times slower in onnxruntime.
    """
    reject_packed(packed)
    a, b = stacks(a, b)
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    grid = x.reshape(*x.shape[:-1], n1, n2)
    right_first = not reference.a_first(a, b)
    left, right = a, b
    swapped = m1 * n1 > m2 * n2
    if swapped:
        grid, left, right, right_first = grid.transpose(-1, -2), b, a, not right_first

    def term(index: int) -> Tensor:
        tiny, large = left[index], right[index].transpose(0, 1)
        return tiny @ (grid @ large) if right_first else (tiny @ grid) @ large

    y = reduce(torch.add, map(term, range(terms)))
    y = (y.transpose(-1, -2) if swapped else y).reshape(*x.shape[:-1], m1 * m2)
    if bias is not None:
        y = y + bias
    function = _ACTIVATIONS[activation]
    return y if function is None else function(y)


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    packed: Tensor | None = None,
) -> Tensor:
    return reference.add_norm(kron_matmul(x, a, b, bias, 0, packed), residual, norm_weight, norm_bias, eps)


def kron_ffn(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    activation: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    packed1: Tensor | None = None,
    packed2: Tensor | None = None,
) -> Tensor:
    y = kron_matmul(kron_matmul(x, a1, b1, bias1, activation, packed1), a2, b2, bias2, 0, packed2)
    return (
        y if residual is None or norm_weight is None else reference.add_norm(y, residual, norm_weight, norm_bias, eps)
    )


def kron_qkv(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    reject_packed(*packed)
    biases: Sequence[Tensor | None] = bias or [None] * len(a)
    return [kron_matmul(x, left, right, one) for left, right, one in zip(a, b, biases, strict=True)]


def kron_embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    # (..., p, 1) * (1, k) -> (..., p * k)
    rows = (F.embedding(ids, a[index]).unsqueeze(-1) * b[index] for index in range(a.shape[0]))
    y = reduce(torch.add, rows).flatten(-2)
    if type_ids is not None and type_weight is not None:
        y = y + F.embedding(type_ids, type_weight)
    if position_ids is not None and position_weight is not None:
        y = y + F.embedding(position_ids, position_weight)
    return y if norm_weight is None else F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)


DECOMPOSITIONS: dict[Any, Any] = {
    getattr(torch.ops.kron_kernels, form.__name__).default: form
    for form in (kron_matmul, kron_matmul_norm, kron_ffn, kron_qkv, kron_embedding)
}


def write_onnx(program: torch.export.ExportedProgram, info: PackageInfo, path: Path) -> dict[str, int]:
    """Write the program as one ONNX file and return the number of its nodes by kind.

    Raises RuntimeError where a package that the exporter needs is missing.
    """
    require("onnx", "the format onnx")
    optimizer = require("onnxscript.optimizer", "the format onnx")
    axes = {0: "batch", 1: "sequence"}
    with _quiet_exporter():
        onnx_program = torch.onnx.export(
            program.run_decompositions(DECOMPOSITIONS),
            dynamo=True,
            optimize=False,
            verbose=False,
            output_names=list(info.outputs),
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
        )
    assert onnx_program is not None
    model = onnx_program.model

    def may_fold(node: Any) -> bool | None:
        # A table over the vocabulary, which the embedding reads as it is and a decoder transposed, would be stored
        # twice; onnxruntime transposes it when it loads the model.
        shapes = [value.shape for value in node.inputs if value is not None and value.shape is not None]
        return False if any(info.vocabulary in shape for shape in shapes) else None

    # Factors of any size are brought into the form that MatMul takes.
    optimizer.optimize_ir(model, input_size_limit=2**40, output_size_limit=2**40, should_fold=may_fold)
    # The exporter notes where each value came from, with file paths, in more bytes than a small model has.
    results: list[Any] = [item for node in model.graph for item in (node, *node.outputs)]
    for item in (model.graph, *results, *model.graph.inputs, *model.graph.initializers.values()):
        item.metadata_props.clear()
    model.metadata_props[INFO_KEY] = info.to_json()
    model.metadata_props[HASH_KEY] = HASH_PLACEHOLDER
    onnx_program.save(path)
    write_onnx_hash(path)
    return dict(Counter(node.op_type for node in model.graph).most_common())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's deprecation warnings and its notes on missing packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
