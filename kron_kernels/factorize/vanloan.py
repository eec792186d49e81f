"""The nearest Kronecker product in the Frobenius norm (Van Loan and Pitsianis, 1993).

Writing each m2 x n2 block of W as a row turns W into R (m1*n1, m2*n2), and sum_s A_s (x) B_s into the rank-S matrix
sum_s vec(A_s) vec(B_s)^T. The best factors are therefore R's leading singular triplets. One side of R is often a few
entries wide and the other hundreds of thousands (8 x 2930112 for a vocabulary of 30522), so the small side's vectors
come from its Gram matrix and the other side's from one more product with R. The Gram matrix squares the singular
values, which costs half the digits: everything here is fp64, in blocks, whatever the dtype of W.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# fp64 values of R in memory at a time (32 MiB).
_BLOCK_ENTRIES = 1 << 22
# Gram matrices up to this size are decomposed whole; beyond it that takes seconds and a few vectors are much cheaper.
_DENSE_EIGH_LIMIT = 1024


def rearranged_blocks(weight: Tensor, a_shape: tuple[int, int], transposed: bool) -> Iterator[Tensor]:
    """Yield the row blocks, in order and in fp64, of R (m1*n1, m2*n2), or of R^T where ``transposed``."""
    m1, n1 = a_shape
    grid = weight.unflatten(0, (m1, -1)).unflatten(2, (n1, -1))
    # (m1, n1, m2, n2) or (m2, n2, m1, n1)
    grid = grid.permute(1, 3, 0, 2) if transposed else grid.permute(0, 2, 1, 3)
    step = max(1, _BLOCK_ENTRIES // grid[0].numel())
    for start in range(0, grid.shape[0], step):
        yield grid[start : start + step].to(torch.float64).flatten(2).flatten(0, 1)


def van_loan(weight: Tensor, a_shape: tuple[int, int], terms: int) -> tuple[Tensor, Tensor]:
    """Return the ``terms`` leading pairs, fp64: a (S, m1, n1), b (S, m2, n2), each singular value split evenly."""
    (m1, n1), (m2, n2) = a_shape, (weight.shape[0] // a_shape[0], weight.shape[1] // a_shape[1])
    a_is_small = m1 * n1 < m2 * n2
    gram = gram_matrix(weight, a_shape, a_is_small)
    small = leading_eigenvectors(gram, terms)
    # (S, large side); the length of each row is the singular value.
    large = torch.cat([block @ small for block in rearranged_blocks(weight, a_shape, a_is_small)]).T
    root = large.norm(dim=1, keepdim=True).sqrt()
    large = large / root.clamp(min=torch.finfo(torch.float64).tiny)
    a, b = (small.T * root, large) if a_is_small else (large, small.T * root)
    a, b = with_fixed_signs(a, b)
    return a.reshape(terms, m1, n1), b.reshape(terms, m2, n2)


def with_fixed_signs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Flip the signs of pairs of rows a (S, p), b (S, q) so that each b's largest entry is positive.

    A singular vector's sign is arbitrary; this makes every machine return the same factors.
    """
    peak = b.gather(1, b.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(b.dtype)
    return a * sign, b * sign


def leading_eigenvectors(gram: Tensor, count: int) -> Tensor:
    """Find orthonormal eigenvectors (k, count) of the largest eigenvalues of ``gram`` (k, k), largest first."""
    size = gram.shape[0]
    if size <= _DENSE_EIGH_LIMIT or count * 8 > size:
        return torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1)
    return _block_lanczos(gram, count)


def gram_matrix(weight: Tensor, a_shape: tuple[int, int], a_is_small: bool) -> Tensor:
    """Return the Gram matrix of R's smaller side, fp64."""
    blocks = rearranged_blocks(weight, a_shape, a_is_small)
    first = next(blocks)
    gram = first.T @ first
    for block in blocks:
        gram.addmm_(block.T, block)
    return gram


def _block_lanczos(gram: Tensor, count: int, tolerance: float = 1e-9, restarts: int = 40) -> Tensor:
    """Find leading eigenvectors by block Lanczos with full reorthogonalisation, restarted from the best vectors so far.

    The residual tolerance is relative to the largest eigenvalue; the eigenvalues are then right to its square. Falls
    back on the whole decomposition where that is not reached. Deterministic, with a random generator of its own.
    """
    size, width = gram.shape[0], count + 8
    steps = max(2, min(24, size // (2 * width)))
    generator = torch.Generator(device="cpu").manual_seed(0)
    block = torch.randn(size, width, dtype=gram.dtype, generator=generator).to(gram.device)
    for _ in range(restarts):
        basis = torch.linalg.qr(block).Q
        block = basis
        for _ in range(steps - 1):
            block = gram @ block
            # Twice: a block that the basis nearly spans already keeps only rounding noise after the first pass.
            for _ in range(2):
                block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
            basis = torch.cat([basis, block], 1)
        image = gram @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        rotation, values = rotation[:, -width:], values[-width:]
        block = basis @ rotation
        residual = (image @ rotation - block * values)[:, -count:].norm(dim=0).max()
        if residual <= tolerance * values[-1].abs():
            return block[:, -count:].flip(1)
    return torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1)
