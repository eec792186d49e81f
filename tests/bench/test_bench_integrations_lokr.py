"""The benchmark of LoKr adapters: its ways are right, a wrong one is found, its operations, rows and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import read_rows
from bench.integrations import lokr, lokr_ways, lokr_worker
from bench.integrations.lokr_ways import BASE, BYPASS, DENSE, OURS, PARTS, PEFT, WEIGHT, LokrCase, LokrProblem
from kron_kernels.testing.compare import compare

NEEDS = {PEFT: "peft", OURS: "peft", BYPASS: "lycoris", WEIGHT: "lycoris"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in PARTS.items() for name in names])
def test_every_way_is_right_before_it_is_timed(part: str, name: str, rank: int, backward: bool) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    problem = LokrProblem(LokrCase(64, 128, rank), 40, torch.float32, backward, part)
    way = problem.way(name)
    assert problem.error(way) < 1e-5
    for _ in range(3):
        problem.runner(way)()
    assert problem.error(way) < 1e-5 or part == "adapter", "given is written to"


def _steeper(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.001 * (tensor - tensor.detach())


@pytest.mark.parametrize("spoil", ["w1", "w2_a", "w2_b", "x", "output"])
def test_a_wrong_way_gets_no_time(spoil: str) -> None:
    problem = LokrProblem(LokrCase(64, 128, 2), 8, torch.float32, True, "layer")
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in problem.factors.items()}

    def wrong(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        # The same values, and a gradient of one of them that is a thousandth too large.
        parts = {name: _steeper(factor) if name == spoil else factor for name, factor in factors.items()}
        weight = torch.kron(parts["w1"], parts["w2_a"] @ parts["w2_b"])
        x = _steeper(x) if spoil == "x" else x
        return problem.base(x) + lokr_ways.SCALING * (1.001 if spoil == "output" else 1) * (x @ weight.T)

    found = compare(problem, [problem.way(DENSE), lokr_ways.LokrWay("wrong", wrong, factors)], seconds=0.001)
    assert [result.status for result in found] == ["ok", "wrong"]
    assert found[1].timing is None


def test_operations_and_what_they_allow() -> None:
    case = LokrCase(3072, 3072, 0)
    # 8 rows of 384 by the second factor, then 384 columns of 8 by the first.
    assert case.macs == 8 * 384 * (384 + 8)
    # 8 rows down to rank 16, 16 columns through the first factor, 8 rows up again.
    low = LokrCase(3072, 3072, 16)
    assert low.macs == 8 * 384 * 16 + 16 * 8 * 8 + 8 * 16 * 384
    assert lokr_ways.macs(case, "layer", PEFT, True) == 5 * 3072 * 3072
    assert lokr_ways.macs(case, "layer", OURS, True) == 2 * 3072 * 3072 + 3 * case.macs
    assert lokr_ways.macs(case, "layer", WEIGHT, False) == lokr_ways.macs(case, "layer", BASE, False) == 3072 * 3072
    assert lokr_ways.ceiling(case, "layer", True) == 2.5
    assert lokr_ways.ceiling(case, "layer", False) == 2
    assert lokr_ways.ceiling(low, "adapter", True) == 3072 * 3072 / low.macs


def test_a_child_gives_signs_of_life_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, signs = [0.0], []
    monkeypatch.setattr(lokr_worker.time, "monotonic", lambda: now[0])
    problem = LokrProblem(
        *(LokrCase(64, 128, 2), 8, torch.float32, False, "layer"),
        sign_of_life=lokr_worker._now_and_then(lambda: signs.append(now[0])),
    )
    run = problem.runner(problem.way(BASE))
    for now[0] in (1.0, 11.0, 12.0, 20.0, 22.0):
        run()
    assert signs == [11.0, 22.0]


def _measured(points: Any, names: Any, module: str, job: Any, store: Any, environment: Any) -> None:
    for point in points:
        for name in names:
            if job["kind"] == "memory":
                store(point, {"variant": name, "peak": {BASE: 2**20, PEFT: 2**23}.get(name, 2**21)})
            else:
                store(point, {"variant": name, "status": "ok", "over_peft_q50": 2.25})


def test_points_are_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lokr, "measure", _measured)
    options = ["--reach", "--layer", "64-128", "--rank", "2", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lokr", *options])
    lokr.main()
    rows = read_rows(tmp_path / "integrations-lokr.csv")
    assert len(rows) == 2 * sum(map(len, PARTS.values()))
    ours = next(row for row in rows if row["variant"] == OURS and row["part"] == "layer")
    expected = {"layer": "64-128", "adapter": "rank 2", "tokens": "4096", "direction": "forward+backward"}
    expected |= {"ceiling": "2.5", "peak_mib": "2", "adapter_mib": "1", "factors": "8x8 (x) 16x8", "status": "ok"}
    assert expected.items() <= ours.items()
    assert "| layer | ok | 2.25 | 2.5 |  | 2 | 8 |" in capsys.readouterr().out
    monkeypatch.setattr(lokr, "measure", lambda *_: pytest.fail("measured again"))
    lokr.main()


def test_what_has_a_reach_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lokr"])
    points = list(lokr.plan(lokr.parse()))
    assert len(points) == 3 * 2 * 2 * 2 * 2
    assert all((point.tokens, point.backward, point.dtype) == (4096, True, "fp32") for point in points[:12])
