// What a product needs of its kernel: rows a token, form, tiles. A pure function of shapes, strides and the device.
#pragma once

#include "cuda/common/values.h"
#include "cuda/matmul/matmul_params.h"
#include "kron/cuda.h"

namespace kron {
namespace cuda {

struct MmPlan {
    MmParams params;  // all but the projections' pointers to packed factors
    int group;        // rows a token: 1, 2, 4 or 8
    MmForm form;
    bool pack;                             // the large factors have to be packed
    int64_t packed_columns, packed_bytes;  // of one projection
    int64_t shared_bytes, blocks;
};

struct LargeGradPlan {
    LargeGradParams params;  // all but the sums
    int group;
    int64_t splits;
};

const char* unsupported_matmul(const ForwardArgs& args, const Launch& launch);
// `reduce`: one term a projection, and the caller fills in params.other and params.sums.
MmPlan plan_matmul(const ForwardArgs& args, const Launch& launch, bool reduce = false);
inline int64_t workspace_matmul(const MmPlan& plan) {
    return plan.pack ? plan.packed_bytes * plan.params.count : 0;
}
// Packs if the plan says so and runs the product; `workspace` holds workspace_matmul bytes.
Status run_matmul(const ForwardArgs& args, const MmPlan& plan, const Launch& launch, void* workspace);

// Whether words of 16 bytes of a tensor of tokens hold whole values of its parts: what RowFiller needs for x.vector.
bool tokens_are_aligned(const void* data, int64_t stride, DType dtype, bool right, int64_t parts, int64_t width);
int power_of_two_from(int64_t n);

// The kernels of one type; each instantiated in a file of its own.
template <class T>
Status start_matmul_sm80(const MmPlan& plan, const Launch& launch);
template <class T>
Status start_large_grad(const LargeGradPlan& plan, const Launch& launch);

// f(T{}) with the type of the elements.
template <class F>
Status with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::bf16:
            return f(device::Bf16{});
        case DType::f16:
            return f(device::F16{});
        default:
            return f(float{});
    }
}

}  // namespace cuda
}  // namespace kron
