// The factors in the kernels' layout: the left one compact, the right one packed in panels, or read in place by dot
// products when there are too few rows to pay for the packing.
#pragma once

#include "cpu/gemm/gemm.h"
#include "kron/problem.h"

namespace kron {
namespace KRON_ISA {

// left (S, m1, n1) -> out (S, n1, m1) in the compute type: consecutive outputs are neighbours, as micro_kernel's
// kUnitRow wants. With transpose: out (S, m1, n1), the left factor of the transposed product.
template <class C, class E>
static void compact_left(const Factor& left, int64_t terms, int64_t m1, int64_t n1, bool transpose, C* out) {
    const E* data = static_cast<const E*>(left.data);
    const int64_t outer = transpose ? m1 : n1, inner = transpose ? n1 : m1;
    const int64_t outer_step = transpose ? left.stride_row : left.stride_col;
    const int64_t inner_step = transpose ? left.stride_col : left.stride_row;
    for (int64_t s = 0; s < terms; ++s)
        for (int64_t o = 0; o < outer; ++o) {
            const E* src = data + s * left.stride_term + o * outer_step;
            for (int64_t i = 0; i < inner; ++i) *out++ = get<C, E>(src + i * inner_step);
        }
}

// One panel of a matrix M (lanes, depth) with strides: out[k][lane], `vectors` vectors wide, zeros beyond `lanes`.
template <class C, class E>
static void pack_panel(const E* M, int64_t lane_step, int64_t k_step, int64_t lanes, int64_t depth, int vectors,
                       C* out) {
    constexpr int W = Simd<C>::W;
    const int64_t width = static_cast<int64_t>(vectors) * W;
    for (int v = 0; v < vectors; ++v) {
        const int64_t first = static_cast<int64_t>(v) * W;
        const int64_t count = lanes - first < 0 ? 0 : (lanes - first < W ? lanes - first : W);
        const E* src = M + first * lane_step;
        C* dst = out + first;
        int64_t k = 0;
        if (k_step == 1 && count == W) {
            for (; k + W <= depth; k += W) {
                Vec<C> block[W];
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) block[l] = load<C, E>(src + l * lane_step + k);
                interleave<C, W>(block);
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) store<C>(dst + (k + l) * width, block[l]);
            }
        } else if (lane_step == 1 && count == W) {
            for (; k < depth; ++k) store<C>(dst + k * width, load<C, E>(src + k * k_step));
        }
        for (; k < depth; ++k) {
            Vec<C> row{};
            for (int64_t l = 0; l < count; ++l) row[l] = get<C, E>(src + l * lane_step + k * k_step);
            store<C>(dst + k * width, row);
        }
    }
}

// sums[r * LANES + l] = sum_k R[r][k] F[l][k].
template <class C, class E, class Row, int ROWS, int LANES>
static void dot_block(int64_t depth, const Row* R, int64_t step, const E* F, int64_t lane_step,
                      C (&sums)[ROWS * LANES]) {
    constexpr int W = Simd<C>::W, kSums = ROWS * LANES;
    Vec<C> acc[kSums] = {};
    int64_t k = 0;
    for (; k + W <= depth; k += W) {
        Vec<C> x[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) x[r] = load<C, Row>(R + r * step + k);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) {
            const Vec<C> f = load<C, E>(F + l * lane_step + k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) acc[r * LANES + l] += x[r] * f;
        }
    }
    if (k < depth)
        for (int l = 0; l < LANES; ++l) {
            const Vec<C> f = load_part<C, E>(F + l * lane_step + k, depth - k);
            for (int r = 0; r < ROWS; ++r) acc[r * LANES + l] += load_part<C, Row>(R + r * step + k, depth - k) * f;
        }
    sum_vectors<C, kSums>(acc, sums);
}

template <class C, class E, class Row, int ROWS>
static void dot_rows(int64_t depth, const Row* R, int64_t step, const E* F, int64_t lane_step, int64_t lanes, C* out,
                     int64_t out_step, const Start<C>& start, int64_t row) {
    constexpr int kLanes = 16 / ROWS;  // sixteen sums at a time
    const auto emit = [&](int r, int64_t lane, C sum) __attribute__((always_inline)) {
        C* at = out + r * out_step + lane;
        if (start.accumulate) sum += *at;
        if (start.base) sum += start.base[(row + r) % start.period * start.stride + lane];
        *at = sum;
    };
    int64_t l = 0;
    for (; l + kLanes <= lanes; l += kLanes) {
        C sums[16];
        dot_block<C, E, Row, ROWS, kLanes>(depth, R, step, F + l * lane_step, lane_step, sums);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < kLanes; ++i) emit(r, l + i, sums[r * kLanes + i]);
    }
    for (; l < lanes; ++l) {
        C sums[ROWS];
        dot_block<C, E, Row, ROWS, 1>(depth, R, step, F + l * lane_step, lane_step, sums);
        for (int r = 0; r < ROWS; ++r) emit(r, l, sums[r]);
    }
}

// out[r][l] = start + sum_k R[r][k] F[l][k] for few rows: F is read once per four rows, straight from the caller.
// Lanes beyond `lanes` up to `width` are set to zero.
template <class C, class E, class Row>
static void dot_panel(int64_t rows, int64_t depth, const Row* R, int64_t step, const E* F, int64_t lane_step,
                      int64_t lanes, int64_t width, C* out, int64_t out_step, Start<C> start) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        dot_rows<C, E, Row, 4>(depth, R + r * step, step, F, lane_step, lanes, out + r * out_step, out_step, start, r);
    for (; r + 2 <= rows; r += 2)
        dot_rows<C, E, Row, 2>(depth, R + r * step, step, F, lane_step, lanes, out + r * out_step, out_step, start, r);
    if (r < rows)
        dot_rows<C, E, Row, 1>(depth, R + r * step, step, F, lane_step, lanes, out + r * out_step, out_step, start, r);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t l = lanes; l < width; ++l) out[i * out_step + l] = 0;
}

// The right factor's GEMM on vectors, the default policy of Forward. AmxGemm is the other one.
template <class C>
struct VectorGemm {
    typedef C Row;
    static constexpr bool kTileContract = false;
    static constexpr int64_t kRowBlock = 1;
    static constexpr int kPanelVectors = 0;  // the plan chooses
    static int64_t depth(int64_t n) { return n; }
    static int64_t panel_size(int64_t n, int vectors) { return n * vectors * Simd<C>::W; }
    static void begin() {}
    static void end() {}

    template <class E>
    static void pack(const E* M, int64_t lane_step, int64_t k_step, int64_t lanes, int64_t n, int vectors, C* out) {
        pack_panel<C, E>(M, lane_step, k_step, lanes, n, vectors, out);
    }
    static void multiply(int64_t rows, int64_t n, const C* R, int64_t step, const C* panel, int64_t panel_step,
                         int vectors, C* out, int64_t out_step, Start<C> start, Ahead* ahead) {
        gemm_rows<C, false>(rows, n, R, step, panel, panel_step, vectors, out, out_step, start, ahead);
    }
};

}  // namespace KRON_ISA
}  // namespace kron
