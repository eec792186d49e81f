// Piecewise polynomials for activations of the form x * F(x) with F(-a) = 1 - F(a): GELU (F is the normal
// distribution), its tanh form and SiLU (F is a logistic function). Fitted once a process, in double precision.
#pragma once

#include "kron/problem.h"

namespace kron {

// 32 pieces, so that a lane's coefficient is one permute of two vectors.
constexpr int kPieces = 32;

// F(-a) for 0 <= a <= limit, from which x F(x) comes within 3 ulp of fp32 for x >= -limit: piece k = round(a * scale),
// r = a * scale - k in [-1/2, 1/2], sum_d coefficient[d][k] r^d.
struct TailTable {
    static constexpr int kDegree = 6;
    alignas(64) float coefficient[kDegree + 1][kPieces];
    float scale, limit;
};

// F(x) itself for |x| <= limit, off by 1e-4 at most: for sums that are rounded to bf16 afterwards. n = round(x * scale)
// is in [-16, 15], piece n mod 32.
struct RoughTable {
    static constexpr int kDegree = 2;
    alignas(64) float coefficient[kDegree + 1][kPieces];
    float scale, limit;
};

// For gelu, gelu_tanh and silu; the rough one for the first two.
const TailTable& tail_table(Activation activation);
const RoughTable& rough_table(Activation activation);

}  // namespace kron
