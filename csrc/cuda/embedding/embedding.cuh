// Rows of a Kronecker-factored table: gather, expand, add rows of other tables, norm; and the gradients of the factors.
#pragma once

#include "cuda/common/check.h"
#include "cuda/common/core.h"
#include "cuda/common/memory.h"
#include "cuda/common/values.h"
#include "kron/cuda.h"

namespace kron {
namespace cuda {

constexpr int kEmbeddingThreads = 256;
constexpr int kEmbeddingWarps = kEmbeddingThreads / 32;

// kValues neighbours of a row: 16 bytes where rows are aligned to that, else one value.
template <class T, int kValues>
KRON_DEVICE void load_row(const T* from, float (&values)[kValues]) {
    if constexpr (kValues == 1) {
        values[0] = device::to_float(*from);
    } else {
        const device::Words4 words = device::load_global(from);
        KRON_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4)
                values[i] = device::bits_to_float(words.w[i]);
            else
                device::unpack<T>(words.w[i], values[2 * i], values[2 * i + 1]);
        }
    }
}

template <class T, int kValues>
KRON_DEVICE void store_row(T* to, const float (&values)[kValues]) {
    if constexpr (kValues == 1) {
        *to = device::from_float<T>(values[0]);
    } else {
        device::Words4 words;
        KRON_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4)
                words.w[i] = device::float_to_bits(values[i]);
            else
                words.w[i] = device::pack<T>(values[2 * i], values[2 * i + 1]);
        }
        device::store_global(to, words);
    }
}

KRON_DEVICE float sum_of_warp(float value) {
    KRON_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
    return value;
}

struct EmbeddingParams {
    EmbeddingArgs args;
    int warps;         // of a block that have a row in shared memory; the others only bring b
    int64_t row_step;  // floats from one warp's row to the next one's
};

// One row of tables as values: (A_s[id] (x) B_s) (p*k,), the terms added up.
template <class T>
struct TableRow {
    const T* a;  // of term 0
    int64_t stride_term, stride_col;
    int terms, p, k;
    const float* b;  // (S, k)

    // values[j] = row[at + j]; the values of one multiple of k share their value of a.
    template <int kValues>
    KRON_DEVICE void read(int at, float (&values)[kValues]) const {
        const int first_column = at / k, first_lane = at % k;
        KRON_UNROLL
        for (int j = 0; j < kValues; ++j) values[j] = 0;
        for (int s = 0; s < terms; ++s) {
            const T* from = a + s * stride_term + first_column * stride_col;
            const float* factor = b + s * k;
            float left = device::to_float(*from);
            int lane = first_lane, column = first_column;
            KRON_UNROLL
            for (int j = 0; j < kValues; ++j) {
                values[j] += left * factor[lane];
                if (++lane == k && ++column < p) {
                    from += stride_col;
                    left = device::to_float(*from);
                }
                if (lane == k) lane = 0;
            }
        }
    }
};

// b (S, 1, k) as floats into shared memory, by the whole block; a barrier makes it readable.
template <class T>
KRON_DEVICE void stage_b(const Factor& b, int terms, int k, float* to) {
    for (int i = device::thread_index(); i < terms * k; i += device::threads_of_block())
        to[i] = device::to_float(static_cast<const T*>(b.data)[i / k * b.stride_term + i % k * b.stride_col]);
}

template <class T>
KRON_DEVICE TableRow<T> table_row(const EmbeddingArgs& args, int64_t id, const float* b) {
    const T* a = static_cast<const T*>(args.a.data) + id * args.a.stride_row;
    return {a, args.a.stride_term, args.a.stride_col, int(args.terms), int(args.p), int(args.k), b};
}

// A warp a token. Shared memory: b (S, k), then a row (p*k,) for each warp, of which a lane touches its own values
// alone.
template <class T, int kValues>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kEmbeddingThreads, 1) embedding_forward(EmbeddingParams params) {
    const EmbeddingArgs& args = params.args;
    const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
    const int size = int(args.p * args.k);
    float* b = reinterpret_cast<float*>(device::shared_memory());
    stage_b<T>(args.b, int(args.terms), int(args.k), b);
    device::sync_threads();
    if (warp >= params.warps) return;
    float* row = b + args.terms * args.k + warp * params.row_step;

    const int64_t step = int64_t(device::blocks_x()) * params.warps;
    for (int64_t t = int64_t(device::block_x()) * params.warps + warp; t < args.tokens; t += step) {
        const int64_t id = args.ids[t];
        const T* added[2] = {nullptr, nullptr};
        bool right = id >= 0 && id < args.rows;
        KRON_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (!args.added[i].weight) continue;
            const int64_t index = args.added[i].ids[t];
            right = right && index >= 0 && index < args.added[i].rows;
            added[i] = static_cast<const T*>(args.added[i].weight) + index * size;
        }
        if (!right) {
            device::index_out_of_range();
            return;
        }
        const TableRow<T> table = table_row<T>(args, id, b);
        T* y = static_cast<T*>(args.y) + t * size;
        float sum = 0;
        for (int at = lane * kValues; at < size; at += 32 * kValues) {
            float values[kValues];
            table.read(at, values);
            KRON_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (!added[i]) continue;
                float more[kValues];
                load_row(added[i] + at, more);
                KRON_UNROLL
                for (int j = 0; j < kValues; ++j) values[j] += more[j];
            }
            if (!args.norm_weight) {
                store_row(y + at, values);
                continue;
            }
            KRON_UNROLL
            for (int j = 0; j < kValues; ++j) {
                row[at + j] = values[j];
                sum += values[j];
            }
        }
        if (!args.norm_weight) continue;
        const float mean = sum_of_warp(sum) / float(size);
        float squares = 0;
        for (int at = lane * kValues; at < size; at += 32 * kValues) {
            KRON_UNROLL
            for (int j = 0; j < kValues; ++j) squares += (row[at + j] - mean) * (row[at + j] - mean);
        }
        const float scale = 1.0f / sqrtf(sum_of_warp(squares) / float(size) + float(args.eps));
        for (int at = lane * kValues; at < size; at += 32 * kValues) {
            float weight[kValues], bias[kValues];
            load_row(static_cast<const T*>(args.norm_weight) + at, weight);
            load_row(static_cast<const T*>(args.norm_bias) + at, bias);
            KRON_UNROLL
            for (int j = 0; j < kValues; ++j) bias[j] += (row[at + j] - mean) * scale * weight[j];
            store_row(y + at, bias);
        }
    }
}

struct EmbeddingBackwardParams {
    EmbeddingBackwardArgs args;
    int64_t tokens_a_block;
    int groups;      // of columns of a that sum apart
    float* partial;  // (blocks, S, k)
};

// For a block's tokens, with G (p, k) a token's gradient: da[t, s, c] = sum_l G[c, l] B_s[l], and the block's part of
// db[s, l] = sum_t sum_c A_s[id, c] G[c, l]. Shared memory: b (S, k), G (p, k), A (S, p), sums (groups, S, k).
template <class T>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kEmbeddingThreads, 1) embedding_backward(EmbeddingBackwardParams params) {
    const EmbeddingBackwardArgs& args = params.args;
    const int p = int(args.p), k = int(args.k), terms = int(args.terms), of_b = terms * k;
    const int thread = device::thread_index(), threads = device::threads_of_block();
    float* b = reinterpret_cast<float*>(device::shared_memory());
    float* gradient = b + of_b;
    float* a = gradient + p * k;
    float* sums = a + terms * p;
    for (int i = thread; i < params.groups * of_b; i += threads) sums[i] = 0;
    stage_b<T>(args.b, terms, k, b);

    const int64_t first = device::block_x() * params.tokens_a_block;
    const int64_t last = args.tokens - first < params.tokens_a_block ? args.tokens : first + params.tokens_a_block;
    for (int64_t t = first; t < last; ++t) {
        const int64_t id = args.ids[t];
        if (id < 0 || id >= args.rows) {
            device::index_out_of_range();
            return;
        }
        const T* row = static_cast<const T*>(args.a.data) + id * args.a.stride_row;
        const T* grad = static_cast<const T*>(args.grad) + t * args.grad_stride;
        for (int i = thread; i < p * k; i += threads) gradient[i] = device::to_float(grad[i]);
        for (int i = thread; i < terms * p; i += threads)
            a[i] = device::to_float(row[i / p * args.a.stride_term + i % p * args.a.stride_col]);
        device::sync_threads();
        T* da = static_cast<T*>(args.da) + t * terms * p;
        for (int i = thread; i < terms * p; i += threads) {
            const float *from = gradient + i % p * k, *factor = b + i / p * k;
            float sum = 0;
            for (int l = 0; l < k; ++l) sum += from[l] * factor[l];
            da[i] = device::from_float<T>(sum);
        }
        for (int i = thread; i < params.groups * of_b; i += threads) {
            const int group = i / of_b, l = i % k;
            const float* left = a + i % of_b / k * p;
            float sum = sums[i];
            for (int c = group; c < p; c += params.groups) sum += left[c] * gradient[c * k + l];
            sums[i] = sum;
        }
        device::sync_threads();
    }
    for (int i = thread; i < of_b; i += threads) {
        float sum = 0;
        for (int group = 0; group < params.groups; ++group) sum += sums[group * of_b + i];
        params.partial[int64_t(device::block_x()) * of_b + i] = sum;
    }
}

struct EmbeddingSumParams {
    const float* partial;  // (blocks, size)
    int64_t blocks;
    int size;
    void* db;  // (size,)
};

// The blocks' parts in their order, so that equal input gives equal output.
template <class T>
KRON_GLOBAL void embedding_sum(EmbeddingSumParams params) {
    const int i = device::block_x() * device::threads_of_block() + device::thread_index();
    if (i >= params.size) return;
    float sum = 0;
    for (int64_t block = 0; block < params.blocks; ++block) sum += params.partial[block * params.size + i];
    static_cast<T*>(params.db)[i] = device::from_float<T>(sum);
}

}  // namespace cuda
}  // namespace kron
