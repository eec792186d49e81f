// The feed-forward block y = W2 act(W1 x + bias1) + bias2 on Hopper in one kernel, for pairs whose left factors are
// tiny: A1 (hidden, 2), B1 (middle, inner), A2 (2, hidden), B2 (outer, middle). For a token and a column p of the
// middle
//   h_c = x_c B1[p]^T   u_m = act(A1[m] h + bias1[m, p])   z_i = sum_m A2[i, m] u_m   y_i += z_i B2[:, p]^T
//
// A block has a warpgroup that loads and two that compute, and takes tiles of 64 tokens, 128 rows of x, one after
// another. A warpgroup has 32 tokens, in the order in which row g and row g + 8 of a fragment are the two rows of one
// token: what lies between the two products happens in the registers of a thread, and z is the second one's A operand.
// It goes 64 columns p at a time, with all of y as its accumulators. While one warpgroup is between its products the
// other has the tensor cores: they take turns.
#pragma once

#include "cuda/common/activation.h"
#include "cuda/common/half2.h"
#include "cuda/common/ring_sm90.cuh"
#include "cuda/common/warp.h"

namespace kron {
namespace cuda {
namespace sm90 {

constexpr int kSlabBytes = 2 * kTokens * 128;  // of x

struct FfnSm90 {
    TensorMap x, b1, b2;
    Factor a1, a2;
    const void *bias1, *bias2;  // or null
    NormArgs norm;
    void* y;               // (tokens, 2, outer)
    float one_over_width;  // of a token of y
    int tokens, tiles;
    int hidden, inner, middle, outer;
    int columns, stages;  // of the middle at a time; of the ring
    // Offsets in shared memory.
    int ring, bias, small_factors, barriers;
};

// In shared memory, behind the tiles.
struct FfnBarriers {
    RingBarriers ring;
    // Magnitudes: the largest of a row of A1 and of A2, summed up or by themselves, and of bias1 by warps.
    float sum1, top1, sum2, top2, largest_bias[kThreads / 32];
};

KRON_BOTH int slabs_of(int inner) {
    return (inner + 2 * kSlab - 1) / (2 * kSlab) * 2;
}
// Of the middle at a time. An accumulator has to lie in registers 24 to 239, and 384 values of y take 192 of them.
KRON_BOTH constexpr int columns_for(int blocks) {
    return blocks == 3 ? 32 : 64;
}
// A stage of the ring: of B1 (columns, 128) or of B2 (128, columns).
KRON_BOTH constexpr int stage_bytes(int columns) {
    return columns * 256;
}
KRON_BOTH int steps_of(int middle, int columns) {
    return (middle + columns - 1) / columns;
}

// ---- The thread that loads.
template <int kBlocks>
KRON_DEVICE void load_tiles(const FfnSm90& p, char* shared, const Ring& ring) {
    constexpr int kColumns = columns_for(kBlocks), kStageBytes = stage_bytes(kColumns);
    const int slabs = slabs_of(p.inner), steps = steps_of(p.middle, kColumns);
    Loader<kStageBytes> loader(ring);
    for (int tile = block_x(); tile < p.tiles; tile += blocks_x()) {
        loader.wait_for_x_place(slabs * kSlabBytes);
        for (int s = 0; s < slabs; ++s)
            for (int t = 0; t < kTokens; t += 8)  // 8 tokens' first rows, then their second rows
                tma_load(shared + s * kSlabBytes + t * 256, p.x, &ring.b.x_full, s * kSlab, tile * kTokens + t, 0);
        for (int c = 0; c < steps; ++c) {
            for (int s = 0; s < slabs; s += 2)
                loader.next_stage([&](char* to, Barrier* full) {
                    for (int i = 0; i < 2; ++i)
                        tma_load(to + i * kStageBytes / 2, p.b1, full, (s + i) * kSlab, c * kColumns);
                });
            for (int block = 0; block < kBlocks; ++block)
                loader.next_stage(
                    [&](char* to, Barrier* full) { tma_load(to, p.b2, full, c * kColumns, block * 128); });
        }
    }
}

// ---- Between the products. h: for a token's two rows kJ times two columns p of this thread; z: those of the second
// product's A operand.

// In fp16. `bias`: for each m, words of this thread's columns.
template <class T, Activation kAct, int kJ>
KRON_DEVICE void middle_in_fp16(const float (&h)[4 * kJ], const char* bias, const char* small_factors, int hidden,
                                uint32_t (&z)[kJ / 2][4]) {
    Half2 h0[kJ], h1[kJ], z0[kJ], z1[kJ];
    KRON_UNROLL
    for (int j = 0; j < kJ; ++j) {
        h0[j] = pack<F16>(h[4 * j], h[4 * j + 1]);
        h1[j] = pack<F16>(h[4 * j + 2], h[4 * j + 3]);
        z0[j] = z1[j] = 0;
    }
    KRON_NO_UNROLL
    for (int m = 0; m < hidden; ++m) {
        const Words2 contract = load_shared8(small_factors + m * 8);
        KRON_UNROLL
        for (int first = 0; first < kJ; first += 4) {
            const Words4 start = load_shared(bias + (m * 4 * kJ + first) * 4);
            KRON_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int j = first + i;
                const Half2 v = fma2(h0[j], low2(contract.w[0]), fma2(h1[j], high2(contract.w[0]), start.w[i]));
                const Half2 u = activate2<kAct>(v);
                z0[j] = fma2(u, low2(contract.w[1]), z0[j]);
                z1[j] = fma2(u, high2(contract.w[1]), z1[j]);
            }
        }
    }
    KRON_UNROLL
    for (int j = 0; j < kJ; ++j) {
        z[j / 2][j % 2 * 2] = repack<T>(z0[j]);
        z[j / 2][j % 2 * 2 + 1] = repack<T>(z1[j]);
    }
}

template <class T>
KRON_DEVICE float element(const Factor& f, int row, int col) {
    return to_float(static_cast<const T*>(f.data)[row * f.stride_row + col * f.stride_col]);
}

// In fp32, for values that fp16 does not hold: rare, so all comes from global memory.
template <class T, Activation kAct, int kJ>
KRON_DEVICE void middle_in_fp32(const float (&h)[4 * kJ], const FfnSm90& p, int column, uint32_t (&z)[kJ / 2][4]) {
    const T* bias = static_cast<const T*>(p.bias1);
    KRON_UNROLL
    for (int j = 0; j < kJ; ++j) {
        float sum[2][2] = {};
        const int first = column + 8 * j;
        KRON_NO_UNROLL
        for (int m = 0; m < p.hidden && first < p.middle; ++m) {
            KRON_UNROLL
            for (int e = 0; e < 2; ++e) {
                float v = bias ? to_float(bias[int64_t(m) * p.middle + first + e]) : 0.0f;
                v += element<T>(p.a1, m, 0) * h[4 * j + e] + element<T>(p.a1, m, 1) * h[4 * j + 2 + e];
                const float u = activate(kAct, v);
                sum[0][e] += element<T>(p.a2, 0, m) * u;
                sum[1][e] += element<T>(p.a2, 1, m) * u;
            }
        }
        KRON_UNROLL
        for (int i = 0; i < 2; ++i) z[j / 2][j % 2 * 2 + i] = pack<T>(sum[i][0], sum[i][1]);
    }
}

// ---- The results of a thread: two rows of a token, in each the columns 8j + 2t and 8j + 2t + 1 of its accumulators j.

// each(row, column, value, next value) for those that are there; column, of a row, is even.
template <int kBlocks, class F>
KRON_DEVICE void for_results(const FfnSm90& p, float (&y)[kBlocks][64], int t, F each) {
    KRON_UNROLL
    for (int i = 0; i < kBlocks * 32; ++i) {
        const int block = i / 32, j = i / 2 % 16, row = i % 2, column = block * 128 + 8 * j + 2 * t;
        if (column < p.outer) each(row, column, y[block][4 * j + 2 * row], y[block][4 * j + 2 * row + 1]);
    }
}

template <class T>
KRON_DEVICE void load_pair(const void* values, int64_t at, float& low, float& high) {
    unpack<T>(load_word(static_cast<const T*>(values) + at), low, high);
}

// The norm of residual + y. A token is shared by four lanes.
template <class T, int kBlocks>
KRON_DEVICE void normalise(const FfnSm90& p, float (&y)[kBlocks][64], int token, int t) {
    const auto over_token = [](float value) {
        value += shuffle_xor(value, 1);
        return value + shuffle_xor(value, 2);
    };
    const int64_t first = int64_t(token < p.tokens ? token : 0) * p.norm.residual_stride;
    float sum = 0, squares = 0;
    for_results(p, y, t, [&](int row, int column, float& low, float& high) {
        float more[2];
        load_pair<T>(p.norm.residual, first + row * p.outer + column, more[0], more[1]);
        low += more[0], high += more[1];
        sum += low + high;
    });
    const float mean = over_token(sum) * p.one_over_width;
    for_results(p, y, t, [&](int, int, float& low, float& high) {
        low -= mean, high -= mean;
        squares += low * low + high * high;
    });
    const float scale = reciprocal_root(over_token(squares) * p.one_over_width + float(p.norm.eps));
    for_results(p, y, t, [&](int row, int column, float& low, float& high) {
        float weight[2], bias[2];
        load_pair<T>(p.norm.weight, row * p.outer + column, weight[0], weight[1]);
        load_pair<T>(p.norm.bias, row * p.outer + column, bias[0], bias[1]);
        low = low * scale * weight[0] + bias[0], high = high * scale * weight[1] + bias[1];
    });
}

// The four lanes that share a token exchange words until each has 16 bytes in one piece.
template <class T, int kBlocks>
KRON_DEVICE void store_results(const FfnSm90& p, float (&y)[kBlocks][64], int token, int t) {
    if (p.bias2)
        for_results(p, y, t, [&](int row, int column, float& low, float& high) {
            float more[2];
            load_pair<T>(p.bias2, row * p.outer + column, more[0], more[1]);
            low += more[0], high += more[1];
        });
    if (p.norm.residual) normalise<T>(p, y, token, t);
    KRON_UNROLL
    for (int i = 0; i < kBlocks * 8; ++i) {
        const int block = i / 8, j = i / 2 % 4 * 4, row = i % 2;
        uint32_t word[4];
        KRON_UNROLL
        for (int k = 0; k < 4; ++k) {
            const int at = 4 * (j + k) + 2 * row;
            word[k] = pack<T>(y[block][at], y[block][at + 1]);
        }
        transpose_quad(word, t);
        const int column = block * 128 + (j + t) * 8;
        if (token < p.tokens && column < p.outer)
            store_global(static_cast<T*>(p.y) + (int64_t(token) * 2 + row) * p.outer + column,
                         Words4{{word[0], word[1], word[2], word[3]}});
    }
}

// ---- The left factors and bias1 in shared memory, as fp16, where the activation takes half its argument.
template <class T, Activation kAct, int kColumns>
KRON_DEVICE void prepare(const FfnSm90& p, char* shared, FfnBarriers& b) {
    constexpr float kScale = kTakesHalf<kAct> ? 0.5f : 1.0f;
    constexpr int kWords = kColumns / 2, kJ = kColumns / 8;
    const int thread = thread_index();
    uint32_t* bias = reinterpret_cast<uint32_t*>(shared + p.bias);
    float largest = 0;
    for (int i = thread; i < steps_of(p.middle, kColumns) * p.hidden * kWords; i += kThreads) {
        const int step = i / kWords / p.hidden, m = i / kWords % p.hidden;
        const int column = step * kColumns + i % kJ * 8 + i / kJ % 4 * 2;
        float low = 0, high = 0;
        if (p.bias1 && column < p.middle)
            unpack<T>(load_word(static_cast<const T*>(p.bias1) + int64_t(m) * p.middle + column), low, high);
        bias[i] = pack<F16>(kScale * low, kScale * high);
        largest = larger_magnitude(larger_magnitude(largest, low), high);
    }
    const auto most = [](float x, float y) { return x > y ? x : y; };
    const auto sum = [](float x, float y) { return x + y; };
    largest = over_warp(largest, most);
    if (thread % 32 == 0) b.largest_bias[thread / 32] = largest;
    if (thread >= 32) return;
    float a[4] = {};
    if (thread < p.hidden) {
        KRON_UNROLL
        for (int i = 0; i < 2; ++i) a[i] = element<T>(p.a1, thread, i), a[2 + i] = element<T>(p.a2, i, thread);
        uint32_t* contract = reinterpret_cast<uint32_t*>(shared + p.small_factors) + 2 * thread;
        contract[0] = pack<F16>(kScale * a[0], kScale * a[1]);
        contract[1] = pack<F16>(a[2], a[3]);
    }
    KRON_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = larger_magnitude(a[i], 0);
    const float sum1 = over_warp(a[0] + a[1], most), top1 = over_warp(most(a[0], a[1]), most);
    const float sum2 = most(over_warp(a[2], sum), over_warp(a[3], sum)), top2 = over_warp(most(a[2], a[3]), most);
    if (thread == 0) b.sum1 = sum1, b.top1 = top1, b.sum2 = sum2, b.top2 = top2;
}

// Within which magnitudes of h every value between the products is one of fp16 with all its digits, of those that
// count. After a barrier behind `prepare`.
KRON_DEVICE void find_limits(const FfnBarriers& b, float& least, float& most) {
    constexpr float kSmall = 0x1p-7f, kLarge = 32000;
    float bias = 0;
    for (int i = 0; i < kThreads / 32; ++i) bias = larger_magnitude(bias, b.largest_bias[i]);
    const bool fine = b.top1 >= kSmall && b.sum1 <= 1 / kSmall && b.top2 >= kSmall && b.sum2 <= 1 / kSmall;
    const auto one_over = [](float sum) { return reciprocal_approx(larger_magnitude(sum, 1)); };
    most = fine ? (kLarge * one_over(b.sum2) - bias) * one_over(b.sum1) : -1;
    least = bias >= kSmall ? 0 : kSmall * reciprocal_approx(b.top1);
}

// ---- A warpgroup that computes.
template <class T, Activation kAct, int kBlocks>
KRON_DEVICE void compute_tiles(const FfnSm90& p, char* shared, const FfnBarriers& b, const Ring& ring, int group) {
    constexpr int kColumns = columns_for(kBlocks), kStageBytes = stage_bytes(kColumns), kJ = kColumns / 8;
    const int slabs = slabs_of(p.inner), steps = steps_of(p.middle, kColumns);
    const int t = thread_index() % 4;
    const char* x = shared + group * kSlabBytes / 2;
    Computer<kStageBytes> self(ring, group);
    for (int tile = block_x(); tile < p.tiles; tile += blocks_x()) {
        float y[kBlocks][64], h[4 * kJ];
        const auto first_product = [&] {
            KRON_UNROLL
            for (int i = 0; i < 4 * kJ; ++i) h[i] = 0;
            KRON_NO_UNROLL
            for (int s = 0; s < slabs; s += 2)
                self.on_stage([&](const char* b1) {
                    KRON_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const uint64_t rows = operand<128>(x + (s + half) * kSlabBytes);
                        const uint64_t columns = operand<128>(b1 + half * kStageBytes / 2);
                        KRON_UNROLL
                        for (int k = 0; k < 4; ++k) wgmma<T>(h, part_of(rows, 32 * k), part_of(columns, 32 * k));
                    }
                });
            self.end_turn();
            self.finish();
            hold(h);
        };
        KRON_UNROLL
        for (int i = 0; i < kBlocks * 64; ++i) y[i / 64][i % 64] = 0;
        float least, most;  // not kept from tile to tile: registers are short at its end
        find_limits(b, least, most);
        self.wait_for_x();
        self.take_turn();
        first_product();
        KRON_NO_UNROLL
        for (int c = 0;; ++c) {
            uint32_t z[kJ / 2][4];
            if (c == steps - 1) self.release_x();
            const char* bias = shared + p.bias + (c * p.hidden * 4 + t) * kJ * 4;
            float largest = 0;
            KRON_UNROLL
            for (int i = 0; i < 4 * kJ; ++i) largest = larger_magnitude(largest, h[i]);
            if (all_of_warp(largest >= least && largest <= most))
                middle_in_fp16<T, kAct, kJ>(h, bias, shared + p.small_factors, p.hidden, z);
            else
                middle_in_fp32<T, kAct, kJ>(h, p, c * kColumns + 2 * t, z);
            self.take_turn();
            KRON_UNROLL
            for (int block = 0; block < kBlocks; ++block)
                self.on_stage([&](const char* b2) {
                    const uint64_t columns = operand<2 * kColumns>(b2);
                    KRON_UNROLL
                    for (int k = 0; k < kJ / 2; ++k) wgmma<T>(y[block], z[k], part_of(columns, 32 * k));
                });
            self.finish();
            if (c == steps - 1) break;
            first_product();
        }
        self.end_turn();
        KRON_UNROLL
        for (int block = 0; block < kBlocks; ++block) hold(y[block]);
        const int thread = thread_index_again() - 128;
        store_results<T, kBlocks>(p, y, tile * kTokens + thread / 4, t);
    }
}

template <class T, Activation kAct, int kBlocks>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kThreads, 1) ffn_sm90(const KRON_GRID_CONSTANT FfnSm90 p) {
#ifdef KRON_SM90
    char* shared = shared_memory();
    FfnBarriers& b = *reinterpret_cast<FfnBarriers*>(shared + p.barriers);
    const Ring ring{b.ring, shared + p.ring, p.stages};
    if (thread_index() == 0) init_ring(b.ring, p.stages);
    prepare<T, kAct, columns_for(kBlocks)>(p, shared, b);
    sync_threads();
    run_roles([&] { load_tiles<kBlocks>(p, shared, ring); },
              [&](int group) { compute_tiles<T, kAct, kBlocks>(p, shared, b, ring, group); });
#endif
}

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
