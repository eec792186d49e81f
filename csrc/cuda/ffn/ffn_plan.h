// How the work of a feed-forward block is shared out on sm_80, and the launchers of each type.
#pragma once

#include "kron/cuda.h"

namespace kron {
namespace cuda {

namespace ffn {
struct ForwardParams;
struct BackwardParams;
}  // namespace ffn

// Why a pair of products is no feed-forward block as the kernels compute it, or null.
const char* unsupported_ffn_pairs(const Shape& first, const Shape& second, const Launch& launch);

struct FfnPlan {
    int rows;     // of the narrow grids: 1 or 2
    int columns;  // of results that a warp's accumulators hold
    int warps;    // of a block, each with 16 rows
    int64_t blocks, column_blocks;
    int64_t parts, tiles;  // the middle in parts of so many tiles
    int64_t shared_bytes;
};

struct FfnBackwardPlan {
    int rows;
    int64_t shares;  // of the tokens
    int64_t column_blocks, shared_bytes;
};

// Instantiated in a file of its own for each type.
template <class T>
Status start_ffn_sm80(const ffn::ForwardParams& params, const FfnPlan& plan, const Launch& launch);
template <class T>
Status start_ffn_backward_sm80(const ffn::BackwardParams& params, const FfnBackwardPlan& plan, const Launch& launch);

}  // namespace cuda
}  // namespace kron
