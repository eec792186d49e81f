"""A LoKr adapter of PEFT on a small random Llama: the same training with PEFT's own layers and with the patched ones.

python examples/peft_lokr.py --hidden 512     needs peft; prints losses, time and peak memory of both
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch
from peft import LoKrConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kron_kernels.integrations.peft_lokr import kron_kernels_in_peft
from kron_kernels.testing import peak_memory_growth


def make_model(hidden: int) -> nn.Module:
    """A Llama of two layers with random weights and a LoKr adapter on all of its linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2, num_attention_heads=4
    )
    adapter = LoKrConfig(r=16, alpha=16, decompose_factor=8, target_modules="all-linear", rank_dropout=0.1)
    return get_peft_model(LlamaForCausalLM(config), adapter).train()


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """The losses of ``steps`` steps on token ids ``(batch, length)``."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(2))
    losses = {}
    for name in ("PEFT", "kron_kernels"):
        model = make_model(arguments.hidden)
        # In your program: apply_kron_kernels_to_peft(model), once.
        with contextlib.nullcontext() if name == "PEFT" else kron_kernels_in_peft(model):
            start = time.perf_counter()
            losses[name] = train(model, ids, arguments.steps)
            seconds = time.perf_counter() - start
            growth = peak_memory_growth(lambda model=model: train(model, ids, 1))
        memory = "unknown" if growth is None else f"{growth / 2**20:.0f} MiB"
        print(f"{name}: losses {[round(loss, 4) for loss in losses[name]]}, {seconds:.2f} s, a step's memory {memory}")
    return losses


if __name__ == "__main__":
    main()
