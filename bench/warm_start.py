"""How close compressed encoders start to the dense one, before any distillation; results to warm-start.csv.

python -m bench.warm_start --model path/to/bert --text sentences.txt --pairs sts-dev.tsv

Each start is fitted, and trained where it is, on the first lines of the text and judged on its last ones: the relative
output error of the linear layers by role, on the dense model's inputs; the mean cosine of sentence embeddings (mean of
the last hidden states, centred) with the dense model's; the spread of the last hidden state's error. ``--pairs`` is a
TSV file with columns sentence1, sentence2 and score: Spearman's correlation of cosines with scores, times 100.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from bench.harness import Budget, ResultFile, add_run_options, stamp
from kron_kernels.cli.output import Progress
from kron_kernels.compress import ARCHITECTURES, linear_names, load_dense, read_lines, tokenize, warm_start
from kron_kernels.convert.agreement import output_errors
from kron_kernels.convert.calibrate import Calibration, calibrate
from kron_kernels.convert.presets import KronConfig, preset

KEY = ("model", "preset", "start", "quantity")
COLUMNS = ("value", "seconds", "text", "lines", "steps")
Quantities = dict[str, float]
Moments = Callable[[KronConfig], Calibration]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    file = ResultFile(arguments.out / "warm-start.csv", KEY, COLUMNS)
    judge = Judge(arguments)
    budget = Budget(arguments.budget)
    progress = Progress(every_seconds=0)
    jobs = [(name, start) for name in ("dense", *arguments.preset) for start in STARTS if name != "dense"]
    judge_dense = {"model": arguments.model.name, "preset": "dense", "start": "dense"}
    rows = [{**judge_dense, "quantity": name, "value": value, **current} for name, value in judge.of_dense().items()]
    file.add(rows)
    for done, (name, start) in enumerate(jobs):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        key = {"model": arguments.model.name, "preset": name, "start": start}
        progress(done, len(jobs), f"{name}, {start}")
        if start in arguments.skip or file.has({**key, "quantity": "agreement"}, current):
            continue
        began = time.perf_counter()
        model = STARTS[start](judge, preset(name), arguments.steps)
        facts = {"seconds": time.perf_counter() - began, "text": arguments.text.name, "lines": arguments.lines}
        facts["steps"] = arguments.steps if "blockwise" in start else 0
        values = judge.of(model)
        file.add([{**key, "quantity": name, "value": value, **facts, **current} for name, value in values.items()])
    progress(len(jobs), len(jobs), f"done: {file.path}")


class Judge:
    """A dense encoder, text to fit on, and what compressed ones are measured by."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dense = load_dense(arguments.model)
        self.kind = ARCHITECTURES[type(self.dense).__name__]
        self._tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        lines = read_lines(arguments.text, 10**9)
        if len(lines) < arguments.lines + arguments.held_out:
            raise SystemExit(f"text: expected {arguments.lines} + {arguments.held_out} lines, got {len(lines)}")
        self.batches = tokenize(self._tokenizer, lines[: arguments.lines])
        self._held_out = lines[-arguments.held_out :]
        self._embedded = self._embed(self.dense, self._held_out)
        self._pairs = None if arguments.pairs is None else read_pairs(arguments.pairs, arguments.most_pairs)
        names = [name for name, module in self.dense.named_modules() if isinstance(module, torch.nn.Linear)]
        names = [name for name in names if "encoder.layer." in name]
        self._moments = calibrate(self.dense, tokenize(self._tokenizer, self._held_out), names)
        self.calibration = calibrate(self.dense, self.batches, linear_names(self.dense, preset("K8")))

    def of_dense(self) -> Quantities:
        return {} if self._pairs is None else {"spearman": self._spearman(self.dense)}

    def of(self, model: Any) -> Quantities:
        """Each quantity's name and value."""
        values = {}
        errors = output_errors(self.dense, model, self._moments)
        config = preset("K8")  # its patterns are everyone's
        for role in ("attention", "ffn_in", "ffn_out"):
            found = [error for name, error in errors.items() if config.role_of(name) == role]
            values[f"output error, {role}"] = sum(found) / len(found)
        embedded = self._embed(model, self._held_out)
        centred = [each - each.mean(0) for each in (self._embedded, embedded)]
        values["agreement"] = float(F.cosine_similarity(*centred).mean())
        values.update(self._state_errors(model))
        if self._pairs is not None:
            values["spearman"] = self._spearman(model)
        return values

    @torch.inference_mode()
    def _state_errors(self, model: Any) -> Quantities:
        """Relative errors of the embeddings, of the last hidden states and of all layers' mean."""
        lost: Any = 0.0
        energy: Any = 0.0
        for batch in tokenize(self._tokenizer, self._held_out):
            real = batch["attention_mask"].bool()
            wanted, got = (
                torch.stack([each[real] for each in encoder(**batch, output_hidden_states=True).hidden_states])
                for encoder in (self.dense.base_model, model.base_model)
            )
            lost = lost + (got - wanted).square().sum((1, 2))
            energy = energy + (wanted - wanted.mean(1, keepdim=True)).square().sum((1, 2))
        errors = (lost / energy).sqrt()
        return {
            "state error, embeddings": float(errors[0]),
            "state error, layers": float(errors[1:].mean()),
            "state error, last": float(errors[-1]),
        }

    @torch.inference_mode()
    def _embed(self, model: Any, sentences: list[str]) -> Tensor:
        """Mean of each sentence's last hidden states, (sentences, d), in the order of ``tokenize``."""
        rows = []
        for batch in tokenize(self._tokenizer, sentences):
            states = model.base_model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(states)
            rows.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(rows)

    def _spearman(self, model: Any) -> float:
        assert self._pairs is not None
        left, right, scores = self._pairs
        both = [*left, *right]
        # ``tokenize`` sorts by length, in order among equals.
        order = sorted(range(len(both)), key=lambda index: len(both[index]))
        embedded = self._embed(model, both)
        placed = torch.empty_like(embedded)
        placed[torch.tensor(order)] = embedded
        cosines = F.cosine_similarity(placed[: len(left)], placed[len(left) :])
        ranks = torch.stack([_ranks(cosines), _ranks(torch.tensor(scores))])
        return 100 * float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, fp64; equal values share their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def read_pairs(path: Path, most: int) -> tuple[list[str], list[str], list[float]]:
    """The first ``most`` pairs of sentences of a TSV file, and their scores."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:most]
    return [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], [float(row["score"]) for row in rows]


def _fitted(judge: Judge, config: KronConfig) -> Any:
    return judge.kind.from_dense(judge.dense, config, calibration=judge.calibration)


def _trained(judge: Judge, model: Any, steps: int) -> Any:
    warm_start(judge.dense, model, judge.batches, steps=steps, progress=Progress())
    return model


def _two_terms(config: KronConfig) -> KronConfig:
    rules = {
        role: rule if role == "embedding" else dataclasses.replace(rule, terms=2) for role, rule in config.rules.items()
    }
    return dataclasses.replace(config, rules=rules)


STARTS: dict[str, Callable[[Judge, KronConfig, int], Any]] = {
    "plain": lambda judge, config, _: judge.kind.from_dense(judge.dense, config),
    "data-aware": lambda judge, config, _: _fitted(judge, config),
    "data-aware, 2 terms": lambda judge, config, _: _fitted(judge, _two_terms(config)),
    "blockwise": lambda judge, config, steps: _trained(judge, _fitted(judge, config), steps),
    "blockwise from plain": lambda judge, config, steps: _trained(
        judge, judge.kind.from_dense(judge.dense, config), steps
    ),
    "blockwise, 2 terms": lambda judge, config, steps: _trained(judge, _fitted(judge, _two_terms(config)), steps),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="text, a sentence a line, in random order")
    parser.add_argument("--pairs", type=Path, help="TSV file with columns sentence1, sentence2, score")
    parser.add_argument("--most-pairs", type=int, default=599, help="of these pairs the first (599)")
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument("--lines", type=int, default=2000, help="lines to fit and train on (2000)")
    parser.add_argument("--held-out", type=int, default=512, help="last lines, to judge by (512)")
    parser.add_argument("--steps", type=int, default=300, help="steps a block (300)")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(STARTS), help="starts to leave out")
    add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
