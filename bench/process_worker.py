"""The child process of bench.process_memory: writes a checkpoint or package, or loads one and runs it, and no more.

A job's ``model`` is "dense" or a preset, ``folder`` its checkpoint, ``package`` a file beside it. "run" and "run
package" tell the resident set after the imports and its peak at the end, in bytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.protocol import Say, protocol


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    {"save": save, "export": export, "run": run, "run package": run_package}[job["kind"]](job, say)


def save(job: dict[str, Any], say: Say) -> None:
    """A checkpoint with random weights."""
    import torch

    sizes = {"num_hidden_layers": job["layers"], **job["sizes"]}
    model: Any
    if job["model"] == "dense":
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(**sizes))
    else:
        from kron_kernels.models.bert import KronBertConfig, KronBertModel

        model = KronBertModel(KronBertConfig(kron=job["model"], **sizes))
    model.to(getattr(torch, job["dtype"])).save_pretrained(job["folder"])
    say({"saved": job["folder"]})


def export(job: dict[str, Any], say: Say) -> None:
    """The checkpoint as a package for torch alone."""
    from kron_kernels.runtime import export_model

    dtype = {"float32": "fp32", "bfloat16": "bf16"}[job["dtype"]]
    export_model(job["folder"], job["package"], dtype=dtype)
    say({"exported": job["package"]})


def run_package(job: dict[str, Any], say: Say) -> None:
    """Load the package and run it ``calls`` times on ``(batch, sequence)`` tokens; transformers is not imported."""
    import torch

    from kron_kernels.runtime import load_package
    from kron_kernels.testing.memory import process_bytes

    torch.set_num_threads(job["threads"])
    imported = process_bytes("VmRSS")
    package = load_package(job["package"])
    ids = torch.randint(0, 1000, (job["batch"], job["sequence"]))
    with torch.inference_mode():
        for _ in range(job["calls"]):
            package(input_ids=ids)
    say({"imported": imported, "peak": process_bytes("VmHWM")})


def run(job: dict[str, Any], say: Say) -> None:
    """Load the checkpoint and run it ``calls`` times on ``(batch, sequence)`` tokens."""
    import torch

    model_class: Any
    if job["model"] == "dense":
        from transformers import BertModel as model_class
    else:
        from kron_kernels.models.bert import KronBertModel as model_class
    from kron_kernels.testing.memory import process_bytes

    torch.set_num_threads(job["threads"])
    imported = process_bytes("VmRSS")
    model = model_class.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"])).eval()
    ids = torch.randint(0, model.config.vocab_size, (job["batch"], job["sequence"]))
    with torch.inference_mode():
        for _ in range(job["calls"]):
            model(ids)
    say({"imported": imported, "peak": process_bytes("VmHWM")})


if __name__ == "__main__":
    main()
