#define KRON_ISA amx
#define KRON_VEC_BYTES 64
#include "amx_gemm.h"
#include "forward.h"
#include "kernels.h"

namespace kron {
namespace amx {

// AMX multiplies bf16; every other dtype, and the backward, runs the AVX-512 kernels.
static void forward_entry(const ForwardArgs& args, const Executor& executor) {
    if (args.shape.dtype == DType::bf16) return forward<float, bf16, AmxGemm>(args, executor);
    kAvx512Kernels.forward(args, executor);
}

static void backward_entry(const BackwardArgs& args, const Executor& executor) {
    kAvx512Kernels.backward(args, executor);
}

}  // namespace amx

const Kernels kAmxKernels{amx::forward_entry, amx::backward_entry, amx::Simd<float>::W};

}  // namespace kron
