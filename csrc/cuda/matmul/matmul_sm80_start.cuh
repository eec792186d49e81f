// Picks the instance of the kernel for a plan.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/matmul/matmul_plan.h"
#include "cuda/matmul/matmul_sm80.cuh"

namespace kron {
namespace cuda {

template <class T, int G>
Status start_matmul_group(const MmPlan& plan, const Launch& launch) {
    void (*const kernel)(MmParams) = plan.form == MmForm::contract ? matmul_sm80<T, G, MmForm::contract>
                                     : plan.form == MmForm::expand ? matmul_sm80<T, G, MmForm::expand>
                                                                   : matmul_sm80<T, G, MmForm::reduce>;
    return start(kernel, Grid{plan.blocks, 1, 1}, kThreads, plan.shared_bytes, launch, plan.params);
}

template <class T>
Status start_matmul_sm80(const MmPlan& plan, const Launch& launch) {
    switch (plan.group) {
        case 1:
            return start_matmul_group<T, 1>(plan, launch);
        case 2:
            return start_matmul_group<T, 2>(plan, launch);
        case 4:
            return start_matmul_group<T, 4>(plan, launch);
    }
    return start_matmul_group<T, 8>(plan, launch);
}

}  // namespace cuda
}  // namespace kron
