// What a product needs of its kernel: rows a token, form, tiles. A pure function of shapes, strides and the device.
#pragma once

#include "kron/cuda.h"
#include "mm_params.h"

namespace kron {
namespace cuda {

struct MmPlan {
    MmParams params;  // all but the projections' pointers to packed factors
    int group;        // rows a token: 1, 2, 4 or 8
    bool expand;
    bool pack;                             // the large factors have to be packed
    int64_t packed_columns, packed_bytes;  // of one projection
    int64_t shared_bytes, blocks;
};

const char* refuse_mm(const ForwardArgs& args, const Launch& launch);
MmPlan plan_mm(const ForwardArgs& args, const Launch& launch);
inline int64_t workspace_mm(const MmPlan& plan) {
    return plan.pack ? plan.packed_bytes * plan.params.count : 0;
}
// Packs if the plan says so and runs the product; `workspace` holds workspace_mm bytes.
Status run_mm(const ForwardArgs& args, const MmPlan& plan, const Launch& launch, void* workspace);

// The kernels of one type; each instantiated in a file of its own.
template <class T>
Status start_mm_sm80(const MmPlan& plan, const Launch& launch);

}  // namespace cuda
}  // namespace kron
