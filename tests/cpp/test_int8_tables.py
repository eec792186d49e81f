"""The script behind the tables of docs/int8.md, on small models."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from kron_kernels.models import KronBertConfig, KronBertModel
from scripts.int8_tables import FORMS, agreement_table, file_bytes, in_form, size_table

SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}


def test_sizes_are_those_of_the_files() -> None:
    model = KronBertModel(KronBertConfig(kron="K8", **SIZES)).eval()
    headers, rows = size_table({"K8": model})
    assert headers == ["large factors", "the rest", "K8, MB"]
    assert [tuple(row[:2]) for row in rows] == list(FORMS)
    sizes = [file_bytes(in_form(model, *form)) for form in FORMS]
    assert [row[2] for row in rows] == [f"{size / 1e6:.2f}" for size in sizes]
    full, half, int8, both = sizes
    assert full > half > both
    assert full > int8 > both
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert tensors < full < tensors + 10_000  # the head of the file names and places the tensors


def test_the_copy_is_changed_and_not_the_model() -> None:
    model = KronBertModel(KronBertConfig(kron="K8", **SIZES)).eval()
    other = in_form(model, "int8", "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in other.parameters()} == {torch.bfloat16}
    assert other.embeddings.word_embeddings.a_int8.dtype is torch.int8


def test_agreement_with_float32(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(50)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertModel(transformers.BertConfig(initializer_range=0.2, **SIZES)).save_pretrained(tmp_path)
    sentences = [" ".join(words[i : i + 5]) for i in range(20)]
    _, rows = agreement_table(tmp_path, sentences)
    assert [row[0] for row in rows] == ["K8"] * 3 + ["K21"] * 3
    assert all(0 <= float(row[4]) < 0.5 for row in rows)
    assert any(float(row[4]) > 0 for row in rows)
