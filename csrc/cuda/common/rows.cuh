// A matrix of any strides as rows that can be read in words of 16 bytes: itself where it is so, or a copy.
#pragma once

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/pack.cuh"
#include "cuda/common/tiny.h"
#include "cuda/matmul/matmul_plan.h"

namespace kron {
namespace cuda {

// Hands out device memory in pieces aligned to 256 bytes; without memory it only counts.
struct Arena {
    char* base;
    int64_t used;

    void* take(int64_t bytes) {
        void* const piece = base ? base + used : nullptr;
        used += aligned_bytes(bytes);
        return piece;
    }
};

struct Rows {
    const void* data;
    int64_t stride;  // in elements
};

// `columns` is a multiple of 8. A failure to start the copy goes to `status`; an arena without memory copies nothing.
inline Rows aligned_rows(DType dtype, const Factor& f, int64_t rows, int64_t columns, Arena& arena,
                         const Launch& launch, Status& status) {
    const int64_t size = size_of(dtype);
    if (f.stride_col == 1 && is_aligned(f.data) && f.stride_row * size % 16 == 0) return {f.data, f.stride_row};
    char* const copy = static_cast<char*>(arena.take(rows * columns * size));
    constexpr int64_t kMostRows = int64_t(1) << 20;  // of a launch
    for (int64_t row = 0; copy && row < rows && !status.code; row += kMostRows) {
        PackParams params{int(std::min(kMostRows, rows - row)), int(columns), int(columns), 1, 1, {}};
        params.factors[0] = {static_cast<const char*>(f.data) + row * f.stride_row * size, 0, f.stride_row,
                             f.stride_col, copy + row * columns * size};
        const Grid grid{divide_up(params.rows, kPackTile), divide_up(columns, kPackTile)};
        status = with_type(dtype, [&](auto type) {
            return start(pack_factors<decltype(type)>, grid, kPackThreads, kPackShared, launch, params);
        });
    }
    return {copy, columns};
}

}  // namespace cuda
}  // namespace kron
