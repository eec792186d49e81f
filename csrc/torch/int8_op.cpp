// The CPU kernel of kron_kernels::kron_mm_int8: a product whose result leaves the kernel as bytes. Schema:
// kron_kernels/_fused_ops.py.
#include <tuple>

#include "cpu_kernels.h"
#include "products.h"

namespace {

using namespace kron_torch;

std::tuple<Tensor, Tensor> kron_mm_int8(const Tensor& x_any, const Tensor& a, const Tensor& b) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b, true);
    Tensor q = empty_rows(x_any, args.shape.m1 * args.shape.m2, aoti_torch_dtype_int8());
    Tensor scale = empty_rows(x_any, 1, aoti_torch_dtype_float32());
    if (args.shape.tokens == 0) return {q, scale};
    std::optional<Tensor> no_bias;
    kron::Projection only = projection(args.shape, x_any, a, b, no_bias, std::nullopt, nullptr);
    args.int8 = {static_cast<int8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr())};
    run_product(CpuKernels{}, args, only, x_any);
    return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KRON_KERNELS_OPS, CPU, m) {
    m.impl("kron_mm_int8", TORCH_BOX(&kron_mm_int8));
}
