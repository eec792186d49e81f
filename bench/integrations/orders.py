"""How much the search for orders of channels lowers the error of the nearest factors; to integrations-orders.csv.

python -m bench.integrations.orders [--model path/to/bert]

Made weights; feed-forwards and embedding of a GPT-2 of small size as it is initialised; with ``--model`` the
feed-forwards of a trained BERT, an order for each one's hidden units and one for the residual stream. Errors are
relative, in the Frobenius norm, the mean over the weights of a case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bench.harness import Budget, ResultFile, add_run_options, stamp
from kron_kernels.cli.output import Progress
from kron_kernels.compress import load_dense
from kron_kernels.factorize.permutations import OrderedWeight, PermutationSearch, search_permutations
from kron_kernels.models.gpt2_permute import search_gpt2_permutations

KEY = ("weights", "pair", "rounds", "seed")
COLUMNS = ("count", "before", "after", "seconds")
_SHAPE, _A_SHAPE = (192, 96), (48, 48)


def _normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def _low_rank() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, 8, generator=generator) for size in _SHAPE)
    return left @ right.T / 8**0.5 + 0.1 * _normal(*_SHAPE)


def _hidden_product() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.kron(torch.randn(_A_SHAPE, generator=generator), torch.randn(4, 2, generator=generator))
    noise = 0.1 * weight.norm() / _normal(*_SHAPE).norm() * _normal(*_SHAPE)
    rows, columns = (torch.randperm(size, generator=generator) for size in _SHAPE)
    return (weight + noise)[rows][:, columns]


MADE: dict[str, tuple[Callable[[], Tensor], int]] = {
    "normal": (lambda: _normal(*_SHAPE), 1),
    "rank 8 and 10 % noise": (_low_rank, 4),
    "one product in random order and 10 % noise": (_hidden_product, 1),
}


def made(name: str, rounds: int, seed: int) -> PermutationSearch:
    """Orders of rows and columns of a made weight."""
    make, terms = MADE[name]
    weight = OrderedWeight(make(), _A_SHAPE, terms, (("rows", 0),), (("columns", 0),))
    return search_permutations([weight], dict(zip(("rows", "columns"), _SHAPE, strict=True)), rounds=rounds, seed=seed)


def trained(model: Path, terms: int, rounds: int, seed: int) -> PermutationSearch:
    """Orders of a BERT's channels that serve its feed-forwards: A (x) 4x2 in, A (x) 2x4 out."""
    dense = load_dense(model)
    width, inner = dense.config.hidden_size, dense.config.intermediate_size
    weights, sizes = [], {"residual": width}
    for index, layer in enumerate(dense.encoder.layer):
        hidden = f"hidden {index}"
        sizes[hidden] = inner
        first, second = layer.intermediate.dense.weight, layer.output.dense.weight
        outer = (("residual", 0),)
        weights += [
            OrderedWeight(first, (inner // 4, width // 2), terms, ((hidden, 0),), outer),
            OrderedWeight(second, (width // 2, inner // 4), terms, outer, ((hidden, 0),)),
        ]
    return search_permutations(weights, sizes, rounds=rounds, seed=seed)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    file = ResultFile(arguments.out / "integrations-orders.csv", KEY, COLUMNS)
    searches: dict[tuple[str, str], Callable[[int, int], PermutationSearch]] = {
        (f"{name}, 192x96", f"{terms} of 48x48 (x) 4x2"): lambda rounds, seed, name=name: made(name, rounds, seed)
        for name, (_, terms) in MADE.items()
    }
    if not arguments.smoke:
        torch.manual_seed(0)
        small = GPT2LMHeadModel(GPT2Config())
        searches["what TQCompressor factors in GPT-2 small, as initialised", "TQCompressor"] = lambda rounds, seed: (
            search_gpt2_permutations(small, "TQCompressor", rounds=rounds, seed=seed)
        )
    for terms in (4, 1) if arguments.model else ():
        searches[f"feed-forwards of {arguments.name or arguments.model.name}", f"{terms} of A (x) 4x2, 2x4"] = (
            lambda rounds, seed, terms=terms: trained(arguments.model, terms, rounds, seed)
        )
    budget = Budget(arguments.budget)
    progress = Progress(every_seconds=0)
    for done, ((weights, pair), search) in enumerate(searches.items()):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(searches)} jobs; start again to go on")
        progress(done, len(searches), f"{weights}, {pair}")
        key = {"weights": weights, "pair": pair, "rounds": arguments.rounds, "seed": arguments.seed}
        if file.has(key, current):
            continue
        began = time.perf_counter()
        found = search(arguments.rounds, arguments.seed)
        before, after = (sum(errors) / len(errors) for errors in (found.errors_before, found.errors_after))
        seconds = time.perf_counter() - began
        row = {"count": len(found.errors_after), "before": before, "after": after, "seconds": seconds}
        file.add([{**key, **row, **current}])
    progress(len(searches), len(searches), f"done: {file.path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint of a trained BERT")
    parser.add_argument("--name", help="of the model, in the results (the folder's)")
    parser.add_argument("--rounds", type=int, default=6, help="sweeps of the search at most (6)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (0)")
    add_run_options(parser)
    parser.add_argument("--smoke", action="store_true", help="the small made weights alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
