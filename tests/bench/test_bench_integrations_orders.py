"""The benchmark of the search for orders: its cases, what it writes, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from bench.harness import read_rows
from bench.integrations import orders
from bench.report_integrations import orders_parts
from kron_kernels.factorize import nearest_kronecker


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, str]]:
    monkeypatch.setattr("sys.argv", ["orders", "--smoke", "--rounds", "2", "--out", str(tmp_path), *options])
    orders.main()
    return read_rows(tmp_path / "integrations-orders.csv")


def test_made_weights_are_what_they_are_called() -> None:
    weight = orders.MADE["rank 8 and 10 % noise"][0]()
    noise = torch.linalg.svdvals(weight)[8:].square().sum().sqrt() / weight.norm()
    assert noise == pytest.approx(0.1, abs=0.02)
    assert all(torch.equal(make(), make()) and make().shape == (192, 96) for make, _ in orders.MADE.values())


def test_rows_have_less_error_after_than_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path / "tiny"
    model = BertModel(BertConfig(vocab_size=30, **sizes))
    model.save_pretrained(folder)
    rows = run(tmp_path, monkeypatch, "--model", str(folder))
    assert [row["count"] for row in rows] == ["1", "1", "1", "4", "4"]
    assert all(0 < float(row["after"]) < float(row["before"]) < 1 for row in rows)
    for row, terms in zip(rows[3:], (4, 1), strict=True):
        fits = [nearest_kronecker(layer.intermediate.dense.weight, (8, 8), terms) for layer in model.encoder.layer]
        fits += [nearest_kronecker(layer.output.dense.weight, (8, 8), terms) for layer in model.encoder.layer]
        assert float(row["before"]) == pytest.approx(sum(fit.relative_error for fit in fits) / 4, abs=1e-3)
    # Measured by this commit already: nothing is done again.
    monkeypatch.setattr(orders, "search_permutations", None)
    assert run(tmp_path, monkeypatch, "--model", str(folder)) == rows
    (title, table) = orders_parts(rows)
    assert "mean relative error" in title
    assert f"| normal, 192×96 | 1 of 48x48 ⊗ 4x2 | 1 | 2 | {float(rows[0]['before']):.3f} |" in table
    assert orders_parts([]) == []


def test_without_time_nothing_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="the budget is spent after 0 of 3 jobs"):
        run(tmp_path, monkeypatch, "--budget", "0")
