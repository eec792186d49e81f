"""The child process of bench.distill_losses: checks and times both ways of a term, or tells the memory of one.

"time" yields a row for each way, "memory" one for the way that is asked for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.protocol import Say, protocol
from kron_kernels.distill.scores import attention_kl, score_mse
from kron_kernels.testing import Variant, interleave, peak_memory_growth

# Relative error against float64 that a way may have, in the loss and in the norm of the gradients.
TOLERANCE = 1e-4
OURS = {"mse": score_mse, "kl": attention_kl}
# A layer: student's query and key, the teacher's, all (batch, length, heads * head_size).
Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    {"time": time_ways, "memory": memory_of_way}[job["kind"]](job, say)


def time_ways(job: dict[str, Any], say: Say) -> None:
    """Both ways against float64, those that are right against each other."""
    layers = make_layers(job)
    ways = {"plain": plain, "ours": ours}
    exact = [tuple(each.detach().double().requires_grad_(each.requires_grad) for each in layer) for layer in layers[:1]]
    loss, gradients = plain(job, exact)
    del exact
    rows, right = {}, []
    for name, way in ways.items():
        value, found = way(job, layers[:1])
        off = math.hypot(*(float((one - other).norm()) for one, other in zip(found, gradients, strict=True)))
        error = {
            "error": abs(float(value / loss) - 1),
            "gradient_error": off / math.hypot(*(float(each.norm()) for each in gradients)),
        }
        wrong = max(error.values()) > TOLERANCE
        rows[name] = {"way": name, "status": "wrong" if wrong else "ok", **error}
        if not wrong:
            right.append(Variant(name, lambda way=way: way(job, layers)))
    if len(right) == len(ways):
        for timing in interleave(right, "plain", seconds=job["seconds"]):
            rows[timing.name].update(timing.columns("ms"))
    for row in rows.values():
        say(row)


def memory_of_way(job: dict[str, Any], say: Say) -> None:
    """What forward and backward add to the process at the peak, MiB."""
    way = {"plain": plain, "ours": ours}[job["way"]]
    way(job, make_layers({**job, "layers": 1, "batch": 1, "length": 16}))
    layers = make_layers(job)
    growth = peak_memory_growth(lambda: way(job, layers))
    say({"memory_mib": None if growth is None else growth / 2**20})


def make_layers(job: dict[str, Any]) -> list[Layer]:
    """Random queries and keys; the teacher's are a third of their size away from the student's."""
    shape = (job["batch"], job["length"], job["heads"] * job["head_size"])
    layers: list[Layer] = []
    for _ in range(job["layers"]):
        query, key = torch.randn(shape), torch.randn(shape)
        teacher = [each + torch.randn(shape) / 3 for each in (query, key)]
        layers.append((query.requires_grad_(), key.requires_grad_(), teacher[0], teacher[1]))
    return layers


def ours(job: dict[str, Any], layers: Sequence[Layer]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum over layers, and the gradients of all queries and keys."""
    term = OURS[job["term"]]
    return differentiated(torch.stack([term(*layer, None, heads=job["heads"]) for layer in layers]).sum(), layers)


def plain(job: dict[str, Any], layers: Sequence[Layer]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same from the scores, or probabilities, of all layers of both models."""
    heads = job["heads"]
    students = [attention(query, key, heads) for query, key, _, _ in layers]
    teachers = [attention(query, key, heads) for _, _, query, key in layers]
    if job["term"] == "kl":
        students, teachers = ([each.log_softmax(-1) for each in several] for several in (students, teachers))
        terms = [
            F.kl_div(mine, theirs, reduction="sum", log_target=True)
            for mine, theirs in zip(students, teachers, strict=True)
        ]
    else:
        terms = [F.mse_loss(mine, theirs, reduction="sum") for mine, theirs in zip(students, teachers, strict=True)]
    return differentiated(torch.stack(terms).sum(), layers)


def attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Scores ``(batch, heads, length, length)`` as eager attention computes them."""
    query, key = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key))
    return torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5


def differentiated(loss: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the gradients of the students' queries and keys."""
    return loss.detach(), torch.autograd.grad(loss, [each for layer in layers for each in layer[:2]])


if __name__ == "__main__":
    main()
