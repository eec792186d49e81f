// The second stage of sums over tokens: the first leaves a partial sum a block, here they are added in a fixed order.
// And both stages of sums of columns.
#pragma once

#include "cuda/common/memory.h"
#include "cuda/matmul/matmul_rows.cuh"

namespace kron {
namespace cuda {

struct SumParams {
    const float* from;
    void* to;  // (terms, rows, columns) contiguous
    int64_t terms, rows, columns;
    int64_t parts;  // partial sums of a result
    int64_t stride_part, stride_term, stride_row, stride_column;
    int sharers;  // threads that share the parts of a result: 1 or kSumThreads
};
constexpr int kSumThreads = 128;

template <class T>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kSumThreads, 1) sum_parts(const SumParams p) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int64_t results = kSumThreads / p.sharers;
    const int64_t result = block_x() * results + thread_index() / p.sharers;
    const int share = thread_index() % p.sharers;
    const bool there = result < p.terms * p.rows * p.columns;
    float sum = 0;
    if (there) {
        const int64_t column = result % p.columns, row = result / p.columns % p.rows;
        const int64_t term = result / p.columns / p.rows;
        const float* from = p.from + term * p.stride_term + row * p.stride_row + column * p.stride_column;
        KRON_UNROLL_BY_4 for (int64_t i = share; i < p.parts; i += p.sharers) sum += from[i * p.stride_part];
    }
    if (p.sharers > 1) {
        shared[thread_index()] = sum;
        sync_threads();
        if (share == 0)
            for (int i = 1; i < p.sharers; ++i) sum += shared[thread_index() + i];
    }
    if (there && share == 0) static_cast<T*>(p.to)[result] = from_float<T>(sum);
}

struct ColumnSumParams {
    const void* from;  // (rows, columns)
    int64_t stride, rows, columns, rows_of_split;
    bool vector;
    float* sums;  // (splits, columns)
};
constexpr int kColumnSumThreads = 128;

// A warp takes every fourth row of a split, a lane of it a word of 16 bytes.
template <class T>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kColumnSumThreads, 1) sum_columns(const ColumnSumParams p) {
    constexpr int N = kVector<T>;
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int64_t column = (int64_t(block_x()) * 32 + lane) * N, first = block_y() * p.rows_of_split;
    const int64_t last = first + p.rows_of_split < p.rows ? first + p.rows_of_split : p.rows;
    float sum[N] = {};
    if (p.vector && column + N <= p.columns) {
        KRON_UNROLL_BY_4 for (int64_t row = first + warp; row < last; row += 4) {
            float v[N];
            unpack_vector<T>(load_global(static_cast<const T*>(p.from) + row * p.stride + column), v, 0);
            KRON_UNROLL for (int i = 0; i < N; ++i) sum[i] += v[i];
        }
    } else {
        for (int64_t row = first + warp; row < last; row += 4) {
            KRON_UNROLL for (int i = 0; i < N; ++i) {
                if (column + i < p.columns)
                    sum[i] += to_float(static_cast<const T*>(p.from)[row * p.stride + column + i]);
            }
        }
    }
    KRON_UNROLL for (int i = 0; i < N; ++i) shared[thread_index() * N + i] = sum[i];
    sync_threads();
    if (warp) return;
    KRON_UNROLL for (int i = 0; i < N; ++i) {
        for (int w = 1; w < 4; ++w) sum[i] += shared[(w * 32 + lane) * N + i];
        if (column + i < p.columns) p.sums[block_y() * p.columns + column + i] = sum[i];
    }
}

}  // namespace cuda
}  // namespace kron
