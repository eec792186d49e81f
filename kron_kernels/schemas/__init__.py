"""The registered ops, one file each: schema, fake and vmap rule, and the reference that defines the result."""

from . import addmm, embedding, ffn, matmul, norm, pack, qkv

__all__ = ["addmm", "embedding", "ffn", "matmul", "norm", "pack", "qkv"]
