// Element types of tensors as the kernels see them, and their conversion. float stands for itself.
#pragma once

#include "cuda/common/core.h"

#ifndef __CUDACC__
#include <cmath>
#include <cstring>

#include "kron/problem.h"
#endif

namespace kron {
namespace cuda {
namespace device {

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

#ifdef __CUDACC__

KRON_DEVICE float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}
KRON_DEVICE uint32_t float_to_bits(float value) {
    return __float_as_uint(value);
}
KRON_DEVICE float to_float(F16 value) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(value.bits));
    return f;
}
// Two neighbours in one word, the first in the low half.
template <class T>
KRON_DEVICE uint32_t pack(float low, float high);
template <>
KRON_DEVICE uint32_t pack<Bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
KRON_DEVICE uint32_t pack<F16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// A float rounded to the 10 bits of mantissa that TF32 products take.
KRON_DEVICE uint32_t to_tf32(float value) {
    uint32_t word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
    return word;
}

#else

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float to_float(F16 value) {
    Half half;
    std::memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
}
inline uint16_t round_to_bits(float value, Bf16) {
    if (value != value) return 0x7fff;
    const uint32_t bits = float_to_bits(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to_bits(float value, F16) {
    const Half half = static_cast<Half>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
template <class T>
inline uint32_t pack(float low, float high) {
    return round_to_bits(low, T{}) | static_cast<uint32_t>(round_to_bits(high, T{})) << 16;
}
// Ties away from zero, as cvt.rna does.
inline uint32_t to_tf32(float value) {
    const uint32_t bits = float_to_bits(value);
    return value != value || std::isinf(value) ? bits : (bits + 0x1000) & ~0x1fffu;
}

#endif

KRON_DEVICE float to_float(float value) {
    return value;
}
KRON_DEVICE float to_float(Bf16 value) {
    return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
template <class T>
KRON_DEVICE T from_float(float value) {
    return T{static_cast<uint16_t>(pack<T>(value, 0.0f))};
}
template <>
KRON_DEVICE float from_float<float>(float value) {
    return value;
}

// The two values of a word.
template <class T>
KRON_DEVICE void unpack(uint32_t word, float& low, float& high) {
    low = to_float(T{static_cast<uint16_t>(word)});
    high = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <>
KRON_DEVICE void unpack<Bf16>(uint32_t word, float& low, float& high) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
