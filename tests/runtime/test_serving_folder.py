"""A compressed model's folder served as it is: the same outputs as transformers gives, and nothing of it imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kron_kernels.models import KronBertConfig, KronBertModel
from kron_kernels.runtime import load_package
from tests.runtime.serving_models import KRON, SIZES, documented, save_dense, save_kron


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_kron(tmp_path / "model")


def inputs(padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (4, 13), generator=generator)
    types = torch.randint(0, 2, (4, 13), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = mask[2, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_models(folder: Path, padded: bool, dtype: torch.dtype) -> None:
    model = KronBertModel.from_pretrained(folder, dtype=dtype).eval()
    model.save_pretrained(folder)
    given = inputs(padded)
    with torch.inference_mode():
        expected = model(**given)
    package = load_package(folder)
    assert (package.info.format, package.info.dtype) == ("folder", "fp32" if dtype is torch.float32 else "bf16")
    outputs = package(**given)
    real = given["attention_mask"].bool()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(outputs["last_hidden_state"][real], expected.last_hidden_state[real], **close)
    torch.testing.assert_close(outputs["pooler_output"], expected.pooler_output, **close)


def test_the_page_serves_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_kron(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    given = inputs()
    names = {"ids": given["input_ids"], "mask": given["attention_mask"]}
    exec(documented("The folder itself"), names)
    assert names["hidden"].shape == (4, 13, 48)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations_and_no_pooler(tmp_path: Path, activation: str) -> None:
    model = KronBertModel(KronBertConfig(kron=KRON, hidden_act=activation, **SIZES), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    given = inputs(padded=False)
    package = load_package(tmp_path)
    assert package.info.outputs == ("last_hidden_state",)
    with torch.inference_mode():
        torch.testing.assert_close(package(**given)["last_hidden_state"], model(**given).last_hidden_state)


def test_a_row_of_padding_is_finite_and_touches_no_other(folder: Path) -> None:
    package, given = load_package(folder), inputs()
    whole = package(**given)["last_hidden_state"]
    given["attention_mask"][3] = 0
    outputs = package(**given)["last_hidden_state"]
    assert outputs.isfinite().all()
    torch.testing.assert_close(outputs[:3], whole[:3])


def test_transformers_is_not_imported(folder: Path) -> None:
    code = (
        "import sys, torch\nfrom kron_kernels.runtime import load_package\n"
        f"out = load_package({str(folder)!r})(input_ids=torch.tensor([[2, 7, 9]]))\n"
        "assert out['last_hidden_state'].shape == (1, 3, 48)\n"
        "assert 'transformers' not in sys.modules\nassert 'torch._inductor' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_it_cannot_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"architectures: expected \['KronBertModel'\], got \['BertModel'\]; kron-kern"
    ):
        load_package(save_dense(tmp_path / "dense"))
    for name, value, message in (
        ("is_decoder", True, "is_decoder: expected False, got True"),
        ("hidden_act", "tanh", "hidden_act: expected one of gelu, .*, got 'tanh'"),
        ("kron", {"weight_dtype": "int8"}, "kron.weight_dtype: expected None, got int8"),
    ):
        before = json.loads((folder / "config.json").read_text())
        change_config(folder, **{name: value})
        with pytest.raises(ValueError, match=message):
            load_package(folder)
        change_config(folder, **{name: before[name]})
    load_package(folder)


def test_damaged_folders_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if "layer.1.output.dense.a" not in name}, weights)
    with pytest.raises(OSError, match=r"every layer factored, the checkpoint lacks 'encoder.layer.1.output.dense.a'"):
        load_package(folder)
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(OSError, match="damaged checkpoint"):
        load_package(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors in .*, got none"):
        load_package(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match="damaged configuration"):
        load_package(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a model folder, with config.json, got"):
        load_package(folder)
