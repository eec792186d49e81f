// The CPU kernels of the ops. Schemas: kron_kernels/schemas.
#include "cpu_kernels.h"
#include "ffn.h"
#include "qkv.h"

namespace {

using namespace kron_torch;

Tensor matmul(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias, int64_t activation,
              const std::optional<Tensor>& packed) {
    return kron_matmul(CpuKernels{}, x, a, b, std::move(bias), activation, packed);
}

Tensor addmm(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha) {
    return kron_addmm(CpuKernels{}, base, x, a, b, alpha);
}

void addmm_(Tensor base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha) {
    kron_addmm_(CpuKernels{}, base, x, a, b, alpha);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matmul_backward(const Tensor& grad, const Tensor& x, const Tensor& a,
                                                           const Tensor& b, int64_t needs) {
    return kron_matmul_backward(CpuKernels{}, grad, x, a, b, needs);
}

Tensor kron_pack(const Tensor& a, const Tensor& b) {
    const auto a_size = stack_sizes(a, false), b_size = stack_sizes(b, false);
    if (!a_size) fail_shape("a", "(S, m1, n1) with no empty dimension", a);
    if (!b_size || (*b_size)[0] != (*a_size)[0]) fail_shape("b", "(S, m2, n2) with as many terms as a", b);
    check_dtype("b", b, a);
    const kron::Shape shape{1, (*a_size)[0], (*a_size)[1], (*a_size)[2], (*b_size)[1], (*b_size)[2], kernel_dtype(a)};
    const int64_t bytes = kron::kron_packed_bytes(shape), stride = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor packed(handle);
    kron::kron_pack(shape, factor(a), factor(b), packed.mutable_data_ptr(), torch_executor());
    return packed;
}

Tensor matmul_norm(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias,
                   const Tensor& residual, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                   const std::optional<Tensor>& packed) {
    return kron_matmul_norm(CpuKernels{}, x, a, b, std::move(bias), residual, norm_weight, norm_bias, eps, packed);
}

Tensor ffn(const Tensor& x, const Tensor& a1, const Tensor& b1, std::optional<Tensor> bias1, const Tensor& a2,
           const Tensor& b2, std::optional<Tensor> bias2, int64_t activation, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps,
           const std::optional<Tensor>& packed1, const std::optional<Tensor>& packed2) {
    return kron_ffn(CpuKernels{}, x, a1, b1, std::move(bias1), a2, b2, std::move(bias2), activation, residual,
                    norm_weight, norm_bias, eps, packed1, packed2);
}

Gradients ffn_backward(const Tensor& grad, const Tensor& x, const Tensor& a1, const Tensor& b1,
                       std::optional<Tensor> bias1, const Tensor& a2, const Tensor& b2, int64_t activation,
                       int64_t needs) {
    return kron_ffn_backward(CpuKernels{}, grad, x, a1, b1, std::move(bias1), a2, b2, activation, needs);
}

std::vector<Tensor> qkv(const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                        const std::vector<Tensor>& bias, const std::vector<Tensor>& packed) {
    return kron_qkv(CpuKernels{}, x, a, b, bias, packed);
}

Tensor embedding(const Tensor& ids, const Tensor& a, const Tensor& b, const std::optional<Tensor>& position_ids,
                 const std::optional<Tensor>& position_weight, const std::optional<Tensor>& type_ids,
                 const std::optional<Tensor>& type_weight, const std::optional<Tensor>& norm_weight,
                 const std::optional<Tensor>& norm_bias, double eps) {
    return kron_embedding(CpuKernels{}, ids, a, b, position_ids, position_weight, type_ids, type_weight, norm_weight,
                          norm_bias, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kron_kernels, CPU, m) {
    m.impl("kron_matmul", TORCH_BOX(&matmul));
    m.impl("kron_addmm", TORCH_BOX(&addmm));
    m.impl("kron_addmm_", TORCH_BOX(&addmm_));
    m.impl("kron_matmul_backward", TORCH_BOX(&matmul_backward));
    m.impl("kron_pack", TORCH_BOX(&kron_pack));
    m.impl("kron_matmul_norm", TORCH_BOX(&matmul_norm));
    m.impl("kron_ffn", TORCH_BOX(&ffn));
    m.impl("kron_ffn_backward", TORCH_BOX(&ffn_backward));
    m.impl("kron_qkv", TORCH_BOX(&qkv));
    m.impl("kron_embedding", TORCH_BOX(&embedding));
}
