"""Whether a call of a block can be its op alone, or needs the composition that autograd and autocast follow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from ..schemas.torch_internals import needs_autograd
from .autocast import autocasts

# What an op with a compiled kernel raises for operands that it does not take; the checks here then name them in the
# caller's terms.
REJECTED = (AttributeError, RuntimeError, TypeError, ValueError)


def observed(x: Tensor, backend: str | None, tensors: Sequence[Tensor | None], autocast: bool = True) -> bool:
    """Whether a call needs more than the op: gradients, autocast, the reference by name."""
    device_type = x.device.type
    if backends.resolve(backend, device_type) == "reference" and (backend is not None or device_type == "cpu"):
        return True
    if autocast and autocasts(device_type):
        return True
    return needs_autograd(*tensors)
