"""Activations and their derivatives as device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _odd(x, coefficients):
    """x P(x^2) by Horner's rule, the constant term first."""
    s = x * x
    value = s * coefficients[len(coefficients) - 1] + coefficients[len(coefficients) - 2]
    for index in tl.static_range(3, len(coefficients) + 1):
        value = s * value + coefficients[len(coefficients) - index]
    return x * value


@triton.jit
def _normal(x):
    """Phi(x), the normal distribution, to 1e-7, and exp(-x^2 / 2).

    Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.4 |x|): a degree-5 minimax fit, the form of Hastings (1955).
    """
    e = tl.exp2(x * x * -0.7213475204444817)
    t = 1.0 / (1.0 + 0.4 * tl.abs(x))
    tail = 0.188416495 + t * (0.0138675133 + t * (0.338935755 + t * (-0.254272496 + t * 0.056299254)))
    tail = t * (0.156753544 + t * tail) * e
    return tl.where(x < 0.0, tail, 1.0 - tail), e


@triton.jit
def _rough_normal(x, dtype: tl.constexpr):
    """Phi(x) for data of 16 bits by fused multiply-adds alone.

    0.5 + x P(x^2), a minimax fit on |x| <= 4, leaves [0, 1] beyond it: the clamp is free in the last addition.
    """
    if dtype == tl.bfloat16:  # |x| times the error is at most 1.7e-4
        value = _odd(
            x, (0.397988528, -0.0647254512, 0.0088442089, -8.29318073e-4, 4.95819695e-5, -1.68272663e-6, 2.44677558e-8)
        )
    else:  # 3.3e-5
        value = _odd(
            x,
            (
                0.398782998, -0.0661178529, 0.00967000611, -0.00106338575, 8.57232008e-5, -4.86570116e-6,
                1.82073009e-7, -3.99620737e-9, 3.87310878e-11,
            ),
        )  # fmt: skip
    return tl.clamp(value + 0.5, 0.0, 1.0)


@triton.jit
def _rough_tanh_normal(x, dtype: tl.constexpr):
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as ``_rough_normal``; errors 1.5e-4 and 3e-5."""
    if dtype == tl.bfloat16:
        value = _odd(
            x, (0.39806354, -0.0651160255, 0.0090694828, -8.79199128e-4, 5.48922289e-5, -1.95641792e-6, 2.9953835e-8)
        )
    else:
        value = _odd(
            x,
            (
                0.398807228, -0.0664932355, 0.00993287936, -0.00113799609, 9.71788759e-5, -5.9023223e-6,
                2.37423478e-7, -5.60987479e-9, 5.85333795e-11,
            ),
        )  # fmt: skip
    return tl.clamp(value + 0.5, 0.0, 1.0)


@triton.jit
def _tanh_normal(x):
    # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def activate(x, CODE: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """An activation of ``_ops.ACTIVATION_CODES`` of float32 values, to the accuracy that results in dtype need."""
    if CODE == 1:
        if dtype == tl.float32:
            return x * _normal(x)[0]
        else:
            return x * _rough_normal(x, dtype)
    elif CODE == 2:
        if dtype == tl.float32:
            return x * _tanh_normal(x)
        else:
            return x * _rough_tanh_normal(x, dtype)
    elif CODE == 3:
        # Not maximum(x, 0), which would drop NaN.
        return tl.where(x < 0.0, 0.0, x)
    elif CODE == 4:
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def activate_with_gradient(x, CODE: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """``activate`` and its derivative."""
    if CODE == 1:
        if dtype == tl.float32:
            normal, e = _normal(x)
        else:
            normal = _rough_normal(x, dtype)
            e = tl.exp2(x * x * -0.7213475204444817)
        return x * normal, normal + x * (0.3989422804014327 * e)
    elif CODE == 2:
        s = _tanh_normal(x)
        y = x * s
        return y, s + y * (1.0 - s) * (1.5957691216057308 + 0.2140644488 * x * x)
    elif CODE == 3:
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif CODE == 4:
        s = tl.sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)
