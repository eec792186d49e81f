// The micro-kernel every product is made of, and the loops around it:
//   out[r][lane] = sum_k R[r, k] * P[k][lane] + init,   r < MR rows held in registers, lane < NV vectors.
// R is broadcast element by element (a view of activations, or a small factor); P is read in whole vectors (a packed
// panel of the large factor, or a token's own matrix).
#pragma once

#include "simd.h"

namespace kron {
namespace KRON_ISA {

// Registers for the accumulators: 32 vector registers on AVX-512 and AArch64, 16 elsewhere; three or four stay free for
// the panel's vectors and the broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows[4] = {0, 12, 12, 8};
#else
constexpr int kMaxRows[4] = {0, 8, 6, 4};
#endif
constexpr int kMaxPanelVectors = 3;

// Added to the finished sums (not their starting value: a long accumulation then rounds at the size of its own block):
// base[rows[r] + lane] for row r, nothing when base is null.
template <class C>
struct Init {
    const C* base;
    const int64_t* rows;
};

// kUnitRow: consecutive rows of R are neighbours in memory (R[r + k * step]); otherwise consecutive k are
// (R[r * step + k]). Then at most four base pointers reach all rows through scaled addressing.
template <class C, int MR, int NV, bool kUnitRow>
static void micro_kernel(int64_t depth, const C* R, int64_t step, const C* P, int64_t panel_step, C* out,
                         int64_t out_step, Init<C> init) {
    constexpr int W = Simd<C>::W;
    Vec<C> acc[MR][NV] = {};
    const C* group[(MR + 2) / 3];
#pragma GCC unroll 8
    for (int q = 0; q < (MR + 2) / 3; ++q) group[q] = R + 3 * q * (kUnitRow ? 1 : step);
    for (int64_t k = 0; k < depth; ++k) {
        Vec<C> p[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) p[v] = load<C>(P + v * W);
        P += panel_step;
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
using MicroKernel = void (*)(int64_t, const C*, int64_t, const C*, int64_t, C*, int64_t, Init<C>);

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
        default: __builtin_unreachable();
    }
}

template <class C, bool kUnitRow>
static MicroKernel<C> pick(int rows, int vectors) {
    switch (vectors) {
        case 1: return pick_rows<C, 1, kUnitRow>(rows);
        case 2: return pick_rows<C, 2, kUnitRow>(rows);
        default: return pick_rows<C, 3, kUnitRow>(rows);
    }
}

// What a result is added to: base[(r % period) * stride + lane] for row r (a bias that repeats every `period` rows), the
// result itself (accumulate), or nothing.
template <class C>
struct Start {
    const C* base = nullptr;
    int64_t stride = 0;
    int64_t period = 1;
    bool accumulate = false;
};

// out[r][0 .. vectors*W) for r < rows; out_step >= vectors*W.
template <class C, bool kUnitRow>
static void gemm_rows(int64_t rows, int64_t depth, const C* R, int64_t step, const C* P, int64_t panel_step, int vectors,
                      C* out, int64_t out_step, Start<C> start) {
    const int64_t most = kMaxRows[vectors];
    const int64_t blocks = (rows + most - 1) / most;
    int64_t r = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const int n = static_cast<int>((rows - r + blocks - b - 1) / (blocks - b));
        int64_t offsets[16];
        Init<C> init{nullptr, offsets};
        if (start.accumulate) {
            init.base = out + r * out_step;
            for (int i = 0; i < n; ++i) offsets[i] = i * out_step;
        } else if (start.base) {
            init.base = start.base;
            int64_t phase = r % start.period;
            for (int i = 0; i < n; ++i) {
                offsets[i] = phase * start.stride;
                if (++phase == start.period) phase = 0;
            }
        }
        pick<C, kUnitRow>(n, vectors)(depth, R + r * (kUnitRow ? 1 : step), step, P, panel_step, out + r * out_step,
                                      out_step, init);
        r += n;
    }
}

}  // namespace KRON_ISA
}  // namespace kron
