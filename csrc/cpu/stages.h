// Moving activations between the caller's tensors and the kernels' tiles: conversion to the compute type, zero padding
// to whole vectors, and the transpose of each token's matrix where the plan commutes the factors.
#pragma once

#include "activation.h"
#include "simd.h"

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

// in: (rows, cols) row-major, row stride in_step -> out: same, row stride out_step, padded with zeros to whole vectors.
template <class C, class E>
static void stage_rows(const E* in, int64_t in_step, int64_t rows, int64_t cols, C* out, int64_t out_step) {
    constexpr int W = Simd<C>::W;
    for (int64_t r = 0; r < rows; ++r) {
        const E* src = in + r * in_step;
        C* dst = out + r * out_step;
        int64_t c = 0;
        for (; c + W <= cols; c += W) store<C>(dst + c, load<C, E>(src + c));
        if (c < cols) store<C>(dst + c, load_part<C, E>(src + c, cols - c));
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
template <class C, class E, int Q>
static void split_columns(const E* in, int64_t cols, C* out, int64_t out_step) {
    for (int64_t c = 0; c < cols; c += Simd<C>::W) {
        Vec<C> v[Q];
        load_columns<C, E, Q>(in, c, cols, v);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) store<C>(out + q * out_step + c, v[q]);
    }
}

template <class C, class E>
static void split_columns_any(const E* in, int64_t cols, int64_t width, C* out, int64_t out_step) {
    for (int64_t q = 0; q < width; ++q) {
        C* dst = out + q * out_step;
        for (int64_t c = 0; c < cols; ++c) dst[c] = get<C, E>(in + c * width + q);
        for (int64_t c = cols; c < padded<C>(cols); ++c) dst[c] = 0;
    }
}

// in: tokens of (cols, width), token stride in_step -> out: tokens of (width, cols), rows out_step apart.
template <class C, class E>
static void stage_transposed(const E* in, int64_t in_step, int64_t tokens, int64_t cols, int64_t width, C* out,
                             int64_t out_step) {
    for (int64_t t = 0; t < tokens; ++t) {
        const E* src = in + t * in_step;
        C* dst = out + t * width * out_step;
        if constexpr (kShuffles<C, E>) {
            switch (width) {
                case 1:
                    split_columns<C, E, 1>(src, cols, dst, out_step);
                    continue;
                case 2:
                    split_columns<C, E, 2>(src, cols, dst, out_step);
                    continue;
                case 4:
                    split_columns<C, E, 4>(src, cols, dst, out_step);
                    continue;
                case 8:
                    split_columns<C, E, 8>(src, cols, dst, out_step);
                    continue;
                case 16:
                    split_columns<C, E, 16>(src, cols, dst, out_step);
                    continue;
            }
        }
        split_columns_any<C, E>(src, cols, width, dst, out_step);
    }
}

// Tokens of one operand, `stride` apart, as rows of the oriented problem: (outer, lanes) a token, rows `step` apart,
// zero padded. `from` may point at lane l of longer rows of `inner` lanes (commuted: at l * outer), to take only some
// of them.
template <class C, class E>
static void stage_tokens(bool commuted, const E* from, int64_t stride, int64_t tokens, int64_t outer, int64_t inner,
                         int64_t lanes, C* to, int64_t step) {
    if (commuted)
        stage_transposed<C, E>(from, stride, tokens, lanes, outer, to, step);
    else
        for (int64_t t = 0; t < tokens; ++t)
            stage_rows<C, E>(from + t * stride, inner, outer, lanes, to + t * outer * step, step);
}

// A tile of results on its way out: bias (compute type, y's layout, or null), activation, conversion.
template <class C>
struct Finish {
    const C* bias;
    Activation activation;
    KRON_INLINE Vec<C> vec(Vec<C> v, int64_t at) const {
        if (bias) v += load<C>(bias + at);
        return activate(activation, v);
    }
    KRON_INLINE Vec<C> part(Vec<C> v, int64_t at, int64_t count) const {
        if (bias) v += load_part<C, C>(bias + at, count);
        return activate(activation, v);
    }
};

// tile: rows of `count` valid lanes, tile_step apart -> y rows, y_step apart; row r finishes with bias[at + (r %
// period)
// * bias_step].
template <class C, class E>
static void finish_rows(const C* tile, int64_t tile_step, int64_t rows, int64_t count, E* y, int64_t y_step,
                        Finish<C> finish, int64_t at, int64_t bias_step, int64_t period) {
    constexpr int W = Simd<C>::W;
    for (int64_t r = 0; r < rows; ++r) {
        const C* src = tile + r * tile_step;
        E* dst = y + r * y_step;
        const int64_t from = at + (r % period) * bias_step;
        int64_t c = 0;
        for (; c + W <= count; c += W) store<C, E>(dst + c, finish.vec(load<C>(src + c), from + c));
        if (c < count) store_part<C, E>(dst + c, finish.part(load<C>(src + c), from + c, count - c), count - c);
    }
}

// The inverse of load_columns: rows v[q] -> columns [c, c + W) of y (cols, Q), finished with bias[at + position in y].
template <class C, class E, int Q>
KRON_INLINE void store_columns(Vec<C> (&v)[Q], int64_t c, int64_t cols, E* y, const Finish<C>& finish, int64_t at) {
    constexpr int W = Simd<C>::W;
    interleave<C, Q>(v);
    const int64_t left = (cols - c) * Q;
    if (left >= W * Q) {
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) store<C, E>(y + c * Q + q * W, finish.vec(v[q], at + c * Q + q * W));
    } else {
        for (int q = 0; q < Q; ++q) {
            const int64_t count = left - q * W;
            if (count > 0) store_part<C, E>(y + c * Q + q * W, finish.part(v[q], at + c * Q + q * W, count), count);
        }
    }
}

// One token: tile (Q, cols) -> y (cols, Q) contiguous.
template <class C, class E, int Q>
static void merge_columns(const C* tile, int64_t tile_step, int64_t cols, E* y, Finish<C> finish, int64_t at) {
    for (int64_t c = 0; c < cols; c += Simd<C>::W) {
        Vec<C> v[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) v[q] = load<C>(tile + q * tile_step + c);
        store_columns<C, E, Q>(v, c, cols, y, finish, at);
    }
}

template <class C, class E>
static void merge_columns_any(const C* tile, int64_t tile_step, int64_t cols, int64_t width, E* y, Finish<C> finish,
                              int64_t at) {
    constexpr int W = Simd<C>::W;
    const int64_t total = cols * width;
    for (int64_t i = 0; i < total; i += W) {
        const int64_t count = total - i < W ? total - i : W;
        Vec<C> v{};
        for (int64_t l = 0; l < count; ++l) v[l] = tile[(i + l) % width * tile_step + (i + l) / width];
        store_part<C, E>(y + i, finish.part(v, at + i, count), count);
    }
}

// tile: tokens of (width, cols), rows tile_step apart -> y tokens of (cols, width), y_step apart.
template <class C, class E>
static void finish_transposed(const C* tile, int64_t tile_step, int64_t tokens, int64_t cols, int64_t width, E* y,
                              int64_t y_step, Finish<C> finish, int64_t at) {
    for (int64_t t = 0; t < tokens; ++t) {
        const C* src = tile + t * width * tile_step;
        E* dst = y + t * y_step;
        if constexpr (kShuffles<C, E>) {
            switch (width) {
                case 1:
                    merge_columns<C, E, 1>(src, tile_step, cols, dst, finish, at);
                    continue;
                case 2:
                    merge_columns<C, E, 2>(src, tile_step, cols, dst, finish, at);
                    continue;
                case 4:
                    merge_columns<C, E, 4>(src, tile_step, cols, dst, finish, at);
                    continue;
                case 8:
                    merge_columns<C, E, 8>(src, tile_step, cols, dst, finish, at);
                    continue;
                case 16:
                    merge_columns<C, E, 16>(src, tile_step, cols, dst, finish, at);
                    continue;
            }
        }
        merge_columns_any<C, E>(src, tile_step, cols, width, dst, finish, at);
    }
}

}  // namespace KRON_ISA
}  // namespace kron
