// Activations and their slopes on fp32 registers, for the accumulators of a GEMM.
//
// Instructions a value on sm_80 and sm_90 (MUFU: those of the unit for transcendental functions, at an eighth to a
// quarter of the rate of the others), and the largest error against fp64 with exact powers of two, relative to
// max(1, |x|):
//
//                     value                    value and gradient
//   gelu          9 + 1 MUFU,  1.8e-7         16 + 2 MUFU,  3.1e-7
//   gelu_tanh    11 + 1 MUFU,  2.0e-7         20 + 1 MUFU,  7.2e-7
//   silu          3 + 2 MUFU,  1.5e-7          6 + 2 MUFU,  1.0e-6
//   relu          1                            3
//
// gelu and gelu_tanh are x F(x) with F a sigmoid, F(-a) = 1 - F(a). Written x F(x) = max(x, 0) - a F(-a), a = |x|,
// nothing cancels; and log2 F(-a) is so smooth that a short polynomial gives F(-a) as one power of two. Its
// coefficients are a minimax fit weighted by a F(-a), which makes the error of the result even. A NaN stays one.
#pragma once

#include "cuda/common/math.h"
#include "kron/problem.h"

namespace kron {
namespace cuda {
namespace device {

// Beyond the end of a fit the tail is what it is there: below 1e-15.
template <Activation kKind>
constexpr float kTailEnd = kKind == Activation::gelu ? 9.0f : 7.0f;

// F(-a) for 0 <= a <= kTailEnd.
template <Activation kKind>
KRON_DEVICE float tail(float a) {
    if constexpr (kKind == Activation::gelu) {  // the normal distribution
        float p = 2.8224036213941872e-05f;
        p = multiply_add(p, a, -0.000724394922144711f);
        p = multiply_add(p, a, 0.007926170714199543f);
        p = multiply_add(p, a, -0.05316208675503731f);
        p = multiply_add(p, a, -0.4589645564556122f);
        p = multiply_add(p, a, -1.1511375904083252f);
        return exp2_approx(multiply_add(p, a, -0.9999993443489075f));
    } else {  // the logistic function of sqrt(8/pi) (x + 0.044715 x^3)
        float p = -2.5776373149710707e-05f;
        p = multiply_add(p, a, 0.0004247873439453542f);
        p = multiply_add(p, a, -0.0023264267947524786f);
        p = multiply_add(p, a, 0.0034014908596873283f);
        p = multiply_add(p, a, 0.004417571239173412f);
        p = multiply_add(p, a, -0.049880169332027435f);
        p = multiply_add(p, a, -0.45957526564598083f);
        p = multiply_add(p, a, -1.1510822772979736f);
        return exp2_approx(multiply_add(p, a, -0.9999995827674866f));
    }
}

KRON_DEVICE float logistic(float x) {
    return reciprocal_approx(1.0f + exp2_approx(-1.44269504088896341f * x));
}

template <Activation kKind>
KRON_DEVICE float activate(float x) {
    if constexpr (kKind == Activation::gelu || kKind == Activation::gelu_tanh) {
        const float a = smaller(magnitude(x), kTailEnd<kKind>);
        return multiply_add(-a, tail<kKind>(a), positive_part(x));
    } else if constexpr (kKind == Activation::silu) {
        return x * logistic(x);
    } else if constexpr (kKind == Activation::relu) {
        return positive_part(x);
    } else {
        return x;
    }
}

// The value; its slope is multiplied into `grad`.
template <Activation kKind>
KRON_DEVICE float activate_backward(float x, float& grad) {
    if constexpr (kKind == Activation::gelu || kKind == Activation::gelu_tanh) {
        const float a = smaller(magnitude(x), kTailEnd<kKind>), f = tail<kKind>(a);
        // F(x) + x F'(x), which is one less its value at -x. Where the fit ends F' is 0: there a may stand for |x|.
        float slope;
        if constexpr (kKind == Activation::gelu) {
            // F' = exp(-a^2 / 2) / sqrt(2 pi) as a power of two
            slope = multiply_add(-a, exp2_approx(multiply_add(a * a, -0.72134752044448170f, -1.3257480647361593f)), f);
        } else {
            const float speed = multiply_add(a * a, 1.5957691216057308f * 0.134145f, 1.5957691216057308f);
            slope = multiply_add(-a * speed, multiply_add(-f, f, f), f);
        }
        grad *= x > 0 ? 1.0f - slope : slope;
        return multiply_add(-a, f, positive_part(x));
    } else if constexpr (kKind == Activation::silu) {
        const float s = logistic(x), value = x * s;
        grad *= multiply_add(value, 1.0f - s, s);
        return value;
    } else if constexpr (kKind == Activation::relu) {
        grad = x <= 0 ? 0.0f : grad;
        return positive_part(x);
    } else {
        return x;
    }
}

// The same of a kind known at run time only.
KRON_DEVICE float activate(Activation kind, float x) {
    switch (kind) {
        case Activation::gelu:
            return activate<Activation::gelu>(x);
        case Activation::gelu_tanh:
            return activate<Activation::gelu_tanh>(x);
        case Activation::relu:
            return activate<Activation::relu>(x);
        case Activation::silu:
            return activate<Activation::silu>(x);
        case Activation::none:
            break;
    }
    return x;
}

KRON_DEVICE float activation_slope(Activation kind, float x) {
    float slope = 1;
    switch (kind) {
        case Activation::gelu:
            activate_backward<Activation::gelu>(x, slope);
            break;
        case Activation::gelu_tanh:
            activate_backward<Activation::gelu_tanh>(x, slope);
            break;
        case Activation::relu:
            activate_backward<Activation::relu>(x, slope);
            break;
        case Activation::silu:
            activate_backward<Activation::silu>(x, slope);
            break;
        case Activation::none:
            break;
    }
    return slope;
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
