// The product with one large and one tiny factor, as its kernels see it.
//
// With the tiny factor C (co x ci, each at most 16) and the large one L (lo x li) a token's y is
//   y_g (lo) = sum_s sum_c C_s[g, c] L_s x_c        x_c (li), c < ci;  g < co
// where x_c is the run of li values at c * li of a token when the tiny factor is the left one (A), and every ci-th
// value from c on when it is the right one (B); y_g likewise. A GEMM with L has G rows a token:
//   contracting  G = co rows z_g = sum_c C[g, c] x_c made while x is loaded; the terms follow each other along its
//   inner
//                dimension
//   expanding    G = ci rows x_c; y_g = sum_c C[g, c] (L x_c) is made of the accumulators
#pragma once

#include <cstdint>

#include "kron/problem.h"

namespace kron {
namespace cuda {

constexpr int kMostTiny = 16;
constexpr int64_t kMostTerms = 16;

struct MmProjection {
    const void* large;  // (terms, lo, li), rows contiguous and aligned to 16 bytes
    int64_t large_term, large_row;
    const void* tiny;
    int64_t tiny_term, tiny_row, tiny_col;
    const void *bias, *base;  // null: none
    void* y;
};

struct MmParams {
    const void* x;
    int64_t x_stride, tokens;
    int terms, co, ci, lo, li;
    bool right;      // the tiny factor is B
    int halves;      // contracting with co > 8: a token is two of the kernel's, of 8 rows each
    bool x_vector;   // x can be read in words of 16 bytes
    bool y_vector;   // y, bias and base can be accessed so
    int term_inner;  // li rounded up to a step of the tensor cores
    int inner;       // terms * term_inner
    int panel;       // of the inner dimension, as much as is in shared memory at a time: a multiple of a tile
    int row_tiles, column_tiles, split_tiles, column_splits;  // a block has split_tiles of the tiles of columns
    int count;
    float alpha;
    Activation activation;
    MmProjection projections[kMostProjections];
};

}  // namespace cuda
}  // namespace kron
