"""The benchmark of GPT-2's layers and text: all ways compute the same, wrong ones are found, and its rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from bench.integrations import gpt2, gpt2_worker
from bench.integrations.gpt2_ways import (
    CASES,
    DENSE,
    LAYER_WAYS,
    OURS,
    TermsProblem,
    TextProblem,
    einsum_b_first,
    layer_way,
)
from bench.worker import result_row
from kron_kernels.convert.presets import preset
from kron_kernels.testing.compare import compare
from kron_kernels.testing.problem import Candidate


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", LAYER_WAYS)
def test_every_way_to_compute_a_layer_is_right(name: str, backward: bool) -> None:
    problem = TermsProblem(CASES["smoke"], 5, backward)
    assert problem.error(layer_way(problem, name)) < 1e-5


def test_a_layer_that_is_wrong_is_not_timed() -> None:
    problem = TermsProblem(CASES["smoke"], 5, False)
    ours = layer_way(problem, OURS)
    one_term = Candidate("one term", lambda x, a, b, bias, _: einsum_b_first(x, a[:1], b[:1], bias), ours.prepare, None)
    results = compare(problem, [layer_way(problem, DENSE), one_term], seconds=0.01)
    assert [result.status for result in results] == ["ok", "wrong"]


def test_cases_are_the_presets_layers() -> None:
    sizes = {"c_attn": ("attention", 2304, 768), "attn-c_proj": ("attention", 768, 768)}
    sizes |= {"c_fc": ("ffn_in", 3072, 768), "c_proj": ("ffn_out", 768, 3072)}
    presets = {"kngpt2": preset("KnGPT2"), "tqcompressor": preset("TQCompressor")}
    for name, case in CASES.items():
        if name != "smoke":
            owner, _, layer = name.partition("-")
            role, rows, columns = sizes[layer]
            rule = presets[owner].rules[role]
            assert (case.a, case.b) == rule.resolve(rows, columns)
            assert case.terms == rule.terms


@pytest.mark.parametrize("name", gpt2.TEXT_WAYS)
def test_models_that_write_text_are_right(name: str) -> None:
    problem = TextProblem(8, 3, **gpt2.SMOKE_SIZES)
    way = problem.way(name)
    assert problem.error(way) < problem.tolerance(way)
    assert problem.runner(way)().shape == (1, 11)
    with torch.no_grad():
        way.model.transformer.ln_f.weight[0] += torch.nan
    assert not problem.error(way) < problem.tolerance(way)


def test_rows_say_what_was_measured() -> None:
    points = gpt2.all_points(["tqcompressor-c_fc", gpt2.TEXT])
    assert [tuple(point.key().values())[1:] for point in points] == [
        *(("forward", tokens) for tokens in (1, 128, 1024)),
        ("forward+backward", 1024),
        ("generation", 32),
    ]
    problem = TermsProblem(CASES["smoke"], 3, False)
    results = compare(problem, [layer_way(problem, name) for name in LAYER_WAYS], seconds=0.01, over=gpt2_worker.OVER)
    row = points[0].complete(result_row(results[-1], "ms", gpt2_worker.OVER))
    assert row["factors"] == "4 of 768x384 (x) 4x2"
    assert row["macs"] == 4 * (768 * 384 * 2 + 768 * 2 * 4)
    assert row["saving"] == pytest.approx(0.99, abs=0.01)
    assert {"time_ms_q50", "over_b_first_q50", "over_a_first_q90"} <= set(row)
    assert set(row) <= {*gpt2.KEY, *gpt2.COLUMNS}
    assert points[-1].complete({"variant": DENSE, "time_ms_q50": 500.0})["tokens_per_second"] == 64
