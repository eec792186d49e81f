// Arithmetic on two fp16 values in a word (a Half2): twice as many values an instruction as fp32. For what lies between
// two products and is rounded to bf16 or fp16 afterwards.
#pragma once

#include "cuda/common/values.h"
#include "kron/problem.h"

#ifndef __CUDACC__
#include "emulator/half2.h"
#else

namespace kron {
namespace cuda {
namespace device {

typedef uint32_t Half2;

KRON_DEVICE Half2 fma2(Half2 a, Half2 b, Half2 c) {
    Half2 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
KRON_DEVICE Half2 multiply2(Half2 a, Half2 b) {
    Half2 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// max(|a|, |b|), of a NaN and a number the number.
KRON_DEVICE float larger_magnitude(float a, float b) {
    return fmaxf(fabsf(a), fabsf(b));
}
// max(a, 0), a NaN for a NaN.
KRON_DEVICE Half2 positive_part2(Half2 a) {
    Half2 d;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0));
    return d;
}
// Off by 2^-11 at most.
KRON_DEVICE Half2 tanh2(Half2 a) {
    Half2 d;
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
// The low halves of two words, and the high ones.
KRON_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
}
KRON_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron

#endif

namespace kron {
namespace cuda {
namespace device {

// As two values of T, Bf16 or F16.
template <class T>
KRON_DEVICE uint32_t repack(Half2 a) {
    float low, high;
    unpack<F16>(a, low, high);
    return pack<T>(low, high);
}
// Times 1, for a register of its own: a wgmma operand's lie four in a row, which those that a loop adds up in do not.
template <>
KRON_DEVICE uint32_t repack<F16>(Half2 a) {
    return multiply2(a, 0x3c003c00);
}

// One of the values, twice.
KRON_DEVICE Half2 low2(Half2 a) {
    return low_halves(a, a);
}
KRON_DEVICE Half2 high2(Half2 a) {
    return high_halves(a, a);
}

// The activation of 2v where it is v (1 + tanh(v q(v^2))): q is a constant for silu, linear for gelu_tanh by its
// definition and for gelu by a fit, off by 2.7e-4 at most. Others take the value itself.
template <Activation kKind>
constexpr bool kTakesHalf = kKind == Activation::gelu || kKind == Activation::gelu_tanh || kKind == Activation::silu;

// 3.5 instructions of two values with the two of tanh2 and their packing counted in, for gelu and gelu_tanh.
template <Activation kKind>
KRON_DEVICE Half2 activate2(Half2 v) {
    if constexpr (kKind == Activation::silu) {
        return fma2(v, tanh2(v), v);
    } else if constexpr (kKind == Activation::gelu || kKind == Activation::gelu_tanh) {
        constexpr bool kErf = kKind == Activation::gelu;
        // gelu: 2 * 0.800157 and 8 * 0.0347009; gelu_tanh: 2 sqrt(2 / pi) and 8 * 0.044715 sqrt(2 / pi)
        constexpr Half2 kConstant = kErf ? 0x3e673e67 : 0x3e623e62, kSlope = kErf ? 0x34713471 : 0x34913491;
        const Half2 q = fma2(multiply2(v, v), kSlope, kConstant);
        return fma2(v, tanh2(multiply2(v, q)), v);
    } else if constexpr (kKind == Activation::relu) {
        return positive_part2(v);
    } else {
        return v;
    }
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
