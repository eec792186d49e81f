// Instantiates the kernels for every dtype at the level of the including file.
#pragma once

#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace kron {
namespace KRON_ISA {

// fp16 and bf16 compute in fp32.
static void forward_entry(const ForwardArgs& args, const Executor& executor) {
    switch (args.shape.dtype) {
        case DType::f32:
            return forward<float, float>(args, executor);
        case DType::f64:
            return forward<double, double>(args, executor);
        case DType::bf16:
            return forward<float, bf16>(args, executor);
        case DType::f16:
            return forward<float, f16>(args, executor);
    }
}

static void backward_entry(const BackwardArgs& args, const Executor& executor) {
    switch (args.shape.dtype) {
        case DType::f32:
            return backward<float, float>(args, executor);
        case DType::f64:
            return backward<double, double>(args, executor);
        case DType::bf16:
            return backward<float, bf16>(args, executor);
        case DType::f16:
            return backward<float, f16>(args, executor);
    }
}

}  // namespace KRON_ISA
}  // namespace kron
