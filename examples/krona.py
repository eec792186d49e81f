"""KronA on a small random BERT: train only the adapters, save only them, merge them into the model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn
from toy import trained_parameters
from transformers import BertConfig, BertForSequenceClassification

from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import ShapeRule
from kron_kernels.integrations.krona import KronABlock, add_krona_, load_krona_, remove_krona_, save_krona

# Query and value only, as in the paper, with balanced factors: of 64 x 64 two of 8 x 8.
CONFIG = KronConfig(
    {"attention": ShapeRule(b=(8, 8))}, patterns={"attention": (r"attention\.self\.(query|value)$",)}, name="KronA"
)


def small_bert() -> BertForSequenceClassification:
    """The same frozen model every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes)).eval()


def main(steps: int = 100) -> dict[str, float]:
    model = small_bert()
    add_krona_(model, CONFIG, scale=16.0)
    trained = trained_parameters(model)
    share = trained / sum(p.numel() for p in model.parameters())
    print(f"trained: {trained:,} parameters, {100 * share:.2f} % of the model's")

    # Whether a text has more of token 5 than of token 6.
    ids = torch.randint(5, 7, (64, 15))
    labels = (2 * (ids == 5).sum(1) > 15).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file, logits, loaded = Path(folder) / "krona.safetensors", model(ids).logits, small_bert()
        save_krona(model, file)
        load_krona_(loaded, file)
        size, reloaded = file.stat().st_size, float((loaded(ids).logits - logits).abs().max())
        remove_krona_(model)  # merged: from here on the cost is the dense model's
        merged = float((model(ids).logits - logits).abs().max())
        print(f"adapter file: {size:,} bytes; error reloaded: {reloaded:.1e}, merged: {merged:.1e}")

        # KronA^B_res: beside a whole block, with a learned share of its input.
        block, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(10, 64)
        beside = KronABlock(block, ((8, 8), (8, 8)), residual=True)
        start = float((beside(x) - block(x)).abs().max())
    print(beside, f"\nat the start it changes the block by {start}")
    return {"share": share, "fall": losses[-1] / losses[0], "reloaded": reloaded, "merged": merged, "start": start}


if __name__ == "__main__":
    main()
