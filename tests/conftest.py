"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from kron_kernels import backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense BERT checkpoint with its tokenizer."""
    from tests.compress.tiny_bert import save_bert

    return save_bert(tmp_path_factory.mktemp("dense") / "bert")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sentences that its tokenizer knows."""
    from tests.compress.tiny_bert import SENTENCES

    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    return path


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction-set level of the CPU kernels that a test is parametrised with."""
    if backends.available()["cpu"].available:
        backends.set_cpu_isa(request.param)
    yield request.param
    if backends.available()["cpu"].available:
        backends.set_cpu_isa("amx")
