"""What compress may write to: nothing of the user's is replaced, and that is known before the work begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kron_kernels.compress.target import REPORT_NAME, check_target


def compressed(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / REPORT_NAME).write_text("{}")
    return folder


def test_only_compressed_models_are_replaced_and_only_when_told(tmp_path: Path) -> None:
    assert check_target(tmp_path / "new" / "out", False) == tmp_path / "new" / "out"
    ours = compressed(tmp_path / "ours")
    other = tmp_path / "by-config"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "kron_bert"}))
    for folder in (ours, other):
        assert check_target(folder, True) == folder
        with pytest.raises(FileExistsError, match="exists; pass --force"):
            check_target(folder, False)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").touch()
    for name, text in ((None, ""), ("config.json", '{"model_type": "bert"}'), ("config.json", "{")):
        if name:
            (thesis / name).write_text(text)
        with pytest.raises(FileExistsError, match="holds something else than a compressed model"):
            check_target(thesis, True)


def test_files_and_links_are_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(compressed(tmp_path / "ours"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="expected a folder, got the file"):
        check_target(tmp_path / "file", True)
    with pytest.raises(NotADirectoryError, match=r"expected a folder around .*, got the file"):
        check_target(tmp_path / "file" / "out", True)
    for name in ("link", "dangling"):
        with pytest.raises(FileExistsError, match=f"got the link .*{name}"):
            check_target(tmp_path / name, True)


def test_what_is_needed_is_not_replaced(tmp_path: Path) -> None:
    out, model = compressed(tmp_path / "out"), tmp_path / "model"
    model.mkdir()
    (out / "blob").touch()
    check_target(out, True, [model])
    (model / "model.safetensors").symlink_to(out / "blob")
    for needed in (out / "blob", model):  # itself in the folder, or by a link in it
        with pytest.raises(ValueError, match=r"out: .*out holds .*, which is needed"):
            check_target(out, True, [needed])
