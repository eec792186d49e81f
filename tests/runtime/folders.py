"""Small random models in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from kron_kernels import models
from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import ShapeRule
from tests.models.bert_cases import SIZES

# Sums of two terms in attention; both orders of the factors' sizes.
KRON = KronConfig(
    {
        "attention": ShapeRule(b=(2, 2), terms=2),
        "ffn_in": ShapeRule(a=(8, 2)),
        "ffn_out": ShapeRule(a=(2, 8)),
        "embedding": ShapeRule(b=(1, 8)),
    }
)


def save_kron(folder: Path, kind: str = "KronBertModel", kron: KronConfig = KRON, **options: Any) -> Path:
    torch.manual_seed(0)
    model = getattr(models, kind)(models.KronBertConfig(kron=kron, **SIZES), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def save_dense(folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def batch(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Random inputs; the last column of the last row is padding where there is more than one."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[-1, 1:][-1:] = 0
    return {
        "input_ids": torch.randint(0, SIZES["vocab_size"], (rows, columns)),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (rows, columns)),
    }


def eager(folder: Path, inputs: dict[str, torch.Tensor], kind: str = "KronBertModel") -> dict[str, torch.Tensor]:
    """Outputs of the model in a folder, run by transformers."""
    family = transformers if kind.startswith("Bert") else models
    model = getattr(family, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        return dict(model(**inputs).items())


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], mask: torch.Tensor, tol=1e-4) -> None:
    """The same names, and values that agree at the positions that are not padding."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        actual = got[name]
        if value.shape[:2] == mask.shape:
            actual, value = actual[mask.bool()], value[mask.bool()]
        torch.testing.assert_close(actual, value, rtol=tol, atol=tol)
