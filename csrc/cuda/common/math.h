// Arithmetic on fp32 registers by one instruction each.
#pragma once

#include "cuda/common/core.h"

#ifndef __CUDACC__
#include <cmath>
#endif

namespace kron {
namespace cuda {
namespace device {

#ifdef __CUDACC__

KRON_DEVICE float magnitude(float x) {
    return fabsf(x);
}
KRON_DEVICE float multiply_add(float x, float y, float z) {
    return fmaf(x, y, z);
}
// 2^x, relative error 2^-22; subnormal results are 0.
KRON_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, relative error 2^-23; subnormal results are 0.
KRON_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / sqrt(x) of a normal number, relative error 2^-22.
KRON_DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// max(x, 0), a NaN for a NaN.
KRON_DEVICE float positive_part(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
// min(x, y), a NaN for a NaN.
KRON_DEVICE float smaller(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

#else

inline float magnitude(float x) {
    return std::fabs(x);
}
inline float multiply_add(float x, float y, float z) {
    return std::fma(x, y, z);
}
inline float exp2_approx(float x) {
    return std::exp2(x);
}
inline float reciprocal_approx(float x) {
    return 1 / x;
}
inline float reciprocal_root(float x) {
    return 1 / std::sqrt(x);
}
inline float positive_part(float x) {
    return x < 0 ? 0 : x;
}
inline float smaller(float x, float y) {
    return x > y ? y : x;
}

#endif

}  // namespace device
}  // namespace cuda
}  // namespace kron
