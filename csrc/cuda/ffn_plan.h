// How the work of a feed-forward block is shared out on sm_80, and the launchers of each type.
#pragma once

#include "kron/cuda.h"

namespace kron {
namespace cuda {

namespace ffn {
struct ForwardParams;
}

struct FfnPlan {
    int rows;     // of the narrow grids: 1 or 2
    int columns;  // of results that a warp's accumulators hold
    int warps;    // of a block, each with 16 rows
    int64_t blocks, column_blocks;
    int64_t parts, tiles;  // the middle in parts of so many tiles
    int64_t shared_bytes;
};

// Instantiated in a file of its own for each type.
template <class T>
Status start_ffn_sm80(const ffn::ForwardParams& params, const FfnPlan& plan, const Launch& launch);

}  // namespace cuda
}  // namespace kron
