// Piecewise polynomials for activations of the form x * F(x) with F(-a) = 1 - F(a): GELU (F is the normal
// distribution), its tanh form and SiLU (F is a logistic function). Fitted once a process, in double precision.
#pragma once

#include "kron/problem.h"

namespace kron {

// F(-a) for 0 <= a <= limit: piece k = round(a * scale), r = a * scale - k in [-1/2, 1/2], sum_d coefficient[d][k] r^d.
// 32 pieces, so that a lane's coefficient is one permute of two vectors.
struct TailTable {
    static constexpr int kPieces = 32, kDegree = 6;
    alignas(64) float coefficient[kDegree + 1][kPieces];
    int degree;  // terms above it are zero
    float scale, limit;
};

// `rough`: degree 2, F off by 4e-5 at most: for results that are rounded to bf16. Otherwise degree 6, x F(x) within 3
// ulp of fp32 down to -limit. Only for gelu, gelu_tanh and silu.
const TailTable& tail_table(Activation activation, bool rough);

}  // namespace kron
