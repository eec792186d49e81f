"""The command ``kron-kernels env``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kron_kernels import __version__, backends
from kron_kernels.cli import env, main


def test_shows_machine_backends_and_passing_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for name, status in backends.available().items():
        table = shown[shown.index("\nbackend ") :]
        line = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1] == ("on" if status.available else "off")
        assert status.reason in line
    assert "WRONG" not in shown


def test_json_holds_the_same_without_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from kron_kernels.cli import main\n"
        "sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["correct"] is True
    assert report["machine"]["kron_kernels"] == __version__
    assert report["machine"]["cores"] >= 1
    assert report["backends"]["reference"]["available"] is True
    assert {check["dtype"] for check in report["checks"]} == {"float64", "float32", "float16", "bfloat16"}
    assert all(check["error"] <= check["tolerance"] for check in report["checks"])


@pytest.mark.parametrize("damage", [1.001, float("nan")])
def test_exits_with_1_when_a_kernel_is_wrong(
    damage: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = env.kron_matmul
    monkeypatch.setattr(env, "kron_matmul", lambda *args, **kwargs: right(*args, **kwargs) * damage)
    assert main(["env"]) == 1
    assert "WRONG" in capsys.readouterr().out
