"""The tokenizer of the tests of tokenized data."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from tests.distill import distill_runs


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(distill_runs.save_bert(tmp_path_factory.mktemp("words") / "bert"))
