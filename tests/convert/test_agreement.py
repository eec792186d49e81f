"""Agreement of sentence vectors: what a rotation of all of them keeps, and what it does not."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.convert.agreement import vector_agreement


def test_vectors_and_their_similarities_are_compared() -> None:
    wanted = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    rotated = wanted @ torch.linalg.qr(torch.randn(16, 16)).Q
    assert vector_agreement(wanted, wanted) == pytest.approx({"cosine": 1, "correlation": 1, "same neighbour": 1})
    found = vector_agreement(wanted, rotated)  # other vectors, the same similarities
    assert found["cosine"] < 0.9
    assert (found["correlation"], found["same neighbour"]) == pytest.approx((1, 1), abs=1e-4)
