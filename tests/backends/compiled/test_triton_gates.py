"""The gates of compiled kernels: real kernels pass, each kind of fault is found, results are written and compared."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from kron_kernels.backends.triton.offline import DEVICES, Report
from kron_kernels.backends.triton.ops import IMPLEMENTATIONS
from kron_kernels.backends.triton.problems import Problem, problems, record

from bench import triton_gates as gates
from bench.harness import read_rows
from kron_kernels.backends.triton import configs
from tests.backends.triton_matmul import matmul

GOOD = Report(registers=128, stack=0, shared=4096, wgmma=8, mma=0, local=0, stores={16: 8})


def small(problem: Problem, tile: int = 64, warps: int = 4) -> dict[str, object]:
    """Implementations of which kron_matmul is the product of the tests."""

    def kron_matmul(x: torch.Tensor, a: torch.Tensor, *_rest: object) -> torch.Tensor:
        return matmul(x, x.new_empty(tile, x.shape[1]), tile, warps)

    return {problem.op: kron_matmul}


def jobs_of(problem: Problem, chip: str = "sm_90", **options: int) -> list[gates.Job]:
    return list(gates.enumerate_jobs([problem], [chip], small(problem, **options)))


PROBLEM = Problem("k8-attention", "kron_matmul", "bf16", 4096)


# One shape of each kind of kernel, as trained and served most: compiled for Hopper, and once for the others.
@pytest.mark.parametrize(
    ("name", "op", "chip"),
    [
        ("k8-attention", "kron_matmul", "sm_90"),
        ("k8-attention", "kron_matmul_backward", "sm_90"),
        ("k8-w1", "kron_matmul", "sm_90"),
        ("k8-w2", "kron_matmul", "sm_90"),
        ("k21-attention", "kron_matmul", "sm_90"),
        ("balanced", "kron_matmul", "sm_90"),
        ("k8-attention", "kron_matmul", "sm_80"),
        ("k8-w1", "kron_matmul", "sm_100"),
        ("k8-w1", "kron_matmul", "gfx942"),
        ("k8-ffn", "kron_ffn", "sm_90"),
        ("k8-qkv", "kron_qkv", "sm_90"),
        ("k8-embedding", "kron_embedding", "sm_90"),
        ("k8-embedding", "kron_embedding_backward", "sm_90"),
        ("k21-embedding", "kron_embedding_backward", "sm_80"),
        ("k8-attention", "kron_matmul_norm", "sm_90"),
    ],
)
def test_shipped_tiles_pass(name: str, op: str, chip: str) -> None:
    if op not in IMPLEMENTATIONS:
        pytest.skip(f"{op} has no Triton kernel")
    jobs = list(gates.enumerate_jobs([Problem(name, op, "bf16", 4096)], [chip], IMPLEMENTATIONS))
    rows, failures = gates.check(jobs, gates.compile_jobs(jobs, 2), {})
    assert not failures
    assert len(rows) == len(jobs) > 0


def test_absurd_tiles_spill() -> None:
    tiles = {"tokens": 64, "columns": 256, "depth": 16, "num_warps": 4, "num_stages": 2}
    problem = Problem("k8-w2", "kron_matmul", "bf16", 4096)
    with configs.watching() as looked_up:
        record(problem, IMPLEMENTATIONS, DEVICES["sm_90"])
    with configs.overriding({looked_up[0].key: tiles}):
        jobs = list(gates.enumerate_jobs([problem], ["sm_90"], IMPLEMENTATIONS))
    _, failures = gates.check(jobs, gates.compile_jobs(jobs, 1), {})
    assert len(failures) == 1
    assert failures[0].startswith("k8-w2 kron_matmul bf16 T4096, launch 0 on sm_90: mm_kernel(S=1 CO=2 CI=8 ")
    assert "BN=256 BK=16), 4 warps, 2 stages: spills: " in failures[0]


def test_what_does_not_compile_is_a_failure() -> None:
    jobs = jobs_of(PROBLEM, tile=48)
    rows, failures = gates.check(jobs, gates.compile_jobs(jobs, 1), {})
    assert rows == []
    assert len(failures) == 1
    assert "launch 0 on sm_90: matmul_kernel(BT=48, BM=48, BK=64) with 4 warps and 3 stages does not" in failures[0]


def test_one_warp_leaves_warp_groups_unused() -> None:
    jobs = jobs_of(PROBLEM, warps=1)
    _, failures = gates.check(jobs, gates.compile_jobs(jobs, 1), {})
    assert len(failures) == 1
    assert failures[0].endswith(" HMMA) and none of warp groups")
    few = [job._replace(problem=Problem("k8-attention", "kron_matmul", "bf16", 128)) for job in jobs]
    assert gates.check(few, gates.compile_jobs(few, 1), {})[1] == []


@pytest.mark.parametrize(
    ("chip", "report", "message"),
    [
        ("sm_80", GOOD._replace(shared=163 * 1024 + 1), "166913 bytes of shared memory, the chip has 166912"),
        ("gfx942", GOOD._replace(shared=2**16 + 1), "65537 bytes of shared memory, the chip has 65536"),
        ("sm_100", GOOD._replace(stack=8), "spills: 8 bytes of stack, 0 loads and stores of local memory"),
        ("sm_80", GOOD._replace(local=2), "spills: 0 bytes of stack, 2 loads and stores of local memory"),
        ("sm_90", GOOD._replace(wgmma=0, mma=4), "products of single warps (4 HMMA) and none of warp groups"),
        ("gfx942", GOOD._replace(stack=8), None),
        ("sm_80", GOOD._replace(wgmma=0, mma=4), None),
        ("sm_90", GOOD, None),
    ],
)
def test_rules(chip: str, report: Report, message: str | None) -> None:
    assert list(gates.broken_rules(jobs_of(PROBLEM)[0]._replace(chip=chip), report)) == ([message] if message else [])


def test_regressions() -> None:
    job = jobs_of(PROBLEM)[0]
    before = gates.row_of(job, GOOD)
    assert list(gates.regressions(job, GOOD, before)) == []
    assert list(gates.regressions(job._replace(chip="gfx942"), GOOD._replace(stack=24), before)) == [
        "spills 24 bytes, 0 in the last results"
    ]
    assert list(gates.regressions(job, GOOD._replace(wgmma=0), before)) == [
        "no products of warp groups, 8 in the last results"
    ]
    spilt = {**before, "stack": "24"}
    _, failures = gates.check([job], [GOOD._replace(stack=24)], {gates.row_key(spilt): spilt})
    assert ["in the last results" in failure for failure in failures] == [False]


def test_equal_code_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_all(jobs: object, workers: int) -> list[Report]:
        compiled.extend(jobs)  # type: ignore[call-overload]
        return [GOOD._replace(registers=index) for index in range(len(compiled))]

    monkeypatch.setattr(gates, "compile_all", compile_all)
    other = Problem("k8-attention", "kron_matmul", "bf16", 300)
    both = [*jobs_of(PROBLEM), *jobs_of(other), *jobs_of(PROBLEM, "sm_80")]
    assert [report.registers for report in gates.compile_jobs(both, 1)] == [0, 0, 1]
    assert len(compiled) == 2


def test_results_are_written_once_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "IMPLEMENTATIONS", small(PROBLEM))
    command = ["triton_gates", "--name", "k8-attention", "--dtype", "bf16", "--chip", "sm_90", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--tokens", "4096", "--out", str(tmp_path)])
    path = tmp_path / "triton-kernels.csv"
    with pytest.raises(SystemExit, match="0"):
        gates.main()
    (row,) = read_rows(path)
    assert list(row) == [*gates.KEY, *gates.COLUMNS]
    assert row["kernel"] == "matmul_kernel"
    assert row["constants"] == "BT=64 BM=64 BK=64"
    assert int(row["wgmma"]) > 0
    assert row["stores"] == "4x16"
    # A row of another problem stays; one that was better is a failure, and the file stays as it is.
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([{**row, "stack": "-1"}, {**row, "problem": "other"}])
    before = path.read_text()
    with pytest.raises(SystemExit, match="1"):
        gates.main()
    assert path.read_text() == before
    path.write_text(before.replace(",-1,", ",0,"))
    with pytest.raises(SystemExit, match="0"):
        gates.main()
    assert [each["problem"] for each in read_rows(path)] == ["k8-attention", "other"]


def test_problems_cover_every_op() -> None:
    for op in IMPLEMENTATIONS:
        # Adding in place runs the kernel of adding.
        assert op == "kron_addmm_" or list(problems([op])), op
    listed = list(problems(IMPLEMENTATIONS))
    assert len(set(listed)) == len(listed)
