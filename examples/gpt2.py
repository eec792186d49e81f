"""GPT-2 with Kronecker layers: reorder its channels for a better fit, convert, generate, save and load.

python examples/gpt2.py [--model path/to/gpt2] [--preset TQCompressor]

Without ``--model`` it takes a small random GPT-2, whose text is meaningless.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kron_kernels.models.gpt2 import KronGPT2LMHeadModel, reconstruct_dense
from kron_kernels.models.gpt2_permute import permute_gpt2_, search_gpt2_permutations


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a GPT-2 checkpoint")
    parser.add_argument("--preset", default="TQCompressor", help="KnGPT2, TQCompressor (default) or TQCompressor-QKV")
    parser.add_argument("--prompt", default="The Kronecker product of two matrices is")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer = None
    if options.model is None:
        sizes = {"vocab_size": 100, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 4}
        config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
        dense, ids = GPT2LMHeadModel(config).eval(), torch.randint(1, 100, (1, 8))
    else:
        dense = GPT2LMHeadModel.from_pretrained(options.model, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        ids = tokenizer(options.prompt, return_tensors="pt").input_ids

    # The order of channels is free: one that factors better costs nothing when the model runs.
    with torch.no_grad():
        before = dense(ids).logits
        found = search_gpt2_permutations(dense, options.preset, rounds=4)
        permute_gpt2_(dense, found.permutations)
        print(f"logits changed by the new order: {float((dense(ids).logits - before).abs().max()):.1e}")
    mean = [sum(errors) / len(errors) for errors in (found.errors_before, found.errors_after)]
    print(f"mean relative error of the factored weights: {mean[0]:.3f} -> {mean[1]:.3f}")

    model = KronGPT2LMHeadModel.from_dense(dense, options.preset)
    report = model.conversion_report
    print(f"{report.params_before:,} -> {report.params_after:,} parameters, {report.compression:.2f}x fewer")
    with torch.no_grad():
        difference = (model(ids).logits - reconstruct_dense(model)(ids).logits).abs().max()
    print(f"logits against the dense reconstruction: {float(difference):.1e}")

    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": model.config.eos_token_id}
    text = model.generate(ids, **asked)
    print("same text with and without the cache:", torch.equal(text, model.generate(ids, use_cache=False, **asked)))
    print("generated:", text[0].tolist() if tokenizer is None else tokenizer.decode(text[0]))

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        print("loaded model computes the same:", torch.equal(loaded(ids).logits, model(ids).logits))


if __name__ == "__main__":
    main()
