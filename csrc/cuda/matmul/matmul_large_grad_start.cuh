// Picks the instance of the kernel for the large factor's gradient.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/matmul/matmul_large_grad.cuh"
#include "cuda/matmul/matmul_plan.h"

namespace kron {
namespace cuda {

template <class T>
Status start_large_grad(const LargeGradPlan& plan, const Launch& launch) {
    void (*const kernel)(LargeGradParams) = plan.group == 1   ? matmul_large_grad<T, 1>
                                            : plan.group == 2 ? matmul_large_grad<T, 2>
                                            : plan.group == 4 ? matmul_large_grad<T, 4>
                                                              : matmul_large_grad<T, 8>;
    const LargeGradParams& p = plan.params;
    const int64_t shared = grad_weight_bytes(p, plan.group) + 2 * kGradBuffer<T>;
    return start(kernel, Grid{int64_t(p.plain_tiles) * p.contracted_tiles * p.terms, plan.splits, 1}, kGradThreads,
                 shared, launch, p);
}

}  // namespace cuda
}  // namespace kron
