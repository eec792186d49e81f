// The AMX kernels with their tile registers emulated: the code that surrounds them (packing, padding, conversion,
// blocking) is the shipped one. Linked into test_core only.
#define KRON_ISA amx_emulated
#define KRON_VEC_BYTES 16
#define KRON_AMX_EMULATE
#include "cpu/ffn/ffn.h"
#include "cpu/gemm/amx_gemm.h"
#include "cpu/product/forward.h"
#include "emulated.h"

void amx_emulated_forward(const kron::ForwardArgs& args, const kron::Executor& executor) {
    using namespace kron::amx_emulated;
    forward<float, bf16, AmxGemm>(args, executor);
}

void amx_emulated_ffn(const kron::FfnArgs& args, const kron::Executor& executor) {
    kron::amx_emulated::ffn_forward<float, kron::amx_emulated::bf16, kron::amx_emulated::AmxGemm>(args, executor);
}

int64_t amx_emulated_packed_bytes(const kron::Shape& shape) {
    using namespace kron::amx_emulated;
    return Packing<float, bf16, AmxGemm>(shape, kron::Factor{}, kron::Factor{}).bytes();
}

void amx_emulated_pack(const kron::Shape& shape, const kron::Factor& a, const kron::Factor& b, void* out,
                       const kron::Executor& executor) {
    using namespace kron::amx_emulated;
    Packing<float, bf16, AmxGemm>(shape, a, b).pack(shape, out, executor);
}

bool amx_emulated_ffn_is_fused(const kron::Shape& first, const kron::Shape& second, bool packed) {
    using namespace kron::amx_emulated;
    return ffn_is_fused<float, bf16, AmxGemm>(first, second, packed);
}
