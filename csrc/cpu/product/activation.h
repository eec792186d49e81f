// Activations applied to results while they are still in registers or L1.
#pragma once

#include <cmath>

#include "cpu/isa/simd.h"
#include "cpu/product/tail_tables.h"
#include "kron/problem.h"

namespace kron {
namespace KRON_ISA {

// An activation and, where it has them, its tables.
struct Act {
    Activation kind = Activation::none;
    const TailTable* tail = nullptr;
    const RoughTable* rough = nullptr;
};

static Act act_for(Activation kind) {
    const bool gelu = kind == Activation::gelu || kind == Activation::gelu_tanh;
    return Act{kind, gelu || kind == Activation::silu ? &tail_table(kind) : nullptr,
               gelu ? &rough_table(kind) : nullptr};
}

typedef Simd<float>::V Vf;
typedef Simd<float>::I Vi;

KRON_INLINE Vf select(Vi mask, Vf yes, Vf no) {
    return (Vf)(((Vi)yes & mask) | ((Vi)no & ~mask));
}
KRON_INLINE Vf clamp(Vf x, float low, float high) {
    // A NaN fails both comparisons and passes through.
    x = select(x < low, splat<float>(low), x);
    return select(x > high, splat<float>(high), x);
}
KRON_INLINE Vf power_of_two(Vi n) {
    return (Vf)((n + 127) << 23);
}

// exp on [-104, 88.7], relative error below 2 ulp; results below the smallest normal number are rounded twice.
KRON_INLINE Vf exp_vec(Vf x) {
    x = clamp(x, -104.0f, 88.72f);
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vf n = (x * 1.44269504088896341f + shift) - shift;
    Vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    // Taylor coefficients suffice: |r| <= ln(2) / 2.
    Vf p = splat<float>(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Vi whole = __builtin_convertvector(n, Vi);
    const Vi half = whole >> 1;
    return p * power_of_two(half) * power_of_two(whole - half);
}

// Zero below -86: what is left there is subnormal, and arithmetic on such numbers is a hundred times slower. (An
// infinite x then gives inf * 0, a NaN, as in torch.)
KRON_INLINE Vf sigmoid_vec(Vf x) {
    return select(x < -86.0f, Vf{}, 1.0f / (1.0f + exp_vec(clamp(-x, -104.0f, 86.0f))));
}

// Phi(x), the normal distribution. For a = |x|: Phi(-a) = exp(-a^2/2) * t P(t), t = 1 / (1 + a/4), where P is a
// degree-9 minimax fit (relative error 9e-9) on a <= 14.5. Working from the tail keeps the relative error small for
// negative x, where 1 + erf would cancel. Beyond 12.8 the tail is taken as zero: it would be subnormal, and slow.
KRON_INLINE Vf normal_vec(Vf x) {
    const Vi negative = x < 0.0f;
    const Vf magnitude = select(negative, -x, x);
    const Vf a = clamp(magnitude, 0.0f, 12.8f);
    const Vf t = 1.0f / (1.0f + 0.25f * a);
    Vf p = splat<float>(0.016892418f);
    p = p * t + -0.064537242f;
    p = p * t + 0.055879641f;
    p = p * t + 0.022610679f;
    p = p * t + 0.017734896f;
    p = p * t + 0.083851129f;
    p = p * t + 0.073012836f;
    p = p * t + 0.095287852f;
    p = p * t + 0.099521458f;
    p = p * t + 0.099746332f;
    // exp of a rounded square would lose a^2/2 ulp. The top 12 bits of a
    // have an exact square, so a^2 = high + rest without a fused multiply-add.
    const Vf top = (Vf)((Vi)a & static_cast<int32_t>(0xfffff000));
    const Vf high = top * top;
    const Vf rest = (a - top) * (a + top);
    const Vf u = -0.5f * rest;  // at most 0.08: four terms of its exponential
    const Vf correction = 1.0f + u * (1.0f + u * (0.5f + u * (1.0f / 6 + u * (1.0f / 24))));
    const Vf inside = exp_vec(-0.5f * high) * correction * (t * p);
    const Vf tail = select(magnitude > 12.8f, Vf{}, inside);
    return select(negative, tail, 1.0f - tail);
}
KRON_INLINE Vf gelu_vec(Vf x) {
    return x * normal_vec(x);
}

// 0.5 x (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
KRON_INLINE Vf gelu_tanh_vec(Vf x) {
    const Vf u = x * (1.0f + 0.044715f * x * x);
    return x * sigmoid_vec(1.5957691216057308f * u);
}

// By the formulas above, for any x.
template <Activation kKind>
KRON_INLINE Vf activate_exactly(Vf x) {
    switch (kKind) {
        case Activation::gelu:
            return gelu_vec(x);
        case Activation::gelu_tanh:
            return gelu_tanh_vec(x);
        case Activation::relu:
            return select(x < 0.0f, Vf{}, x);
        case Activation::silu:
            return x * sigmoid_vec(x);
        case Activation::none:
            break;
    }
    return x;
}

#if defined(__AVX512F__)
// The plain forms of min and max make GCC 12 warn of a variable of its own: with a mask of ones it does not.
constexpr __mmask16 kAllLanes = 0xffff;

template <class Table>
KRON_INLINE __m512 coefficient(const Table& table, int degree, __m512i piece) {
    const float* c = table.coefficient[degree];
    return _mm512_permutex2var_ps(_mm512_load_ps(c), piece, _mm512_load_ps(c + 16));
}
// sum_d coefficient[d] r^d of the piece that x * scale is nearest to, r the distance from it.
template <class Table>
KRON_INLINE __m512 piecewise(const Table& table, __m512 x) {
    const __m512 scale = _mm512_set1_ps(table.scale), shift = _mm512_set1_ps(12582912.0f);
    const __m512 shifted = _mm512_fmadd_ps(x, scale, shift);  // its low bits are the piece
    const __m512i piece = _mm512_castps_si512(shifted);
    const __m512 r = _mm512_fmsub_ps(x, scale, _mm512_sub_ps(shifted, shift));
    __m512 p = coefficient(table, Table::kDegree, piece);
#pragma GCC unroll 8
    for (int d = Table::kDegree - 1; d >= 0; --d) p = _mm512_fmadd_ps(p, r, coefficient(table, d, piece));
    return p;
}
// x F(x), right for x >= -limit: relu(x) - a F(-a) with a = min(|x|, limit), as F(-limit) no longer counts beside 1.
// 19 instructions; a NaN stays one, since max(0, x) is x there.
KRON_INLINE Vf fitted(const TailTable& tail, Vf x) {
    const __m512 a = _mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(tail.limit), _mm512_abs_ps((__m512)x));
    const __m512 relu = _mm512_maskz_max_ps(kAllLanes, _mm512_setzero_ps(), (__m512)x);
    return (Vf)_mm512_fnmadd_ps(a, piecewise(tail, a), relu);
}
// The same for |x| <= limit, in 9 instructions.
KRON_INLINE Vf fitted(const RoughTable& rough, Vf x) {
    return (Vf)_mm512_mul_ps((__m512)x, piecewise(rough, (__m512)x));
}

// Which inputs a table is right for, gathered over several vectors before one branch. NaNs are right anywhere.
struct Reach {
    __m512 extreme = _mm512_setzero_ps();
    KRON_INLINE void meet(const TailTable&, Vf x) { extreme = _mm512_maskz_min_ps(kAllLanes, (__m512)x, extreme); }
    KRON_INLINE void meet(const RoughTable&, Vf x) {
        constexpr int kLargestMagnitude = 0b1011;  // of the two, without its sign
        extreme = _mm512_maskz_range_ps(kAllLanes, extreme, (__m512)x, kLargestMagnitude);
    }
    KRON_INLINE bool beyond(const TailTable& tail) const {
        return _mm512_cmp_ps_mask(extreme, _mm512_set1_ps(-tail.limit), _CMP_LT_OQ) != 0;
    }
    KRON_INLINE bool beyond(const RoughTable& rough) const {
        return _mm512_cmp_ps_mask(extreme, _mm512_set1_ps(rough.limit), _CMP_GT_OQ) != 0;
    }
};
constexpr bool kFitted = true;
#else
template <class Table>
KRON_INLINE Vf fitted(const Table&, Vf x) {
    return x;
}
struct Reach {
    template <class Table>
    KRON_INLINE void meet(const Table&, Vf) {}
    template <class Table>
    KRON_INLINE bool beyond(const Table&) const {
        return true;
    }
};
constexpr bool kFitted = false;
#endif

template <Activation kKind>
constexpr bool kHasTable =
    kFitted && (kKind == Activation::gelu || kKind == Activation::gelu_tanh || kKind == Activation::silu);

// In vectors of 16 lanes nearly all inputs take the table; a lane far in the tail sends its vector the long way.
template <Activation kKind>
KRON_INLINE Vf activate(Act act, Vf x) {
    if constexpr (kHasTable<kKind>) {
        Reach reach;
        reach.meet(*act.tail, x);
        if (__builtin_expect(!reach.beyond(*act.tail), true)) return fitted(*act.tail, x);
    }
    return activate_exactly<kKind>(x);
}

KRON_INLINE Vf activate(Act act, Vf x) {
    switch (act.kind) {
        case Activation::gelu:
            return activate<Activation::gelu>(act, x);
        case Activation::gelu_tanh:
            return activate<Activation::gelu_tanh>(act, x);
        case Activation::relu:
            return activate<Activation::relu>(act, x);
        case Activation::silu:
            return activate<Activation::silu>(act, x);
        case Activation::none:
            break;
    }
    return x;
}

static double activate_scalar(Activation kind, double x) {
    switch (kind) {
        case Activation::gelu:
            return 0.5 * x * ::erfc(-x * 0.70710678118654752440);
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + ::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
        case Activation::relu:
            return x < 0 ? 0 : x;
        case Activation::silu:
            return x / (1 + ::exp(-x));
        case Activation::none:
            break;
    }
    return x;
}

KRON_INLINE Simd<double>::V activate(Act act, Simd<double>::V x) {
    if (act.kind == Activation::none) return x;
    for (int i = 0; i < Simd<double>::W; ++i) x[i] = activate_scalar(act.kind, x[i]);
    return x;
}

}  // namespace KRON_ISA
}  // namespace kron
