"""The child process of bench.model: times the encoders of one job, or measures the memory of their forward."""

from __future__ import annotations

import json
import sys

import torch

from bench.worker import protocol
from kron_kernels.cli.bench import DTYPES
from kron_kernels.timing import peak_memory_growth
from kron_kernels.timing.encoder import compare_encoders, encoders, forward


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    models = encoders(job["presets"], DTYPES[job["dtype"]], num_hidden_layers=job["layers"])
    if job["kind"] == "memory":
        ids = torch.randint(0, 1000, (job["batch"], job["sequence"]))
        for name, model in models.items():
            forward(model, ids[:, :2])
            # The hidden states that come back count too, as they do for a user.
            say({"model": name, "peak": peak_memory_growth(lambda model=model: forward(model, ids))})
        return
    for result in compare_encoders(models, job["batch"], job["sequence"], seconds=job["seconds"]):
        row = {
            "model": result.name,
            "parameters": result.parameters,
            "status": "ok" if result.timing else "wrong",
            "error": result.error,
            "tolerance": result.tolerance,
        }
        if result.timing:
            row |= result.timing.columns("ms")
        say(row)


if __name__ == "__main__":
    main()
