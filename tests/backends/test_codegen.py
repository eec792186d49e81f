"""The code-generation checks and the tuner: launches compiled for GPUs that are not there, and each kind of fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tools import check_codegen

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, object] = {
    "op": "kron_matmul", "problem": "k8-w1", "dtype": "bf16", "tokens": 4096, "launch": 0, "chip": "sm_90",
    "kernel": "matmul_kernel", "registers": 128, "stack": 0, "shared": 4096, "wgmma": 8, "mma": 0, "local": 0,
    "stores": "8x16", "compiler": "3",
}  # fmt: skip
CUDA = {**GOOD, "kernel": "kron_kernel", "arch": "sm_90a", "tma": 2}


def run(code: str, tmp_path: Path) -> str:
    """Output of Python that compiles: in a process of its own, since Triton interprets or compiles in one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_shipped_tiles_pass_and_bad_ones_do_not(tmp_path: Path) -> None:
    """Against the record in bench/results, for sm_80 and sm_90."""
    code = """
from tools import check_codegen
from tools.compiled import *
assert check_codegen.main("triton --op kron_matmul --name k8-w1".split()) == 0
device = CHIPS["sm_90"]
launch = record(Problem("kron_matmul", "k8-w2", "bf16", 4096), device)[0]
names = launch.kernel.arg_names[-len(launch.constants):]
def changed(**constants): return tuple(constants.get(n, v) for n, v in zip(names, launch.constants))
spills = launch._replace(constants=changed(BT=64, BN=256, BK=16), options=type(launch.options)(4, 2))
assert compile_launch(spills, device).stack > 0
(error,) = compile_all([(launch._replace(constants=changed(BN=48)), device)])
assert "does not compile for 90" in str(error), error
backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
bind = triton.runtime.jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
_, kinds, _ = bind(*launch.arguments, *launch.constants)
signature, _, attributes = specialise(launch, amd=False)
assert list(signature.values()) == [kind for kind, _ in kinds]  # as Triton's own launches are
for index, (kind, value) in enumerate(kinds[:len(launch.arguments)]):
    assert kind == "constexpr" or attributes.get((index,), []) == backend.parse_attr(value or "")
print("passed")
"""
    assert run(code, tmp_path).endswith("passed\n")


@pytest.mark.parametrize(
    ("kernels", "change", "message"),
    [
        ("triton", {}, None),
        ("triton", {"stack": 8}, "spills 8 bytes"),
        ("triton", {"shared": 2**18}, "262144 bytes of shared memory, more than 232448"),
        ("triton", {"wgmma": 0, "mma": 4}, "4 HMMA and no HGMMA instructions"),
        ("triton", {"registers": 129}, "129 registers, on record 128"),
        ("cuda", {}, None),
        ("cuda", {"tma": 0}, "8 HGMMA and 0 TMA instructions"),
        ("cuda", {"kernel": "other"}, "not on record"),
    ],
    ids=str,
)
def test_each_kind_of_fault_is_found(kernels: str, change: dict[str, object], message: str | None) -> None:
    good = GOOD if kernels == "triton" else CUDA
    recorded = {tuple(str(good[name]) for name in check_codegen.KEYS[kernels]): good}
    found = list(check_codegen.problems_of(kernels, [{**good, **change}], recorded))
    assert (message in found[0] and len(found) == 1) if message else not found


@pytest.mark.slow
def test_tuner_keeps_the_fastest_tiles_that_are_right(tmp_path: Path) -> None:
    code = """
import json
from tools import tune_triton
from tools.compiled import *
from kron_kernels.backends.triton import tuned
problem, device = Problem("kron_matmul", "k8-w1", "bf16", 4096), CHIPS["sm_90"]
operands = problem.operands("meta")
with tuned.watching() as found, recording(device):
    problem.run(operands)
look_up = found[0]
tune_triton.compile_all = lambda jobs: [Report(9, 0, 9, 1, 0, 0, "") for _ in jobs]
def seconds(launches):
    tiles = dict(zip(launches[0].kernel.arg_names[-3:], launches[0].constants[-3:]))
    return 1 / tiles["BN"] + sum(launches[0].options)
tune_triton.is_right = lambda *_: tuned._overrides[look_up.key]["num_stages"] > 1
print(json.dumps([look_up.default._asdict(), tune_triton.search(look_up, problem, operands, device, seconds)]))
"""
    default, entry = json.loads(run(code, tmp_path))
    assert (entry["tiles"]["num_warps"], entry["tiles"]["num_stages"]) == (4, 2)
    assert entry["tiles"]["columns"] == 2 * default["columns"]
    assert entry["us"] < entry["default_us"]
