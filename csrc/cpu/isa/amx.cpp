#define KRON_ISA amx
#define KRON_VEC_BYTES 64
#include "cpu/ffn/ffn.h"
#include "cpu/gemm/amx_gemm.h"
#include "cpu/isa/kernels.h"
#include "cpu/product/forward.h"

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

static void ffn_entry(const FfnArgs& args, const Executor& executor) {
    if (args.first.dtype == DType::bf16) return ffn_forward<float, bf16, AmxGemm>(args, executor);
    kAvx512Kernels.ffn_forward(args, executor);
}

static bool ffn_is_fused_entry(const Shape& first, const Shape& second, bool packed) {
    if (first.dtype == DType::bf16) return ffn_is_fused<float, bf16, AmxGemm>(first, second, packed);
    return kAvx512Kernels.ffn_is_fused(first, second, packed);
}

static void embedding_entry(const EmbeddingArgs& args, const Executor& executor) {
    kAvx512Kernels.embedding(args, executor);
}

static int64_t packed_bytes_entry(const Shape& shape) {
    if (shape.dtype == DType::bf16) return Packing<float, bf16, AmxGemm>(shape, Factor{}, Factor{}).bytes();
    return kAvx512Kernels.packed_bytes(shape);
}

static void pack_entry(const Shape& shape, const Factor& a, const Factor& b, void* out, const Executor& executor) {
    if (shape.dtype == DType::bf16) {
        Packing<float, bf16, AmxGemm>(shape, a, b).pack(shape, out, executor);
        return;
    }
    kAvx512Kernels.pack(shape, a, b, out, executor);
}

static void activation_entry(Activation kind, DType dtype, const void* h, const void* grad, void* out, int64_t from,
                             int64_t to) {
    kAvx512Kernels.activation(kind, dtype, h, grad, out, from, to);
}

}  // namespace amx

const Kernels kAmxKernels{amx::forward_entry,   amx::backward_entry,     amx::ffn_entry,  amx::ffn_is_fused_entry,
                          amx::embedding_entry, amx::packed_bytes_entry, amx::pack_entry, amx::activation_entry};

}  // namespace kron
