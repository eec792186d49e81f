"""What is timed beside this package: stock torch in its best form, and other libraries where they are installed.

``OPS`` make a :class:`Candidate` of an :class:`OpProblem`; ``ENCODERS`` give a function of token ids for a dense model.
Each raises :class:`Missing` with the reason where it cannot run here. Libraries are looked for in ``PEERS`` too, a
folder that only those who measure them look into, since the mere presence of some changes others:
``pip install --no-deps --target build/peers -r bench/peers.txt``.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.suites import Missing
from kron_kernels import backends
from kron_kernels.schemas.registry import ACTIVATION_CODES
from kron_kernels.testing.problems import Candidate, Case, OpProblem, a_first, b_first, dense_op, kron_op

PEERS = Path(os.environ.get("KRON_KERNELS_PEERS", "build/peers")).resolve()
FASTKRON_LARGEST = 299  # 8 to 100 times slower than dense with larger factors
# Libraries with thread pools of their own, whose threads spin for a while after each call.
REST_SECONDS = 0.02


def module(name: str) -> ModuleType:
    """Import a peer; it may lie in ``PEERS``."""
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error


def _dense(problem: OpProblem) -> Candidate:
    return Candidate("dense", dense_op(problem.case.op), ("weight", "bias"))


def _dense_packed(problem: OpProblem) -> Candidate:
    """Dense layers with weights packed ahead for the library behind them: MKL in float32, oneDNN in bfloat16."""
    if problem.case.op == "kron_qkv":
        raise Missing("products and feed-forward blocks only")
    if problem.dtype == torch.float32:
        if not torch.backends.mkl.is_available():
            raise Missing("torch was built without MKL")

        def pack(weight: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.mkl._mkl_reorder_linear_weight(weight, problem.tokens), weight

        def linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.shape[0])

    else:
        if not torch.backends.mkldnn.is_available():
            raise Missing("torch was built without oneDNN")

        def pack(weight: Tensor) -> tuple[Tensor, ...]:
            return (torch.ops.mkldnn._reorder_linear_weight(weight, problem.tokens), weight)

        def linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def prepare(*operands: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(operands[0::2], operands[1::2], strict=True)
        return tuple(tensor for weight, bias in pairs for tensor in (*pack(weight), bias))

    def function(x: Tensor, *operands: Tensor) -> Tensor:
        y = linear(x, *operands[:3])
        return y if len(operands) == 3 else linear(F.gelu(y), *operands[3:])

    return Candidate("dense, packed", function, ("weight", "bias"), prepare)


def _materialised(problem: OpProblem) -> Candidate:
    """The dense layer with its weight built by torch.kron in every call."""

    def function(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, torch.kron(a[0], b[0]), bias)

    return Candidate("torch.kron + linear", _single(problem, function))


def _matmul(problem: OpProblem) -> Candidate:
    """Two stock matrix products a layer, in the order that is quicker on this problem."""
    orders = [_quicker_order(problem, index) for index in range(len(problem.case.layers))]
    return Candidate("matmul", _chained(problem.case, orders))


def _chained(case: Case, orders: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    def function(x: Tensor, *operands: Tensor) -> Tensor:
        parts = [operands[start : start + 3] for start in range(0, len(operands), 3)]
        if case.op == "kron_qkv":
            return torch.cat([order(x, *part) for order, part in zip(orders, parts, strict=True)], -1)
        y = orders[0](x, *parts[0])
        return y if len(orders) == 1 else orders[1](F.gelu(y), *parts[1])

    return function


def _quicker_order(problem: OpProblem, index: int) -> Callable[..., Tensor]:
    layer = problem.case.layers[index]
    alone = OpProblem(Case("kron_matmul", (layer,)), problem.tokens, problem.dtype, problem.backward, 1, problem.device)

    def seconds(order: Callable[..., Tensor]) -> float:
        run, times = alone.runner(Candidate("", order)), []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if problem.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return min((b_first, a_first), key=seconds)


def _compiled(name: str) -> Callable[[OpProblem], Candidate]:
    """torch.compile of another candidate, for the problem's own shape."""

    def make(problem: OpProblem) -> Candidate:
        base = OPS[name](problem)
        torch.compiler.reset()
        function = torch.compile(base.function, fullgraph=True, dynamic=False)
        return Candidate(f"{name}, compiled", function, base.operands)

    return make


def _fastkron(problem: OpProblem) -> Candidate:
    """FastKron's CPU build; float32 and forward only."""
    if problem.dtype != torch.float32 or problem.backward:
        raise Missing("float32 and forward only")
    (layer,) = problem.case.layers
    if max(*layer.a, *layer.b) > FASTKRON_LARGEST:
        raise Missing(f"factors above {FASTKRON_LARGEST} are far slower than dense there")
    gemkm = module("pyfastkron.fastkrontorch").gemkm

    def prepare(a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return a[0].t().contiguous(), b[0].t().contiguous(), bias

    def function(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return gemkm(x, [a, b]) + bias

    return Candidate("FastKron", _single(problem, function), prepare=prepare, rest_seconds=REST_SECONDS)


def _lycoris(problem: OpProblem) -> Candidate:
    """LyCORIS's LoKr product: its Triton kernel on a GPU, its einsums on a CPU."""
    bypass = module("lycoris.functional.lokr").kron_bypass
    more = {"backend": "triton"} if problem.device == "cuda" else {}

    def function(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return bypass(x, a[0], None, None, b[0], None, None, None, **more) + bias

    return Candidate("LyCORIS", _single(problem, function))


def _single(problem: OpProblem, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if len(problem.case.layers) > 1 or problem.case.layers[0].terms > 1:
        raise Missing("one product of one term only")
    return function


def kron(backend: str | None) -> Callable[[OpProblem], Candidate]:
    """This package, by its own choice or by one backend."""
    return lambda problem: Candidate(backend or "kron_kernels", kron_op(problem.case.op, backend))


def _inference_form(problem: OpProblem) -> Candidate:
    """This package on factors packed ahead, as ``optimize_for_inference`` leaves them in a model."""
    ops, op = torch.ops.kron_kernels, problem.case.op
    if op == "kron_qkv" or not backends.available()["cpu"].available:
        raise Missing("products and feed-forward blocks on compiled CPU kernels only")

    def prepare(*operands: Tensor) -> tuple[Tensor, ...]:
        packs = (ops.kron_pack(a, b) for a, b in zip(operands[0::3], operands[1::3], strict=True))
        return (*operands, *packs)

    def function(x: Tensor, *operands: Tensor) -> Tensor:
        if op == "kron_matmul":
            return ops.kron_matmul(x, *operands[:3], ACTIVATION_CODES[None], operands[3])
        return ops.kron_ffn(x, *operands[:6], ACTIVATION_CODES["gelu"], None, None, None, 0.0, *operands[6:])

    return Candidate("kron_kernels, inference form", function, prepare=prepare)


OPS: dict[str, Callable[[OpProblem], Candidate]] = {
    "dense": _dense,
    "dense, packed": _dense_packed,
    "dense, compiled": _compiled("dense"),
    "torch.kron + linear": _materialised,
    "matmul": _matmul,
    "matmul, compiled": _compiled("matmul"),
    "LyCORIS": _lycoris,
    "FastKron": _fastkron,
    "kron_kernels": kron(None),
    "kron_kernels, inference form": _inference_form,
    "triton": kron("triton"),
    "cuda": kron("cuda"),
}


def op_candidate(problem: OpProblem, name: str) -> Candidate:
    """Return the candidate of that name, checked for what the problem asks."""
    candidate = OPS[name](problem)
    if problem.backward and candidate.prepare is not None:
        raise Missing("forward only")
    return candidate


Run = Callable[[Tensor], Tensor]


class _HiddenStates(nn.Module):
    """The model with the last hidden states as its only output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state


def _openvino(int8: bool) -> Callable[[nn.Module], Run]:
    def make(model: nn.Module) -> Run:
        openvino: Any = module("openvino")
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        plain = _HiddenStates(copy.deepcopy(model).float()).eval()
        shape = [("input_ids", openvino.PartialShape([-1, -1]), openvino.Type.i64)]
        converted = openvino.convert_model(plain, example_input=torch.zeros(2, 8, dtype=torch.int64), input=shape)
        if int8:
            nncf: Any = module("nncf")
            vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
            samples = [{"input_ids": torch.randint(0, vocabulary, (1, 128)).numpy()} for _ in range(32)]
            transformer = nncf.ModelType.TRANSFORMER
            converted = nncf.quantize(converted, nncf.Dataset(samples), model_type=transformer, subset_size=32)
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        }
        request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
        return lambda ids: torch.from_numpy(request.infer([ids.numpy()], share_inputs=True)[0].copy())

    return make


def _onnxruntime(int8: bool) -> Callable[[nn.Module], Run]:
    def make(model: nn.Module) -> Run:
        if next(model.parameters()).dtype != torch.float32:
            raise Missing("float32 only")
        runtime: Any = module("onnxruntime")
        module("onnxscript")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, small = f"{folder}/dense.onnx", f"{folder}/int8.onnx"
            example = (torch.zeros(2, 8, dtype=torch.int64),)
            plain = _HiddenStates(model).eval()
            torch.onnx.export(plain, example, path, dynamo=True, dynamic_shapes=sizes, verbose=False)
            if int8:
                quantization: Any = module("onnxruntime.quantization")
                signed = quantization.QuantType.QInt8
                quantization.quantize_dynamic(path, small, weight_type=signed, per_channel=True)
            session = runtime.InferenceSession(small if int8 else path, options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].name
        return lambda ids: torch.from_numpy(session.run(None, {given: ids.numpy()})[0])

    return make


# What a user would take on a CPU instead of a factored model.
ENCODERS: dict[str, Callable[[nn.Module], Run]] = {
    "OpenVINO": _openvino(False),
    "OpenVINO, int8": _openvino(True),
    "ONNX Runtime": _onnxruntime(False),
    "ONNX Runtime, int8": _onnxruntime(True),
}
