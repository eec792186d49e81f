"""Convert layers of TQCompressor's published form (Abronin et al., 2024) to KronLinear, gathers folded away.

A layer there is ``y = (sum_r A_r (x) B_r^T)(x[p_inv])[q] + bias`` with ``A (r, n1, m1)`` and ``B (r, m2, n2)``, for
``m1*m2`` inputs and ``n1*n2`` outputs: the channels are gathered before and after the product. An order that permutes
whole groups, and the places inside every group alike, only reorders the factors' rows and columns and costs nothing.
The order between the two layers of a feed-forward counts as one, since hidden units have no order of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import KronLinear


@torch.no_grad()
def linear_from_tq(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    input_order: Tensor | None = None,
    output_order: Tensor | None = None,
) -> KronLinear:
    """Return the KronLinear of a layer ``A (r, n1, m1)``, ``B (r, m2, n2)``, ``bias (n1*n2,)``, ``p_inv`` and ``q``.

    ``input_order (m1*m2,)`` is p_inv and ``output_order (n1*n2,)`` is q; None means the identity. Dtype and device are
    those of ``a``. Raises ValueError for shapes that do not fit and for an order that does not fold into the factors.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a, b: expected (r, n1, m1) and (r, m2, n2), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.clone(), b.mT.clone()  # (r, n1, m1), (r, n2, m2): out first
    (terms, n1, m1), (_, n2, m2) = a.shape, b.shape
    if bias is not None and tuple(bias.shape) != (n1 * n2,):
        raise ValueError(f"bias: expected ({n1 * n2},), got {tuple(bias.shape)}")
    if input_order is not None:
        groups, places = _split("input_order", input_order, m1, m2)
        # Column i of A meets group groups[i] of x.
        a, b = a[:, :, groups.argsort()], b[:, :, places.argsort()]
    if output_order is not None:
        groups, places = _split("output_order", output_order, n1, n2)
        a, b = a[:, groups], b[:, places]
    factory = {"device": a.device, "dtype": a.dtype}
    layer = nn.utils.skip_init(KronLinear, m1 * m2, n1 * n2, ((n1, m1), (n2, m2)), terms, bias is not None, **factory)
    layer.load_factors(a, b)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def feed_forward_from_tq(c_fc: dict[str, Tensor], c_proj: dict[str, Tensor]) -> tuple[KronLinear, KronLinear]:
    """Return the two layers of a feed-forward, each from its ``A``, ``B``, ``b`` and optional ``p_inv`` and ``q``.

    The hidden units have the order of c_fc's factors: its ``q`` and c_proj's ``p_inv`` are folded as one order. Raises
    ValueError as ``linear_from_tq``, with the layer's name before the message.
    """
    hidden, q, p_inv = c_fc["b"], c_fc.get("q"), c_proj.get("p_inv")
    if q is not None:
        q = _permutation("c_fc: q", q, len(hidden))
        hidden = hidden[q.argsort()]
        p_inv = q if p_inv is None else q[_permutation("c_proj: p_inv", p_inv, len(hidden))]
    layers = []
    for name, given, bias, orders in (
        ("c_fc", c_fc, hidden, {"input_order": c_fc.get("p_inv")}),
        ("c_proj", c_proj, c_proj["b"], {"input_order": p_inv, "output_order": c_proj.get("q")}),
    ):
        try:
            layers.append(linear_from_tq(given["A"], given["B"], bias, **orders))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layers[0], layers[1]


def _permutation(name: str, order: Tensor, size: int) -> Tensor:
    order = order.long()
    if tuple(order.shape) != (size,) or not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
        raise ValueError(f"{name}: expected a permutation of {size} channels, got shape {tuple(order.shape)}")
    return order


def _split(name: str, order: Tensor, groups: int, places: int) -> tuple[Tensor, Tensor]:
    """Return (g, t) with order[i*places + k] = g[i]*places + t[k]; ValueError where none exist."""
    grid = _permutation(name, order, groups * places).view(groups, places)
    group, place = grid[:, 0] // places, grid[0] % places
    if not torch.equal(grid, group[:, None] * places + place):
        raise ValueError(
            f"{name}: expected an order of whole groups of {places} and of the places in them, which fold into "
            "the factors, got one that needs a gather of the channels in every call; reorder the neighbouring weights "
            "by it (permute_gpt2_) and pass None"
        )
    return group, place
