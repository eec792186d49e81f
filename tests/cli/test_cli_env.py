"""`kron-kernels env`, and what the command line does with errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kron_kernels import __version__, backends
from kron_kernels.cli import env, main


def test_env_shows_machine_backends_and_passing_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for name, status in backends.available().items():
        assert name in shown
        assert status.reason in shown
    assert "WRONG" not in shown


def test_env_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["correct"] is True
    assert report["machine"]["kron_kernels"] == __version__
    assert report["machine"]["cores"] >= 1
    assert report["backends"]["reference"]["available"] is True
    assert {check["dtype"] for check in report["checks"]} == {"float64", "float32", "float16", "bfloat16"}
    assert all(check["error"] <= check["tolerance"] for check in report["checks"])


@pytest.mark.parametrize("damage", [1.001, float("nan")])
def test_env_exits_with_1_when_a_kernel_is_wrong(
    damage: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = env.kron_matmul
    monkeypatch.setattr(env, "kron_matmul", lambda *args, **kwargs: right(*args, **kwargs) * damage)
    assert main(["env"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "kron-kernels: error: the following arguments are required: "
            "{env,explain,compress,distill,evaluate,report,export,bench,cmake-dir}",
        ),
        (["compress", "model"], "kron-kernels compress: error: the following arguments are required: out"),
        (["compress", "m", "o"], "kron-kernels compress: error: one of the arguments --preset --config is required"),
        (
            ["bench", "layers", "--tokens", "0"],
            "argument --tokens: expected positive integers separated by commas, got '0'",
        ),
        (
            ["bench", "layers", "--tokens", "a"],
            "argument --tokens: expected positive integers separated by commas, got 'a'",
        ),
        (["bench", "layers", "--seconds", "-1"], "argument --seconds: expected a positive number of seconds, got '-1'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_runs_as_a_module_without_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from kron_kernels.cli import main\n"
        "sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["correct"]
