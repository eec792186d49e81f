// The CPU kernels of the ops of one product. Schemas: kron_kernels/_ops.py.
#include "cpu_kernels.h"
#include "products.h"

namespace {

using namespace kron_torch;

Tensor mm(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias, int64_t activation,
          const std::optional<Tensor>& packed) {
    return kron_matmul(CpuKernels{}, x, a, b, std::move(bias), activation, packed);
}

Tensor mm_add(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha) {
    return kron_addmm(CpuKernels{}, base, x, a, b, alpha);
}

void mm_add_(Tensor base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha) {
    kron_addmm_(CpuKernels{}, base, x, a, b, alpha);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mm_backward(const Tensor& grad, const Tensor& x, const Tensor& a,
                                                       const Tensor& b, int64_t needs) {
    return kron_matmul_backward(CpuKernels{}, grad, x, a, b, needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kron_kernels, CPU, m) {
    m.impl("kron_matmul", TORCH_BOX(&mm));
    m.impl("kron_addmm", TORCH_BOX(&mm_add));
    m.impl("kron_addmm_", TORCH_BOX(&mm_add_));
    m.impl("kron_matmul_backward", TORCH_BOX(&mm_backward));
}
