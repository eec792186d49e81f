// The middle of a feed-forward block in backward: the activation's values, and the gradient through it.
#pragma once

#include "cpu/product/activation.h"

namespace kron {
namespace KRON_ISA {

template <Activation kKind>
KRON_INLINE Vf derivative(Vf x) {
    switch (kKind) {
        case Activation::gelu:  // Phi(x) + x phi(x)
            return normal_vec(x) + x * (0.3989422804014327f * exp_vec(-0.5f * x * x));
        case Activation::gelu_tanh: {  // x s(v): s + x s (1 - s) v'
            const Vf s = sigmoid_vec(1.5957691216057308f * x * (1.0f + 0.044715f * x * x));
            return s + x * s * (1.0f - s) * (1.5957691216057308f * (1.0f + 0.134145f * x * x));
        }
        case Activation::relu:
            return select(x > 0.0f, splat<float>(1.0f), Vf{});
        case Activation::silu: {
            const Vf s = sigmoid_vec(x);
            return s * (1.0f + x * (1.0f - s));
        }
        case Activation::none:
            break;
    }
    return splat<float>(1.0f);
}

static double derivative(Activation kind, double x) {
    switch (kind) {
        case Activation::gelu:
            return 0.5 * ::erfc(-x * 0.70710678118654752440) + x * 0.39894228040143267794 * ::exp(-0.5 * x * x);
        case Activation::gelu_tanh: {
            const double s = 1 / (1 + ::exp(-1.5957691216057307 * x * (1 + 0.044715 * x * x)));
            return s + x * s * (1 - s) * 1.5957691216057307 * (1 + 0.134145 * x * x);
        }
        case Activation::relu:
            return x > 0;
        case Activation::silu: {
            const double s = 1 / (1 + ::exp(-x));
            return s * (1 + x * (1 - s));
        }
        case Activation::none:
            break;
    }
    return 1;
}

// For elements [from, to): grad null: out = act(h); otherwise out = grad * act'(h). out may be grad.
template <class E, Activation kKind>
static void activation_range(Act act, const E* h, const E* grad, E* out, int64_t from, int64_t to) {
    constexpr int W = Simd<float>::W;
    int64_t i = from;
    for (; i + W <= to; i += W) {
        const Vf x = load<float, E>(h + i);
        store<float, E>(out + i, grad ? load<float, E>(grad + i) * derivative<kKind>(x) : activate<kKind>(act, x));
    }
    if (i == to) return;
    const Vf x = load_part<float, E>(h + i, to - i);
    const Vf y = grad ? load_part<float, E>(grad + i, to - i) * derivative<kKind>(x) : activate<kKind>(act, x);
    store_part<float, E>(out + i, y, to - i);
}

template <class E>
static void activation_range(Activation kind, const E* h, const E* grad, E* out, int64_t from, int64_t to) {
    if constexpr (__is_same(E, double)) {
        for (int64_t i = from; i < to; ++i)
            out[i] = grad ? grad[i] * derivative(kind, h[i]) : activate_scalar(kind, h[i]);
    } else {
        const Act act = act_for(kind);
        switch (kind) {
            case Activation::gelu:
                return activation_range<E, Activation::gelu>(act, h, grad, out, from, to);
            case Activation::gelu_tanh:
                return activation_range<E, Activation::gelu_tanh>(act, h, grad, out, from, to);
            case Activation::relu:
                return activation_range<E, Activation::relu>(act, h, grad, out, from, to);
            case Activation::silu:
                return activation_range<E, Activation::silu>(act, h, grad, out, from, to);
            case Activation::none:
                return activation_range<E, Activation::none>(act, h, grad, out, from, to);
        }
    }
}

}  // namespace KRON_ISA
}  // namespace kron
