"""The package in a minute, on random weights: the op, a layer, a data-aware fit, and a BERT saved and loaded."""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModel, BertConfig, BertModel

from kron_kernels import kron_matmul
from kron_kernels.convert.calibrate import calibrate
from kron_kernels.factorize import nearest_kronecker
from kron_kernels.models import KronBertModel
from kron_kernels.nn import KronLinear

torch.manual_seed(0)

# The op: a (768, 768) weight in 384*48 + 2*16 numbers, never built.
x = torch.randn(4, 768)
a, b = torch.randn(384, 48), torch.randn(2, 16)
y = kron_matmul(x, a, b)
print("op against torch.kron:", float((y - x @ torch.kron(a, b).T).abs().max()))

# A layer from a trained one. A random weight has no structure, so the nearest product keeps little of it.
linear = torch.nn.Linear(768, 3072)
layer = KronLinear.from_linear(linear, a_shape=(16, 2))
print(layer)
factors = nearest_kronecker(linear.weight.detach(), (16, 2), terms=4)
print(f"weight error, 4 terms: {factors.relative_error:.3f}")

# A small BERT: calibrate on some batches, convert, save, load.
dense = BertModel(BertConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)).eval()
ids = torch.randint(0, 30522, (8, 16))
model = KronBertModel.from_dense(dense, "K8", calibration=calibrate(dense, [{"input_ids": ids}]))
report = model.conversion_report
print(f"{report.params_before:,} -> {report.params_after:,} parameters, {report.compression:.1f}x fewer")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder).eval()
with torch.no_grad():
    same = torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
print("loaded model computes the same:", same)
