// The product with one large and one tiny factor on the tensor cores of sm_80 and later (mma.sync).
//
// A block of four warps has 64 rows of the GEMM, 64 / G tokens, over the whole inner dimension in shared memory if
// there is room (`panel`), so that x is read and contracted once; it goes through its columns in tiles of 128, whose
// part of the large factor streams through four stages of cp.async. A warp has all 64 rows of 32 columns: eight rows a
// thread, among them all rows of its tokens, so that a contraction of rows needs no exchange. Several blocks share a
// multiprocessor: one contracts while another multiplies.
#pragma once

#include "cuda/common/mma.h"
#include "cuda/matmul/matmul_params.h"
#include "cuda/matmul/matmul_reduce.cuh"
#include "cuda/matmul/matmul_store.cuh"

namespace kron {
namespace cuda {

constexpr int kRows = 64, kColumns = 128, kWarpColumns = 32, kThreads = 128, kStages = 4;
constexpr int kStepBytes = 32;        // of the inner dimension, a step of the tensor cores
constexpr int kTileBytes = 64;        // of the inner dimension, a stage
constexpr int kStagePitch = 64 + 16;  // an odd number of words of 16 bytes: eight rows lie in different banks
constexpr int kStageBytes = kColumns * kStagePitch;

template <class T>
constexpr int kTileInner = kTileBytes / int(sizeof(T));

KRON_BOTH int row_pitch(int panel, int value_bytes) {
    return panel * value_bytes + 16;
}
// Numbers of the tiny factor held in shared memory.
KRON_BOTH int weight_count(const MmParams& p, int group, MmForm form) {
    return form == MmForm::contract ? p.terms * p.halves * p.ci * group : p.co * group;
}
// Sums of the warps when reducing.
KRON_BOTH int slot_count(const MmParams& p, int group, MmForm form) {
    return form == MmForm::reduce ? kThreads / 32 * p.halves * p.co * group : 0;
}
// Bytes of both, in front of the rows.
KRON_BOTH int small_bytes(const MmParams& p, int group, MmForm form) {
    return ((weight_count(p, group, form) + 3) / 4 * 4 + slot_count(p, group, form) + 3) / 4 * 16;
}

// acc[i][j][e] of a thread (g = lane / 4, t = lane % 4): row g + 8 (2 i + e / 2), column 8 t + 2 j + e % 2 of the
// warp's. Neighbouring columns lie in one thread because the factor's rows are stored in that order.
struct Accumulators {
    float of[4][4][4];
    KRON_DEVICE float& at(int row, int column) { return of[row / 2][column / 2][row % 2 * 2 + column % 2]; }
};
// Which column of 32 the stored row is.
KRON_DEVICE int column_of_row(int row) {
    const int j = row % 8;
    return j / 2 * 8 + row / 8 * 2 + j % 2;
}

// One tile of the inner dimension. rows: where the warp's 64 rows have it.
template <class T>
KRON_DEVICE void multiply_tile(Accumulators& acc, const char* rows, int pitch, const char* columns) {
    const int lane = thread_index() % 32;
    const char* a_row = rows + lane % 16 * pitch + lane / 16 * 16;
    const char* b_row = columns + (lane / 16 * 8 + lane % 8) * kStagePitch + lane / 8 % 2 * 16;
    KRON_UNROLL for (int step = 0; step < kTileBytes; step += kStepBytes) {
        uint32_t a[4][4], b[4][2];
        KRON_UNROLL for (int i = 0; i < 4; ++i) ldmatrix(a[i], a_row + i * 16 * pitch + step);
        KRON_UNROLL for (int j = 0; j < 4; j += 2) {
            uint32_t pair[4];
            ldmatrix(pair, b_row + j * 8 * kStagePitch + step);
            KRON_UNROLL for (int r = 0; r < 4; ++r) {
                if constexpr (sizeof(T) == 4) pair[r] = to_tf32(bits_to_float(pair[r]));
                b[j + r / 2][r % 2] = pair[r];
            }
        }
        KRON_UNROLL for (int i = 0; i < 4; ++i) KRON_UNROLL for (int j = 0; j < 4; ++j)
            mma_sync<T>(acc.of[i][j], a[i], b[j]);
    }
}

// Stage loads of a block: columns [first, first + 128) of the large factor.
template <class T>
struct LargeFactor {
    const MmParams& p;
    const MmProjection& projection;

    KRON_DEVICE void load(char* stage, int first_column, int tile) const {
        const int chunk = thread_index() % 4, row = thread_index() / 4;
        int k = tile * kTileInner<T> + chunk * kVector<T>, term = 0;
        bool there = k < p.inner;
        if (k >= p.term_inner) term = k / p.term_inner, k -= term * p.term_inner;
        there = there && k < p.li;
        const T* from = static_cast<const T*>(projection.large) + (there ? term * projection.large_term + k : 0);
        KRON_UNROLL for (int i = 0; i < kColumns / 32; ++i) {
            const int column = first_column + i * 32 + column_of_row(row);
            const bool valid = there && column < p.lo;
            cp_async<16>(stage + (i * 32 + row) * kStagePitch + chunk * 16,
                         from + (valid ? column * projection.large_row : 0), valid);
        }
    }
};

template <class T, int G, MmForm kForm>
struct MmBlock {
    using Contraction = Weights<G>;
    const MmParams& p;
    const MmProjection& projection;
    int64_t first_token;  // in halves
    int64_t block_sums;   // where among those of all blocks the sums of this one go

    // Contracting: Weights[term][half][c] of rows g; expanding: Weights[m] of parts c.
    KRON_DEVICE void load_weights(float* weights) const {
        const T* tiny = static_cast<const T*>(projection.tiny);
        KRON_NO_UNROLL for (int i = thread_index(); i < weight_count(p, G, kForm); i += kThreads) {
            const int g = i % G, other = i / G;
            int term = 0, row, column;
            if constexpr (kForm != MmForm::contract) {
                row = other, column = g;
            } else {
                const int half = other / p.ci % p.halves;
                term = other / p.ci / p.halves, row = half * 8 + g, column = other % p.ci;
            }
            float w = 0;
            if (term < p.terms && row < p.co && column < p.ci)
                w = p.alpha *
                    to_float(
                        tiny[term * projection.tiny_term + row * projection.tiny_row + column * projection.tiny_col]);
            weights[i] = w;
        }
    }

    // The results of one token of a thread: rows w (G) of eight columns, from `column` on.
    KRON_DEVICE void store_contracted(const Results<T>& to, float (&w)[G][8], int64_t token, int column) const {
        const int half = int(token & (p.halves - 1)), first_row = half * 8;
        const int64_t row = (p.halves == 2 ? token >> 1 : token) * p.co * p.lo;
        const bool interleave = p.right && p.co == G * p.halves;
        if (interleave) {
            float contracted[G][8];
            KRON_UNROLL for (int i = 0; i < 8 * G; ++i) contracted[i / 8][i % 8] = w[i % G][i / G];
            KRON_UNROLL for (int i = 0; i < 8 * G; ++i) w[i / 8][i % 8] = contracted[i / 8][i % 8];
        }
        KRON_NO_UNROLL for (int v = 0; v < G; ++v) {
            // Where value 0 goes, how far the next one lies, and how many there are.
            const int g = first_row + v;
            int first = p.right ? column * p.co + g : g * p.lo + column, step = p.right ? p.co : 1;
            int count = g < p.co ? p.lo - column : 0;
            if (interleave) {
                first = column * p.co + (G == 8 ? v * p.co + first_row : v * 8), step = 1;
                count = p.lo * p.co - (first - first_row);
            }
            store_results(to, w[0], row, first, step, count);
            shift(w);
        }
    }
    KRON_DEVICE void store_expanded(const Results<T>& to, float (&w)[G][8], int64_t token, int column,
                                    const Contraction* contract) const {
        const int64_t row = token * p.co * p.lo;
        if (p.right && (p.co % 8 == 0 || p.co == 4 || p.co == 2)) {  // results of a column are neighbours
            int m = 0;
            KRON_NO_UNROLL for (int i = 0; i < p.co; ++i) {
                float v[8];
                if (p.co == 2)
                    interleave<2>(v, w, contract);
                else if (p.co == 4)
                    interleave<4>(v, w, contract);
                else
                    interleave<8>(v, w, contract + m);
                const int first = column * p.co + i * 8;
                store_results(to, v, row, first, 1, p.lo * p.co - first);
                m += 8;
                if (m < p.co) continue;
                m = 0;
                if (p.co == 2)
                    shift_columns<4>(w);
                else if (p.co == 4)
                    shift_columns<2>(w);
                else
                    shift_columns<1>(w);
            }
            return;
        }
        KRON_NO_UNROLL for (int m = 0; m < p.co; ++m) {
            const Contraction coefficients = contract[m];
            float v[8] = {};
            KRON_UNROLL for (int c = 0; c < G; ++c) {
                KRON_UNROLL for (int i = 0; i < 8; ++i) v[i] += coefficients.of[c] * w[c][i];
            }
            const int64_t first = p.right ? int64_t(column) * p.co + m : int64_t(m) * p.lo + column;
            store_results(to, v, row, first, p.right ? p.co : 1, p.lo - column);
        }
    }
    // Eight neighbours: kParts results of each of 8 / kParts columns, the first of w.
    template <int kParts>
    KRON_DEVICE static void interleave(float (&v)[8], const float (&w)[G][8], const Contraction* contract) {
        KRON_UNROLL for (int e = 0; e < 8; ++e) {
            v[e] = 0;
            KRON_UNROLL for (int c = 0; c < G; ++c) v[e] += contract[e % kParts].of[c] * w[c][e / kParts];
        }
    }
    template <int kBy>
    KRON_DEVICE static void shift_columns(float (&w)[G][8]) {
        KRON_UNROLL for (int c = 0; c < G; ++c) {
            KRON_UNROLL for (int e = 0; e + kBy < 8; ++e) w[c][e] = w[c][e + kBy];
        }
    }
    // Loops over rows are not unrolled, for the sake of the code's size; registers have no index, so the rows move up.
    KRON_DEVICE static void shift(float (&w)[G][8]) {
        KRON_UNROLL for (int g = 0; g + 1 < G; ++g) {
            KRON_UNROLL for (int i = 0; i < 8; ++i) w[g][i] = w[g + 1][i];
        }
    }

    KRON_DEVICE void store(Accumulators& acc, int column, const Contraction* contract) const {
        const Results<T> to{static_cast<const T*>(projection.bias), static_cast<const T*>(projection.base),
                            static_cast<T*>(projection.y), p.activation, p.y_vector};
        KRON_NO_UNROLL for (int i = 0; i < 8 / G; ++i) {
            const int64_t token = first_token + i * 8 + thread_index() % 32 / 4;
            if (token < p.tokens * p.halves) {
                float w[G][8];
                KRON_UNROLL for (int i = 0; i < 8 * G; ++i) w[i / 8][i % 8] = acc.at(i / 8, i % 8);
                if constexpr (kForm != MmForm::contract)
                    store_expanded(to, w, token, column, contract);
                else
                    store_contracted(to, w, token, column);
            }
            KRON_UNROLL for (int r = 0; r + G < 8; ++r) {
                KRON_UNROLL for (int e = 0; e < 8; ++e) acc.at(r, e) = acc.at(r + G, e);
            }
        }
    }

    KRON_DEVICE void run(int split) const {
        float* weights = reinterpret_cast<float*>(shared_memory());
        char* rows = shared_memory() + small_bytes(p, G, kForm);
        const int pitch = row_pitch(p.panel, int(sizeof(T)));
        char* stages = rows + kRows * pitch;
        const LargeFactor<T> large{p, projection};
        const Tokens<T> x{
            static_cast<const T*>(p.x), p.x_stride, p.tokens * p.halves, p.halves, p.ci, p.li, p.right, p.x_vector};
        const RowFiller<T, G, kForm == MmForm::contract, true> filler(x, reinterpret_cast<const Contraction*>(weights),
                                                                      p.terms, p.term_inner, rows, pitch);
        const int inner_tiles = (p.inner + kTileInner<T> - 1) / kTileInner<T>, panel_tiles = p.panel / kTileInner<T>;
        const int first_tile = split * p.split_tiles;
        const int last_tile = first_tile + p.split_tiles < p.column_tiles ? first_tile + p.split_tiles : p.column_tiles;
        const int steps = (last_tile - first_tile) * inner_tiles;

        // Loads run kStages - 1 steps ahead, through the columns as through the inner dimension.
        int load_column = first_tile * kColumns, load_tile = 0, load_stage = 0, loads = 0;
        const auto load_next = [&] {
            if (loads++ < steps) {
                large.load(stages + load_stage * kStageBytes, load_column, load_tile);
                load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
                if (++load_tile == inner_tiles) load_tile = 0, load_column += kColumns;
            }
            cp_async_commit();  // an empty group too, so that waiting counts steps
        };
        for (int i = 0; i < kStages - 1; ++i) load_next();
        load_weights(weights);
        const TinyReducer<T, G> reducer{
            {static_cast<const T*>(p.other), p.other_stride, x.count, p.halves, p.co, p.lo, p.right, p.other_vector},
            reinterpret_cast<Contraction*>(weights + (weight_count(p, G, kForm) + 3) / 4 * 4)};
        if constexpr (kForm == MmForm::reduce) reducer.clear();

        int stage = 0;
        KRON_NO_UNROLL for (int tile = first_tile; tile < last_tile; ++tile) {
            Accumulators acc = {};
            KRON_NO_UNROLL for (int inner = 0; inner < inner_tiles; ++inner) {
                const int within = inner % panel_tiles;
                if (within == 0 && (inner_tiles > panel_tiles || tile == first_tile)) {
                    // The weights are there; the rows of the panel before are no longer read.
                    if (kForm == MmForm::contract || inner_tiles > panel_tiles) sync_threads();
                    filler.fill(first_token, kRows / G, inner * kTileInner<T>, p.panel);
                }
                cp_async_wait<kStages - 2>();
                sync_threads();  // this step's stage is full, and the one before it, loaded next, is no longer read
                load_next();
                multiply_tile<T>(acc, rows + within * kTileBytes, pitch,
                                 stages + stage * kStageBytes + thread_index() / 32 * kWarpColumns * kStagePitch);
                stage = stage + 1 == kStages ? 0 : stage + 1;
            }
            const int lane = thread_index() % 32, warp = thread_index() / 32;
            const int column = tile * kColumns + warp * kWarpColumns + lane % 4 * 8;
            if constexpr (kForm == MmForm::reduce) reducer.add(acc, first_token + lane / 4, column);
            if (kForm != MmForm::reduce || projection.y)
                store(acc, column, reinterpret_cast<const Contraction*>(weights));
        }
        if constexpr (kForm == MmForm::reduce) {
            sync_threads();  // all warps' sums are there
            reducer.finish(p.sums + block_sums * p.co * p.halves * G);
        }
    }
};

// Blocks of one row tile follow each other, so that x comes from L2 for all but the first.
template <class T, int G, MmForm kForm>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kThreads, G <= 2 && kForm != MmForm::reduce ? 3 : 2) matmul_sm80(const MmParams p) {
    const int split = block_x() % p.column_splits, rest = block_x() / p.column_splits;
    const int projection = rest % p.count, tile = rest / p.count;
    const int64_t sums = (int64_t(projection) * p.row_tiles + tile) * p.column_splits + split;
    const MmBlock<T, G, kForm> block{p, p.projections[projection], int64_t(tile) * (kRows / G), sums};
    block.run(split);
}

}  // namespace cuda
}  // namespace kron
