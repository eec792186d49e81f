// The micro-kernel every product is made of, and the loops around it:
//   out[r][lane] = sum_k R[r, k] * P[k][lane] + init,   r < MR rows held in registers, lane < NV vectors.
// R is broadcast element by element (a view of activations, or a small factor); P is read in whole vectors (a packed
// panel of the large factor, or a token's own matrix).
#pragma once

#include "cpu/isa/simd.h"

namespace kron {
namespace KRON_ISA {

// Registers for the accumulators: 32 vector registers on AVX-512 and AArch64, 16 elsewhere; three or four stay free for
// the panel's vectors and the broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows[4] = {0, 12, 12, 8};
#else
constexpr int kMaxRows[4] = {0, 8, 6, 4};
#endif

// Added to the finished sums (not their starting value: a long accumulation then rounds at the size of its own block):
// base[rows[r] + lane] for row r, nothing when base is null.
template <class C>
struct Init {
    const C* base;
    const int64_t* rows;
};

// Memory that will be wanted after this product (results about to be written, the next tile's input), fetched into L2 a
// little with every k, so that it arrives while the multipliers are busy. step 0 fetches one line again and again,
// which costs nothing measurable.
struct Ahead {
    const char* at;
    int64_t step;  // bytes a k
};

// kUnitRow: consecutive rows of R are neighbours in memory (R[r + k * step]); otherwise consecutive k are
// (R[r * step + k]). Then at most four base pointers address all rows through scaled addressing.
template <class C, int MR, int NV, bool kUnitRow>
static void micro_kernel(int64_t depth, const C* R, int64_t step, const C* P, int64_t panel_step, C* out,
                         int64_t out_step, Init<C> init, Ahead ahead) {
    constexpr int W = Simd<C>::W;
    Vec<C> acc[MR][NV] = {};
    const C* group[(MR + 2) / 3];
#pragma GCC unroll 8
    for (int q = 0; q < (MR + 2) / 3; ++q) group[q] = R + 3 * q * (kUnitRow ? 1 : step);
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        Vec<C> p[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) p[v] = load<C>(P + v * W);
        P += panel_step;
        if (!kUnitRow) {
            __builtin_prefetch(ahead.at, 0, 2);
            ahead.at += ahead.step;
        }
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const C value = kUnitRow ? R[r] : group[r / 3][(r % 3) * step];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] += p[v] * value;
        }
        if (kUnitRow) {
            R += step;
        } else {
#pragma GCC unroll 8
            for (int q = 0; q < (MR + 2) / 3; ++q) ++group[q];
        }
    }
    if (init.base) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] += load<C>(init.base + init.rows[r] + v * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store<C>(out + r * out_step + v * W, acc[r][v]);
}

template <class C>
using MicroKernel = void (*)(int64_t, const C*, int64_t, const C*, int64_t, C*, int64_t, Init<C>, Ahead);

template <class C, int NV, bool kUnitRow>
static MicroKernel<C> pick_rows(int rows) {
    switch (rows) {
#define KRON_ROWS(n) \
    case n:          \
        if constexpr (n <= kMaxRows[NV]) return micro_kernel<C, n, NV, kUnitRow>;
        KRON_ROWS(1)
        KRON_ROWS(2)
        KRON_ROWS(3)
        KRON_ROWS(4)
        KRON_ROWS(5)
        KRON_ROWS(6)
        KRON_ROWS(7)
        KRON_ROWS(8)
        KRON_ROWS(9)
        KRON_ROWS(10)
        KRON_ROWS(11)
        KRON_ROWS(12)
#undef KRON_ROWS
        default:
            __builtin_unreachable();
    }
}

template <class C, bool kUnitRow>
static MicroKernel<C> pick(int rows, int vectors) {
    switch (vectors) {
        case 1:
            return pick_rows<C, 1, kUnitRow>(rows);
        case 2:
            return pick_rows<C, 2, kUnitRow>(rows);
        default:
            return pick_rows<C, 3, kUnitRow>(rows);
    }
}

// What a result is added to: base[(r % period) * stride + lane] for row r (a bias that repeats every `period` rows),
// the result itself (accumulate), or nothing.
template <class C>
struct Start {
    const C* base = nullptr;
    int64_t stride = 0;
    int64_t period = 1;
    bool accumulate = false;
};

// `rows` cut into blocks of at most `most`, as equal as can be: blocks of `size + 1`, then blocks of `size`.
struct RowBlocks {
    int64_t count, size, larger;
    RowBlocks(int64_t rows, int64_t most)
        : count((rows + most - 1) / most), size(rows / count), larger(rows - size * count) {}
    int rows(int64_t block) const { return static_cast<int>(block < larger ? size + 1 : size); }
};

// Longest sum of one accumulator. Shorter sums, added up, err less. Without fused multiply-adds every step rounds
// twice; and for few rows, as for one vector, a library's product is made of short sums: ours should not err more than
// twice.
constexpr int64_t kShortSum = 64, kFewRows = 64;
KRON_INLINE int64_t longest_sum([[maybe_unused]] int64_t rows) {
#if defined(__FMA__) || defined(__aarch64__)
    return rows > kFewRows ? INT64_MAX : kShortSum;
#else
    return kShortSum;
#endif
}

// out[r][0 .. vectors*W) for r < rows; out_step >= vectors*W.
template <class C, bool kUnitRow>
static void gemm_rows(int64_t rows, int64_t depth, const C* R, int64_t step, const C* P, int64_t panel_step,
                      int vectors, C* out, int64_t out_step, Start<C> start, Ahead* ahead = nullptr) {
    if (rows == 0) return;
    for (const int64_t most = longest_sum(rows); depth > most; depth -= most) {
        gemm_rows<C, kUnitRow>(rows, most, R, step, P, panel_step, vectors, out, out_step, start, ahead);
        R += most * (kUnitRow ? step : 1), P += most * panel_step;
        start = Start<C>{nullptr, 0, 1, true};
    }
    const RowBlocks blocks(rows, kMaxRows[vectors]);
    int64_t offsets[16];
    if (start.accumulate)
        for (int i = 0; i < 16; ++i) offsets[i] = i * out_step;
    int64_t r = 0, phase = 0;
    for (int64_t b = 0; b < blocks.count; ++b) {
        const int n = blocks.rows(b);
        Init<C> init{start.accumulate ? out + r * out_step : start.base, offsets};
        if (start.base)
            for (int i = 0; i < n; ++i) {
                offsets[i] = phase * start.stride;
                if (++phase == start.period) phase = 0;
            }
        pick<C, kUnitRow>(n, vectors)(depth, R + r * (kUnitRow ? 1 : step), step, P, panel_step, out + r * out_step,
                                      out_step, init, ahead ? *ahead : Ahead{reinterpret_cast<const char*>(P), 0});
        if (ahead) ahead->at += ahead->step * depth;
        r += n;
    }
}

// One small factor applied to many tokens: out[t] (outputs, lanes) = M in[t] (depth, lanes) + start, M given as
// (depth, outputs). Token by token, so that `out` is written in the order of memory.
template <class C>
static void contract_tokens(const C* M, int64_t outputs, int64_t depth, int64_t tokens, int64_t lanes, const C* in,
                            int64_t in_step, C* out, int64_t out_step, Start<C> start) {
    constexpr int W = Simd<C>::W;
    constexpr int kVectors = 2;
    const int64_t vectors = (lanes + W - 1) / W;
    const RowBlocks blocks(outputs, kMaxRows[kVectors]);
    const MicroKernel<C> kernels[2][2] = {
        {pick<C, true>(static_cast<int>(blocks.size), 1), pick<C, true>(static_cast<int>(blocks.size), 2)},
        {blocks.larger ? pick<C, true>(static_cast<int>(blocks.size) + 1, 1) : nullptr,
         blocks.larger ? pick<C, true>(static_cast<int>(blocks.size) + 1, 2) : nullptr}};
    int64_t offsets[16];
    for (int i = 0; i < 16; ++i) offsets[i] = i * (start.accumulate ? out_step : start.stride);
    for (int64_t t = 0; t < tokens; ++t) {
        const C* first = start.base;
        if (start.period > outputs) first += t * outputs * start.stride;  // rows of their own for every token
        int64_t row = 0;
        for (int64_t b = 0; b < blocks.count; ++b) {
            for (int64_t v = 0; v < vectors; v += kVectors) {
                C* to = out + (t * outputs + row) * out_step + v * W;
                const C* base = start.accumulate ? to : first ? first + row * start.stride + v * W : nullptr;
                kernels[b < blocks.larger][v + 1 < vectors](depth, M + row, outputs, in + t * depth * in_step + v * W,
                                                            in_step, to, out_step, Init<C>{base, offsets},
                                                            Ahead{reinterpret_cast<const char*>(M), 0});
            }
            row += blocks.rows(b);
        }
    }
}

}  // namespace KRON_ISA
}  // namespace kron
