// A copy of large factors with their rows contiguous, padded with zeros to whole words of 16 bytes: for those that the
// kernels cannot read as they are (a transpose, an odd width or address).
#pragma once

#include "cuda/common/core.h"
#include "cuda/common/values.h"
#include "cuda/matmul/matmul_params.h"

namespace kron {
namespace cuda {

using namespace device;

struct PackParams {
    int rows, columns, padded_columns, terms;
    int count;
    struct Factors {
        const void* from;
        int64_t stride_term, stride_row, stride_column;
        void* to;  // (terms, rows, padded_columns)
    } factors[kMostProjections];
};

constexpr int kPackTile = 32, kPackThreads = 256;
constexpr int kPackShared = kPackTile * (kPackTile + 1) * 4;

// Tiles of 32 x 32 through shared memory: read along the dimension whose stride is the smaller, written along rows.
template <class T>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kPackThreads, 1) pack_factors(const PackParams p) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    const PackParams::Factors& f = p.factors[block_z() / p.terms];
    const int term = block_z() % p.terms, first_row = block_x() * kPackTile, first_column = block_y() * kPackTile;
    const T* from = static_cast<const T*>(f.from) + term * f.stride_term;
    T* to = static_cast<T*>(f.to) + int64_t(term) * p.rows * p.padded_columns;
    const bool along_rows = f.stride_row < f.stride_column;
    for (int i = thread_index(); i < kPackTile * kPackTile; i += kPackThreads) {
        const int slow = i / kPackTile, fast = i % kPackTile;
        const int row = along_rows ? fast : slow, column = along_rows ? slow : fast;
        float value = 0;
        if (first_row + row < p.rows && first_column + column < p.columns)
            value = to_float(from[(first_row + row) * f.stride_row + (first_column + column) * f.stride_column]);
        tile[row * (kPackTile + 1) + column] = value;
    }
    sync_threads();
    for (int i = thread_index(); i < kPackTile * kPackTile; i += kPackThreads) {
        const int row = i / kPackTile, column = i % kPackTile;
        if (first_row + row < p.rows && first_column + column < p.padded_columns)
            to[int64_t(first_row + row) * p.padded_columns + first_column + column] =
                from_float<T>(tile[row * (kPackTile + 1) + column]);
    }
}

}  // namespace cuda
}  // namespace kron
