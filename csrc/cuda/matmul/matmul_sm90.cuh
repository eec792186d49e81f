// The product with one large and one tiny factor on Hopper, two GEMM rows a token (matmul_params.h has the
// mathematics):
//   contracting (co = 2)  rows z_g = sum_c C[g, c] x_c; y_g = z_g L^T
//   expanding   (ci = 2)  rows x_c; y_d = sum_c C[d, c] (x_c L^T). With co = 2 too: nothing to do before the product.
// Several products may share x.
//
// Blocks and roles are those of the feed-forward kernel: tiles of 64 tokens, 32 for a warpgroup, the two rows of a
// token in one thread. The rows are made once, in registers, where they stay as the A operand while the columns of y go
// by in blocks of 128; x leaves its place in shared memory to the next tile. L comes through the ring.
#pragma once

#include "cuda/common/activation.h"
#include "cuda/common/half2.h"
#include "cuda/common/ring_sm90.cuh"
#include "cuda/common/warp.h"
#include "cuda/matmul/matmul_params.h"

namespace kron {
namespace cuda {
namespace sm90 {

constexpr int kMostProducts = 4;
constexpr int kMmStageBytes = 128 * 128;     // of L: 128 rows of 64 values
constexpr int kMmSlabBytes = kTokens * 128;  // of x: 64 values of each token

struct MmProduct {
    TensorMap large;
    Factor tiny;
    const void* bias;  // or null
    void* y;
};
struct MmSm90 {
    TensorMap x;
    MmProduct products[kMostProducts];
    int count, tokens, tiles;
    int width;           // of a token of x
    int co, ci, lo, li;  // of the tiny factor and of the large one
    float alpha;
    int stages;
    int ring, small_factors, barriers;  // in shared memory
};

// How the rows are made of x, and y of the accumulators: the tiny factor is B or A, and contracts or expands.
template <bool kRightFactor, bool kContracts>
struct Form {
    static constexpr bool kRight = kRightFactor, kContract = kContracts;
};

KRON_BOTH int divided_up(int value, int by) {
    return (value + by - 1) / by;
}

// ---- The thread that loads.
KRON_DEVICE void load_for_matmul(const MmSm90& p, char* shared, const Ring& ring) {
    const int slabs = divided_up(p.width, kSlab);
    Loader<kMmStageBytes> loader(ring);
    for (int tile = block_x(); tile < p.tiles; tile += blocks_x()) {
        loader.wait_for_x_place(slabs * kMmSlabBytes);
        for (int s = 0; s < slabs; ++s)
            tma_load(shared + s * kMmSlabBytes, p.x, &ring.b.x_full, s * kSlab, tile * kTokens);
        for (int i = 0; i < p.count; ++i)
            for (int column = 0; column < p.lo; column += 128)
                for (int k = 0; k < p.li; k += kSlab)
                    loader.next_stage(
                        [&](char* to, Barrier* full) { tma_load(to, p.products[i].large, full, k, column); });
    }
}

// ---- Rows. Values `at` to at + 1, 3 or 7 (at a multiple of so many) of a token.
KRON_DEVICE const char* place_of(const char* x, int token, int at) {
    const int offset = token * 128 + at % kSlab * 2;
    return x + at / kSlab * kMmSlabBytes + (offset ^ token % 8 * 16);
}

// Values k and k + 1 of both rows of a token, where these are not beyond the inner dimension: a word each.
template <class T, class Form>
KRON_DEVICE void make_rows(const MmSm90& p, const char* x, const Words2* small_factors, int token, int k,
                           uint32_t& first, uint32_t& second) {
    first = second = 0;
    if (k >= p.li) return;
    if constexpr (!Form::kContract && Form::kRight) {  // (x[k, 0], x[k, 1], x[k + 1, 0], x[k + 1, 1])
        const Words2 both = load_shared8(place_of(x, token, 2 * k));
        first = low_halves(both.w[0], both.w[1]), second = high_halves(both.w[0], both.w[1]);
    } else if constexpr (!Form::kContract) {
        first = load_word(place_of(x, token, k)), second = load_word(place_of(x, token, p.li + k));
    } else {
        float z[2][2] = {};
        for (int c = 0; c < p.ci; c += 2) {
            // Of k and k + 1 the values c and c + 1.
            uint32_t word[2];
            if constexpr (Form::kRight) {
                word[0] = load_word(place_of(x, token, k * p.ci + c));
                word[1] = load_word(place_of(x, token, (k + 1) * p.ci + c));
            } else {
                const uint32_t one = load_word(place_of(x, token, c * p.li + k));
                const uint32_t two = load_word(place_of(x, token, (c + 1) * p.li + k));
                word[0] = low_halves(one, two), word[1] = high_halves(one, two);
            }
            float contract[2][2];  // of row g, value c + i
            for (int i = 0; i < 2; ++i)
                contract[0][i] = bits_to_float(small_factors[c + i].w[0]),
                contract[1][i] = bits_to_float(small_factors[c + i].w[1]);
            KRON_UNROLL
            for (int e = 0; e < 2; ++e) {
                float low, high;
                unpack<T>(word[e], low, high);
                KRON_UNROLL
                for (int g = 0; g < 2; ++g) z[g][e] += contract[g][0] * low + contract[g][1] * high;
            }
        }
        first = pack<T>(z[0][0], z[0][1]), second = pack<T>(z[1][0], z[1][1]);
    }
}

// ---- Results. Of a thread's 64 accumulators d: for j < 16 the columns 8j + 2t + e of the token's rows g in d[4j + 2g
// + e].
struct Results {
    int token, column, t;  // the block's first column
};

template <class T, Activation kAct>
KRON_DEVICE uint32_t finished(const void* bias, int64_t at, bool inside, float low, float high) {
    float add[2] = {0, 0};
    if (bias && inside) unpack<T>(load_word(static_cast<const T*>(bias) + at), add[0], add[1]);
    return pack<T>(activate<kAct>(low + add[0]), activate<kAct>(high + add[1]));
}

// y_d is the run of lo values at d * lo of a token. As in the feed-forward kernel four lanes exchange words until each
// has 16 bytes in one piece.
template <class T, Activation kAct, bool kContract>
KRON_DEVICE void store_runs(const MmSm90& p, const MmProduct& product, const Words2* small_factors,
                            const float (&d)[64], const Results& at) {
    KRON_NO_UNROLL
    for (int row = 0; row < p.co; ++row) {
        const float m0 = kContract ? float(row == 0) : bits_to_float(small_factors[row].w[0]);
        const float m1 = kContract ? float(row == 1) : bits_to_float(small_factors[row].w[1]);
        const int64_t first = int64_t(row) * p.lo + at.column;
        KRON_UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) {
            uint32_t word[4];
            KRON_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int j = quarter * 4 + i, column = 8 * j + 2 * at.t;
                word[i] = finished<T, kAct>(product.bias, first + column, at.column + column < p.lo,
                                            m0 * d[4 * j] + m1 * d[4 * j + 2], m0 * d[4 * j + 1] + m1 * d[4 * j + 3]);
            }
            transpose_quad(word, at.t);
            const int column = (quarter * 4 + at.t) * 8;
            if (at.token < p.tokens && at.column + column < p.lo)
                store_global(static_cast<T*>(product.y) + int64_t(at.token) * p.co * p.lo + first + column,
                             Words4{{word[0], word[1], word[2], word[3]}});
        }
    }
}

// y_d is every co-th value from d on: the co values of a column, 2, 4 or a multiple of 8, lie together.
template <class T, Activation kAct, bool kContract>
KRON_DEVICE void store_interleaved(const MmSm90& p, const MmProduct& product, const Words2* small_factors,
                                   const float (&d)[64], const Results& at) {
    T* y = static_cast<T*>(product.y) + int64_t(at.token) * p.co * p.lo;
    // Values row and row + 1 of column 8j + 2t + e.
    const auto word = [&](int row, int j, int e) {
        const int column = at.column + 8 * j + 2 * at.t + e;
        const float d0 = d[4 * j + e], d1 = d[4 * j + 2 + e];
        float v[2] = {d0, d1};
        if constexpr (!kContract)
            for (int i = 0; i < 2; ++i)
                v[i] =
                    bits_to_float(small_factors[row + i].w[0]) * d0 + bits_to_float(small_factors[row + i].w[1]) * d1;
        return finished<T, kAct>(product.bias, int64_t(column) * p.co + row, column < p.lo, v[0], v[1]);
    };
    const auto store = [&](int row, int column, const Words4& four) {
        if (at.token < p.tokens && at.column + column < p.lo)
            store_global(y + int64_t(at.column + column) * p.co + row, four);
    };
    if (kContract || p.co == 2) {
        // Two lanes have between them 32 bytes of each of two blocks of columns: either takes those of one.
        const bool odd = at.t % 2;
        KRON_UNROLL
        for (int j = 0; j < 16; j += 2) {
            uint32_t mine[2][2], other[2];
            KRON_UNROLL
            for (int i = 0; i < 4; ++i) mine[i / 2][i % 2] = word(0, j + i / 2, i % 2);
            KRON_UNROLL
            for (int e = 0; e < 2; ++e) other[e] = shuffle_xor(odd ? mine[0][e] : mine[1][e], 1);
            store(0, 8 * (j + odd) + at.t / 2 * 4,
                  odd ? Words4{{other[0], other[1], mine[1][0], mine[1][1]}}
                      : Words4{{mine[0][0], mine[0][1], other[0], other[1]}});
        }
    } else if (p.co == 4) {
        KRON_UNROLL
        for (int j = 0; j < 16; ++j)
            store(0, 8 * j + 2 * at.t, Words4{{word(0, j, 0), word(2, j, 0), word(0, j, 1), word(2, j, 1)}});
    } else {
        KRON_UNROLL
        for (int i = 0; i < 32; ++i) {
            const int j = i / 2, e = i % 2;
            KRON_NO_UNROLL
            for (int row = 0; row < p.co; row += 8)
                store(row, 8 * j + 2 * at.t + e,
                      Words4{{word(row, j, e), word(row + 2, j, e), word(row + 4, j, e), word(row + 6, j, e)}});
        }
    }
}

// ---- A warpgroup that computes.
template <class T, class Form, Activation kAct, int kSteps>
KRON_DEVICE void compute_for_matmul(const MmSm90& p, char* shared, const Ring& ring, int group) {
    const int lane = thread_index() % 32, t = lane % 4;
    const int token = group * 32 + thread_index() / 32 % 4 * 8 + lane / 4;
    Computer<kMmStageBytes> self(ring, group);
    for (int tile = block_x(); tile < p.tiles; tile += blocks_x()) {
        uint32_t rows[kSteps][4];
        self.wait_for_x();
        KRON_NO_UNROLL
        for (int i = 0; i < p.count; ++i) {
            const Words2* small_factors = reinterpret_cast<const Words2*>(shared + p.small_factors) + i * kMostTiny;
            if (Form::kContract || i == 0) {
                KRON_UNROLL
                for (int s = 0; s < kSteps; ++s) KRON_UNROLL
                for (int half = 0; half < 2; ++half)
                    make_rows<T, Form>(p, shared, small_factors, token, s * 16 + half * 8 + 2 * t, rows[s][2 * half],
                                       rows[s][2 * half + 1]);
                if (!Form::kContract || i == p.count - 1) {
                    sync_warp();
                    self.release_x();
                }
            }
            KRON_NO_UNROLL
            for (int column = 0; column < p.lo; column += 128) {
                float d[64];
                KRON_UNROLL
                for (int e = 0; e < 64; ++e) d[e] = 0;
                self.take_turn();
                KRON_UNROLL
                for (int s = 0; s < kSteps; s += 4)
                    if (s * 16 < p.li)
                        self.on_stage([&](const char* large) {
                            const uint64_t columns = operand<128>(large);
                            KRON_UNROLL
                            for (int k = 0; k < 4; ++k) wgmma<T>(d, rows[s + k], part_of(columns, 32 * k));
                        });
                self.end_turn();
                self.finish();
                hold(d);
                const Results at{tile * kTokens + token, column, t};
                if constexpr (Form::kRight)
                    store_interleaved<T, kAct, Form::kContract>(p, p.products[i], small_factors, d, at);
                else
                    store_runs<T, kAct, Form::kContract>(p, p.products[i], small_factors, d, at);
            }
        }
    }
}

// The tiny factors in shared memory: for each index of the wide side the two values of the side of two, times alpha.
template <class T, bool kContract>
KRON_DEVICE void prepare_small_factors(const MmSm90& p, char* shared) {
    for (int i = thread_index(); i < p.count * kMostTiny; i += kThreads) {
        const Factor& f = p.products[i / kMostTiny].tiny;
        const int wide = i % kMostTiny;
        if (wide >= (kContract ? p.ci : p.co)) continue;
        Words2 contract;
        for (int g = 0; g < 2; ++g) {
            const int64_t at =
                kContract ? g * f.stride_row + wide * f.stride_col : wide * f.stride_row + g * f.stride_col;
            contract.w[g] = float_to_bits(p.alpha * to_float(static_cast<const T*>(f.data)[at]));
        }
        reinterpret_cast<Words2*>(shared + p.small_factors)[i] = contract;
    }
}

template <class T, class Form, Activation kAct, int kSteps>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kThreads, 1) matmul_sm90(const KRON_GRID_CONSTANT MmSm90 p) {
#ifdef KRON_SM90
    char* shared = shared_memory();
    RingBarriers& b = *reinterpret_cast<RingBarriers*>(shared + p.barriers);
    const Ring ring{b, shared + p.ring, p.stages};
    if (thread_index() == 0) init_ring(b, p.stages);
    prepare_small_factors<T, Form::kContract>(p, shared);
    sync_threads();
    run_roles([&] { load_for_matmul(p, shared, ring); },
              [&](int group) { compute_for_matmul<T, Form, kAct, kSteps>(p, shared, ring, group); });
#endif
}

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
