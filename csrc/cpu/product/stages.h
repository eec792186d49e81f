// Moving activations from the caller's tensors into the kernels' tiles: conversion, zero padding to whole vectors, and
// the transpose of each token's matrix where the plan commutes the factors. output.h has the stores.
#pragma once

#include "cpu/isa/simd.h"

namespace kron {
namespace KRON_ISA {

template <class C>
KRON_INLINE int64_t padded(int64_t n) {
    return (n + Simd<C>::W - 1) / Simd<C>::W * Simd<C>::W;
}

// A row length for tiles that are read down a column: an odd number of cache lines, so that consecutive rows do not
// fall into the same few sets of L1.
template <class C>
KRON_INLINE int64_t row_step(int64_t n) {
    constexpr int64_t line = 64 / sizeof(C);
    const int64_t lines = (n + line - 1) / line;
    return (lines | 1) * line;
}

// The shuffles are instantiated for the dtypes that are to be fast; fp64 and fp16 are right, if slower (they would
// double the build time).
template <class C, class E>
constexpr bool kShuffles = __is_same(C, float) && !__is_same(E, f16);

// The functions below read E, compute in C and write O: C, or the type of a GEMM's rows.

// in: (rows, cols) row-major, row stride in_step -> out: same, row stride out_step, padded with zeros to whole vectors.
template <class C, class E, class O>
static void stage_rows(const E* in, int64_t in_step, int64_t rows, int64_t cols, O* out, int64_t out_step) {
    constexpr int W = Simd<C>::W;
    for (int64_t r = 0; r < rows; ++r) {
        const E* src = in + r * in_step;
        O* dst = out + r * out_step;
        int64_t c = 0;
        for (; c + W <= cols; c += W) store<C, O>(dst + c, load<C, E>(src + c));
        if (c < cols) store<C, O>(dst + c, load_part<C, E>(src + c, cols - c));
    }
}

// Columns [c, c + W) of one token: in (cols*Q) values, read as (cols, Q) -> v[q] = row q of its transpose, zero padded.
template <class C, class E, int Q>
KRON_INLINE void load_columns(const E* in, int64_t c, int64_t cols, Vec<C> (&v)[Q]) {
    constexpr int W = Simd<C>::W;
    if (cols - c >= W) {
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) v[q] = load<C, E>(in + c * Q + q * W);
    } else {
        for (int q = 0; q < Q; ++q) v[q] = load_part<C, E>(in + c * Q + q * W, (cols - c) * Q - q * W);
    }
    deinterleave<C, Q>(v);
}

// One token: in (cols*Q) values, read as (cols, Q) -> out (Q, cols), row stride out_step, zero padded.
template <class C, class E, class O, int Q>
static void split_columns(const E* in, int64_t cols, O* out, int64_t out_step) {
    for (int64_t c = 0; c < cols; c += Simd<C>::W) {
        Vec<C> v[Q];
        load_columns<C, E, Q>(in, c, cols, v);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) store<C, O>(out + q * out_step + c, v[q]);
    }
}

template <class C, class E, class O>
static void split_columns_any(const E* in, int64_t cols, int64_t width, O* out, int64_t out_step) {
    for (int64_t q = 0; q < width; ++q) {
        O* dst = out + q * out_step;
        for (int64_t c = 0; c < cols; ++c) put<C, O>(dst + c, get<C, E>(in + c * width + q));
        for (int64_t c = cols; c < padded<C>(cols); ++c) dst[c] = O{};
    }
}

// in: tokens of (cols, width), token stride in_step -> out: tokens of (width, cols), rows out_step apart.
template <class C, class E, class O>
static void stage_transposed(const E* in, int64_t in_step, int64_t tokens, int64_t cols, int64_t width, O* out,
                             int64_t out_step) {
    for (int64_t t = 0; t < tokens; ++t) {
        const E* src = in + t * in_step;
        O* dst = out + t * width * out_step;
        if constexpr (kShuffles<C, E>) {
            switch (width) {
                case 1:
                    split_columns<C, E, O, 1>(src, cols, dst, out_step);
                    continue;
                case 2:
                    split_columns<C, E, O, 2>(src, cols, dst, out_step);
                    continue;
                case 4:
                    split_columns<C, E, O, 4>(src, cols, dst, out_step);
                    continue;
                case 8:
                    split_columns<C, E, O, 8>(src, cols, dst, out_step);
                    continue;
                case 16:
                    split_columns<C, E, O, 16>(src, cols, dst, out_step);
                    continue;
            }
        }
        split_columns_any<C, E, O>(src, cols, width, dst, out_step);
    }
}

// Tokens of one operand, `stride` apart, as rows of the oriented problem: (outer, lanes) a token, rows `step` apart,
// zero padded. `from` may point at lane l of longer rows of `inner` lanes (commuted: at l * outer), to take only some
// of them.
template <class C, class E, class O>
static void stage_tokens(bool commuted, const E* from, int64_t stride, int64_t tokens, int64_t outer, int64_t inner,
                         int64_t lanes, O* to, int64_t step) {
    if (commuted)
        stage_transposed<C, E, O>(from, stride, tokens, lanes, outer, to, step);
    else
        for (int64_t t = 0; t < tokens; ++t)
            stage_rows<C, E, O>(from + t * stride, inner, outer, lanes, to + t * outer * step, step);
}

}  // namespace KRON_ISA
}  // namespace kron
