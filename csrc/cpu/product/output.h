// From the kernels' tiles to the caller's tensor: bias, activation, conversion, the transpose back, and the layer norm
// of a whole token's results.
#pragma once

#include "cpu/product/activation.h"
#include "cpu/product/stages.h"

namespace kron {
namespace KRON_ISA {

// What happens to a result before it is stored in y: bias (compute type, y's layout, or null), base (as y, or null; not
// both), activation.
template <class C, class E>
struct Finish {
    const C* bias;
    Act act;
    const E *base = nullptr, *y = nullptr;
    // v: results for `to`, whose bias is at `at`.
    KRON_INLINE void vec(Vec<C> v, int64_t at, E* to) const {
        if (bias) v += load<C>(bias + at);
        if (base) v += load<C, E>(base + (to - y));
        store<C, E>(to, activate(act, v));
    }
    KRON_INLINE void part(Vec<C> v, int64_t at, E* to, int64_t count) const {
        if (bias) v += load_part<C, C>(bias + at, count);
        if (base) v += load_part<C, E>(base + (to - y), count);
        store_part<C, E>(to, activate(act, v), count);
    }
};

// tile: rows of `count` valid lanes, tile_step apart -> y rows, y_step apart; row r finishes with bias[at + (r %
// period)
// * bias_step].
template <class C, class E>
static void finish_rows(const C* tile, int64_t tile_step, int64_t rows, int64_t count, E* y, int64_t y_step,
                        Finish<C, E> finish, int64_t at, int64_t bias_step, int64_t period) {
    constexpr int W = Simd<C>::W;
    for (int64_t r = 0; r < rows; ++r) {
        const C* src = tile + r * tile_step;
        E* dst = y + r * y_step;
        const int64_t from = at + (r % period) * bias_step;
        int64_t c = 0;
        for (; c + W <= count; c += W) finish.vec(load<C>(src + c), from + c, dst + c);
        if (c < count) finish.part(load<C>(src + c), from + c, dst + c, count - c);
    }
}

// In place: rows of `count` values, a whole number of vectors.
template <class C>
static void activate_rows(C* rows, int64_t count_rows, int64_t step, int64_t count, Act act) {
    for (int64_t r = 0; r < count_rows; ++r)
        for (int64_t c = 0; c < count; c += Simd<C>::W)
            store<C>(rows + r * step + c, activate(act, load<C>(rows + r * step + c)));
}

// The inverse of load_columns: rows v[q] -> columns [c, c + W) of y (cols, Q), finished with bias[at + position in y].
template <class C, class E, int Q>
KRON_INLINE void store_columns(Vec<C> (&v)[Q], int64_t c, int64_t cols, E* y, const Finish<C, E>& finish, int64_t at) {
    constexpr int W = Simd<C>::W;
    interleave<C, Q>(v);
    const int64_t left = (cols - c) * Q;
    if (left >= W * Q) {
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) finish.vec(v[q], at + c * Q + q * W, y + c * Q + q * W);
    } else {
        for (int q = 0; q < Q; ++q) {
            const int64_t count = left - q * W;
            if (count > 0) finish.part(v[q], at + c * Q + q * W, y + c * Q + q * W, count);
        }
    }
}

// One token: tile (Q, cols) -> y (cols, Q) contiguous.
template <class C, class E, int Q>
static void merge_columns(const C* tile, int64_t tile_step, int64_t cols, E* y, Finish<C, E> finish, int64_t at) {
    for (int64_t c = 0; c < cols; c += Simd<C>::W) {
        Vec<C> v[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) v[q] = load<C>(tile + q * tile_step + c);
        store_columns<C, E, Q>(v, c, cols, y, finish, at);
    }
}

template <class C, class E>
static void merge_columns_any(const C* tile, int64_t tile_step, int64_t cols, int64_t width, E* y, Finish<C, E> finish,
                              int64_t at) {
    constexpr int W = Simd<C>::W;
    const int64_t total = cols * width;
    for (int64_t i = 0; i < total; i += W) {
        const int64_t count = total - i < W ? total - i : W;
        Vec<C> v{};
        for (int64_t l = 0; l < count; ++l) v[l] = tile[(i + l) % width * tile_step + (i + l) / width];
        finish.part(v, at + i, y + i, count);
    }
}

// tile: tokens of (width, cols), rows tile_step apart -> y tokens of (cols, width), y_step apart.
template <class C, class E>
static void finish_transposed(const C* tile, int64_t tile_step, int64_t tokens, int64_t cols, int64_t width, E* y,
                              int64_t y_step, Finish<C, E> finish, int64_t at) {
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

// row (padded to whole vectors) = one + other over `size` values.
template <class C, class E>
static void add_rows(const E* one, const E* other, int64_t size, C* row) {
    constexpr int W = Simd<C>::W;
    int64_t c = 0;
    for (; c + W <= size; c += W) store<C>(row + c, load<C, E>(one + c) + load<C, E>(other + c));
    if (c < size) store<C>(row + c, load_part<C, E>(one + c, size - c) + load_part<C, E>(other + c, size - c));
}

// out = layer_norm(row) * weight + bias over `size` values; row padded to whole vectors.
template <class C, class E>
static void norm_row(const C* row, int64_t size, const E* weight, const E* bias, C eps, E* out) {
    constexpr int W = Simd<C>::W;
    const int64_t whole = size / W * W, rest = size - whole;
    Vec<C> sums[2] = {};
    for (int64_t c = 0; c < whole; c += W) sums[c / W % 2] += load<C>(row + c);
    C mean = horizontal_sum<C>(sums[0] + sums[1]);
    for (int64_t c = whole; c < size; ++c) mean += row[c];
    mean /= static_cast<C>(size);
    Vec<C> squares[2] = {};
    for (int64_t c = 0; c < whole; c += W) {
        const Vec<C> d = load<C>(row + c) - mean;
        squares[c / W % 2] += d * d;
    }
    C variance = horizontal_sum<C>(squares[0] + squares[1]);
    for (int64_t c = whole; c < size; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const C scale = 1 / square_root(variance / static_cast<C>(size) + eps);
    for (int64_t c = 0; c < whole; c += W)
        store<C, E>(out + c, (load<C>(row + c) - mean) * scale * load<C, E>(weight + c) + load<C, E>(bias + c));
    if (rest)
        store_part<C, E>(out + whole,
                         (load<C>(row + whole) - mean) * scale * load_part<C, E>(weight + whole, rest) +
                             load_part<C, E>(bias + whole, rest),
                         rest);
}

// y[t] = layer_norm(residual[t] + y[t]) * weight + bias, in place over tokens of `size` values that are still in cache.
template <class C, class E>
struct Norm {
    const E* residual;  // null: no norm
    int64_t residual_stride;
    const E *weight, *bias;
    double eps;

    // row: scratch of `size` values, padded to whole vectors.
    void apply(E* y, int64_t first, int64_t tokens, int64_t size, C* row) const {
        for (int64_t t = first; t < first + tokens; ++t) {
            add_rows<C, E>(y + t * size, residual + t * residual_stride, size, row);
            norm_row<C, E>(row, size, weight, bias, static_cast<C>(eps), y + t * size);
        }
    }
};

// Where results go: y (tokens, m) in the caller's layout, of which the oriented problem sees (m1, m2) or, commuted, its
// transpose.
template <class C, class E>
struct Output {
    E* y;
    bool commuted;
    int64_t m1, m2;
    const C* bias;  // (m1*m2,) in y's layout, or null
    Act act;
    const E* base = nullptr;  // as y, or null

    int64_t size() const { return m1 * m2; }
    Finish<C, E> finish() const { return Finish<C, E>{bias, act, base, y}; }

    // result: rows (t, i) of `lanes` results from lane `lane` on, `step` apart -> y of tokens [first, first + tokens).
    void store_tile(int64_t first, int64_t tokens, int64_t lane, int64_t lanes, const C* result, int64_t step) const {
        E* to = y + first * size();
        if (commuted)
            finish_transposed<C, E>(result, step, tokens, lanes, m1, to + lane * m1, size(), finish(), lane * m1);
        else
            finish_rows<C, E>(result, step, tokens * m1, lanes, to + lane, m2, finish(), lane, m2, m1);
    }
    // The same for a GEMM that has written y itself, bias and base included: only the activation is left.
    void activate_tile(int64_t first, int64_t tokens, int64_t lane, int64_t lanes) const {
        if (act.kind == Activation::none) return;
        E* to = y + first * size() + lane;
        finish_rows<C, E>(reinterpret_cast<C*>(to), m2, tokens * m1, lanes, to, m2, Finish<C, E>{nullptr, act}, 0, 0,
                          1);
    }
};

}  // namespace KRON_ISA
}  // namespace kron
