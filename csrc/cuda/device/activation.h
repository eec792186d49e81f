// Activations of fp32 values in registers, and their derivatives.
#pragma once

#include <cmath>

#include "core.h"
#include "kron/problem.h"

namespace kron {
namespace cuda {
namespace device {

#ifdef __CUDACC__
// Two units in the last place; 0 for a divisor beyond 2^126.
KRON_DEVICE float quotient(float a, float b) {
    return __fdividef(a, b);
}
#else
inline float quotient(float a, float b) {
    return a / b;
}
#endif

KRON_DEVICE float exponential(float x) {
    return ::expf(x);
}
KRON_DEVICE float error_function(float x) {
    return ::erff(x);
}
KRON_DEVICE float hyperbolic_tangent(float x) {
    return ::tanhf(x);
}
KRON_DEVICE float sigmoid(float x) {
    return quotient(1.0f, 1.0f + exponential(-x));
}

// 2 u in 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
KRON_DEVICE float gelu_tanh_argument(float x) {
    return 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
}

KRON_DEVICE float activate(Activation kind, float x) {
    switch (kind) {
        case Activation::gelu:
            return 0.5f * x * (1.0f + error_function(0.70710678118654752f * x));
        case Activation::gelu_tanh:
            return x * sigmoid(gelu_tanh_argument(x));
        case Activation::relu:
            return x < 0.0f ? 0.0f : x;  // a NaN stays one
        case Activation::silu:
            return quotient(x, 1.0f + exponential(-x));
        case Activation::none:
            break;
    }
    return x;
}

KRON_DEVICE float activation_slope(Activation kind, float x) {
    switch (kind) {
        case Activation::gelu: {
            const float normal = 0.5f * (1.0f + error_function(0.70710678118654752f * x));
            return normal + x * 0.39894228040143268f * exponential(-0.5f * x * x);
        }
        case Activation::gelu_tanh: {
            const float s = sigmoid(gelu_tanh_argument(x));
            return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
        }
        case Activation::relu:
            return x > 0.0f ? 1.0f : x <= 0.0f ? 0.0f : x;
        case Activation::silu: {
            const float s = sigmoid(x);
            return s * (1.0f + x * (1.0f - s));
        }
        case Activation::none:
            break;
    }
    return 1.0f;
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
