"""Kernels in Triton: the portable GPU path. One file an op with its kernels and their launchers.

Which kernel runs and with which tiles is plain Python (``*tiles.py``); the ops' files alone import Triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..base import DEFAULT, Backend, Call, Device, Status
from . import forms


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the cpu."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and importlib.util.find_spec("triton") is not None


@functools.cache
def status() -> Status:
    """Whether the kernels can run here, and the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return Status("triton", False, "Triton is not installed: pip install 'kron_kernels[triton]'")
    version = importlib.metadata.version("triton")
    if interpreted():
        interpreter = "with KRON_KERNELS_BACKEND=triton the kernels are interpreted on the cpu"
        if DEFAULT == "triton":
            return Status("triton", True, f"Triton {version}, interpreted on the cpu")
        return Status("triton", False, f"TRITON_INTERPRET is set: {interpreter}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        missing = "torch finds no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"
        return Status("triton", False, missing)
    return Status("triton", True, f"Triton {version}")


def unsupported_reason(call: Call) -> str | None:
    """Why no kernel takes a call; None where one does. Imports no Triton."""
    if interpreted() and call.dtype is torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    return forms.unsupported_reason(call.op, call.products, call.dtype)


def form(call: Call, device: Device) -> str:
    """How the kernels run a call on a device, or why they do not. Imports no Triton."""
    return forms.form(call.op, call.products, call.dtype, call.tokens, device)


@functools.cache
def implementations() -> Mapping[str, Callable[..., Any]]:
    """The ops' functions, each with the signature of its op. Imports Triton."""
    from . import embedding, embedding_backward, ffn, ffn_backward, matmul, matmul_backward, norm, qkv

    functions: tuple[Callable[..., Any], ...] = (
        *(matmul.kron_matmul, matmul.kron_addmm, matmul.kron_addmm_, matmul_backward.kron_matmul_backward),
        *(norm.kron_matmul_norm, ffn.kron_ffn, ffn_backward.kron_ffn_backward, qkv.kron_qkv),
        *(embedding.kron_embedding, embedding_backward.kron_embedding_backward),
    )
    return {function.__name__: function for function in functions}


def device() -> str:
    """The device type the kernels compute on."""
    return "cpu" if interpreted() else "cuda"


BACKEND = Backend("triton", status, device, unsupported_reason, form, implementations)
