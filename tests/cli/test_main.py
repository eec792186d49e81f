"""The command line as a whole: help, examples, and what becomes of errors."""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from kron_kernels.cli import main
from kron_kernels.cli.main import COMMANDS, build_parser

Capture = pytest.CaptureFixture[str]


def test_no_arguments_print_the_help(capsys: Capture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    _, example = COMMANDS[name]
    assert example.split()[-1] in capsys.readouterr().out
    if example.startswith("kron-kernels"):
        assert build_parser().parse_args(shlex.split(example)[1:]).command == name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compress", "model"], "kron-kernels compress: error: the following arguments are required: out"),
        (
            ["compress", "m", "o"],
            "kron-kernels compress: error: one of the arguments --size --params --keep --preset --config is required",
        ),
        (["nonsense"], "kron-kernels: error: argument COMMAND: invalid choice: 'nonsense'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full: [Errno 28] No space left"),
        (SafetensorError("Error while\nserializing"), 2, "error: Error while serializing"),
        (MemoryError(), 2, "error: MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("kron_kernels.cli.env.collect", fails)
    assert main(["env"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"kron-kernels env: {line}")
    assert shown.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kron_kernels.cli.env.collect", lambda: {}["absent"])
    with pytest.raises(KeyError):
        main(["env"])


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "kron_kernels", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("kron-kernels "), done.stderr


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: Capture) -> None:
    folder, trace = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w').close()")
    for command in (
        ["compress", str(folder), str(tmp_path / "out"), "--preset", "K8"],
        ["evaluate", str(folder), "--task", "sst2", "--data", str(tmp_path)],
        ["export", str(folder), str(tmp_path / "out.pt2")],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not trace.exists()
