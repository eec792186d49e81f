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
//   reducing     as expanding, and of the accumulators sum_t L x_c . other_m for every c and m as well: a gradient of
//   C.
//                Where y is null, that alone
#pragma once

#include <cstdint>

#include "kron/problem.h"

namespace kron {
namespace cuda {

constexpr int kMostTiny = 16;
constexpr int64_t kMostTerms = 16;

enum class MmForm { contract, expand, reduce };

struct MmProjection {
    const void* large;  // (terms, lo, li), rows contiguous and aligned to 16 bytes
    int64_t large_term, large_row;
    const void* tiny;
    int64_t tiny_term, tiny_row, tiny_col;
    const void *bias, *base;  // null: none
    void* y;                  // null when only reducing
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
    // Reducing only: another tensor of tokens, with co parts of width lo, and the sums of each projection and block,
    // [m][row] of all halves' rows.
    const void* other;
    int64_t other_stride;
    bool other_vector;
    float* sums;
};

// The large factor's gradient (matmul_large_grad.cuh).
// Of a block: its part of the result, and the rows at a time: 64, or 32 of floats.
constexpr int kLargeGradPlain = 128, kLargeGradContracted = 64;
constexpr int large_grad_rows(int64_t value_bytes) {
    return int(128 / value_bytes);
}

struct LargeGradParams {
    const void *plain, *contracted;  // parts of widths plain_width and contracted_width
    int64_t plain_stride, contracted_stride;
    int plain_width, contracted_width, rows,
        parts;  // parts: of contracted; rows: after the contraction, and parts of plain
    bool right, plain_vector, contracted_vector;
    const void* tiny;  // (terms, rows, parts)
    int64_t tiny_term, tiny_row, tiny_col;
    int64_t tokens;
    int halves, terms;
    int plain_tiles, contracted_tiles;
    int64_t split_tokens;  // in halves
    float* sums;           // (splits, terms, plain_width, contracted_width)
};

}  // namespace cuda
}  // namespace kron
