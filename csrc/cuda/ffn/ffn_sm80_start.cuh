// Starts the kernels of one type.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/ffn/ffn_backward_sm80.cuh"
#include "cuda/ffn/ffn_plan.h"
#include "cuda/ffn/ffn_sm80.cuh"

namespace kron {
namespace cuda {

template <class T>
Status start_ffn_sm80(const ffn::ForwardParams& params, const FfnPlan& plan, const Launch& launch) {
    void (*kernel)(ffn::ForwardParams) = ffn::forward_kernel<T, 2, 384>;
    if (plan.rows == 1)
        kernel = ffn::forward_kernel<T, 1, 384>;
    else if (plan.columns < 384)
        kernel = plan.columns == 128 ? ffn::forward_kernel<T, 2, 128> : ffn::forward_kernel<T, 2, 256>;
    const Grid grid{plan.blocks, plan.column_blocks, plan.parts};
    const Status status = start(kernel, grid, 32 * plan.warps, plan.shared_bytes, launch, params);
    if (status.code || plan.parts == 1) return status;
    constexpr int kWarps = 4;
    const int64_t row_bytes = params.residual ? int64_t(plan.rows) * params.n * 4 : 0;
    return start(ffn::finish_kernel<T>, Grid{(params.tokens + kWarps - 1) / kWarps}, 32 * kWarps, kWarps * row_bytes,
                 launch, ffn::FinishParams{params, int(plan.parts), plan.rows * params.n});
}

template <class T>
Status start_ffn_backward_sm80(const ffn::BackwardParams& params, const FfnBackwardPlan& plan, const Launch& launch) {
    return start(plan.rows == 1 ? ffn::backward_kernel<T, 1> : ffn::backward_kernel<T, 2>,
                 Grid{plan.shares, plan.column_blocks}, 32 * ffn::kBackwardWarps, plan.shared_bytes, launch, params);
}

}  // namespace cuda
}  // namespace kron
