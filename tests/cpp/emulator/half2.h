// csrc/cuda/common/half2.h on the emulated machine.
#pragma once

#include <cmath>
#include <cstring>

#include "kron/problem.h"

namespace kron {
namespace cuda {
namespace device {

typedef uint32_t Half2;

template <class F>
inline Half2 each_half(Half2 a, Half2 b, Half2 c, F f) {
    Half x[3][2];
    std::memcpy(x[0], &a, 4), std::memcpy(x[1], &b, 4), std::memcpy(x[2], &c, 4);
    // In double: a product of two halves is exact there and is rounded once with the sum.
    for (int i = 0; i < 2; ++i)
        x[0][i] = static_cast<Half>(
            f(static_cast<double>(x[0][i]), static_cast<double>(x[1][i]), static_cast<double>(x[2][i])));
    std::memcpy(&a, x[0], 4);
    return a;
}
inline Half2 fma2(Half2 a, Half2 b, Half2 c) {
    return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline Half2 multiply2(Half2 a, Half2 b) {
    return each_half(a, b, 0, [](double x, double y, double) { return x * y; });
}
inline Half2 positive_part2(Half2 a) {
    return each_half(a, 0, 0, [](double x, double, double) { return x < 0 ? 0 : x; });
}
// As far off as the device may be, one way or the other.
inline Half2 tanh2(Half2 a) {
    return each_half(a, 0, 0, [](double x, double, double) {
        const double sign = std::fmod(std::fabs(x) * 4096, 2) < 1 ? 1 : -1;
        return std::tanh(x) * (1 + sign * 0x1p-11);
    });
}
inline uint32_t low_halves(uint32_t a, uint32_t b) {
    return (a & 0xffff) | b << 16;
}
inline uint32_t high_halves(uint32_t a, uint32_t b) {
    return a >> 16 | (b & 0xffff0000u);
}
inline float larger_magnitude(float a, float b) {
    return std::fmax(std::fabs(a), std::fabs(b));
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
