"""Dense checkpoints: what is missing, damaged or not supported is named, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from kron_kernels.compress.checkpoint import load_dense, load_tokenizer, looks_local
from tests.compress.tiny_bert import SIZES


def test_missing_folders_fail_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    for path in (tmp_path / "absent", "zoo/absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint folder .* nothing there"):
            load_dense(path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it"):
        load_dense(tmp_path / "zoo")
    assert not looks_local("google-bert/bert-base-uncased")


def change_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04nothing of a checkpoint")


def drop_a_weight(folder: Path) -> None:
    model = transformers.BertModel.from_pretrained(folder)
    state = model.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(folder, state_dict=state)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, OSError, "the weights in .* are damaged"),
        (pickle, OSError, "the weights in .* are damaged"),
        (drop_a_weight, OSError, "lacks 1 weights, among them encoder.layer.1.output.dense.weight"),
        (lambda folder: (folder / "config.json").write_text("{"), OSError, "damaged or unknown config.json"),
        (change_config(intermediate_size=48), OSError, "the weights in .* do not fit config.json"),
        (change_config(num_hidden_layers=10**7), ValueError, "at most 1000 layers, config.json asks for 10000000"),
        (change_config(hidden_size=2**62), ValueError, "at most 1e.11 parameters, config.json asks for"),
        (change_config(model_type="kron_bert", kron="K8"), ValueError, "is compressed already"),
    ],
    ids=str,
)
def test_damaged_checkpoints(damage: Any, error: type[Exception], message: str, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    damage(tmp_path / "bert")
    with pytest.raises(error, match=message):
        load_dense(tmp_path / "bert")


def test_other_architectures_and_damaged_tokenizers(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(vocab_size=20, **SIZES)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match=r"expected a BERT checkpoint .* RobertaModel of type 'roberta'"):
        load_dense(tmp_path / "roberta")
    (tmp_path / "roberta" / "tokenizer.json").write_text("{")
    with pytest.raises(OSError, match="has no tokenizer that loads"):
        load_tokenizer(tmp_path / "roberta")
