// The CUDA kernels as torch ops of a namespace of their own, from which kron_kernels/backends/cuda.py picks. Key CUDA;
// the emulator of the tests builds the same source for tensors on the CPU.
#include <tuple>

#include "cuda_kernels.h"
#include "ffn.h"
#include "qkv.h"

#ifndef KRON_CUDA_KEY
#define KRON_CUDA_KEY CUDA
#endif

namespace {

using namespace kron_torch;

Tensor matmul(const Tensor& x, const Tensor& a, const Tensor& b, std::optional<Tensor> bias, int64_t activation,
              bool tf32) {
    return kron_matmul(CudaKernels(x, tf32), x, a, b, std::move(bias), activation, std::nullopt);
}

Tensor addmm(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha, bool tf32) {
    return kron_addmm(CudaKernels(x, tf32), base, x, a, b, alpha);
}

void addmm_(Tensor base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha, bool tf32) {
    kron_addmm_(CudaKernels(x, tf32), base, x, a, b, alpha);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matmul_backward(const Tensor& grad, const Tensor& x, const Tensor& a,
                                                           const Tensor& b, int64_t needs, bool tf32) {
    return kron_matmul_backward(CudaKernels(x, tf32), grad, x, a, b, needs);
}

Tensor ffn(const Tensor& x, const Tensor& a1, const Tensor& b1, std::optional<Tensor> bias1, const Tensor& a2,
           const Tensor& b2, std::optional<Tensor> bias2, int64_t activation, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps, bool tf32) {
    return kron_ffn(CudaKernels(x, tf32), x, a1, b1, std::move(bias1), a2, b2, std::move(bias2), activation, residual,
                    norm_weight, norm_bias, eps, std::nullopt, std::nullopt);
}

Gradients ffn_backward(const Tensor& grad, const Tensor& x, const Tensor& a1, const Tensor& b1,
                       std::optional<Tensor> bias1, const Tensor& a2, const Tensor& b2, int64_t activation,
                       int64_t needs, bool tf32) {
    return kron_ffn_backward(CudaKernels(x, tf32), grad, x, a1, b1, std::move(bias1), a2, b2, activation, needs);
}

std::vector<Tensor> qkv(const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                        const std::vector<Tensor>& bias, bool tf32) {
    return kron_qkv(CudaKernels(x, tf32), x, a, b, bias, {});
}

Tensor embedding(const Tensor& ids, const Tensor& a, const Tensor& b, const std::optional<Tensor>& position_ids,
                 const std::optional<Tensor>& position_weight, const std::optional<Tensor>& type_ids,
                 const std::optional<Tensor>& type_weight, const std::optional<Tensor>& norm_weight,
                 const std::optional<Tensor>& norm_bias, double eps) {
    return kron_embedding(CudaKernels(a, false), ids, a, b, position_ids, position_weight, type_ids, type_weight,
                          norm_weight, norm_bias, eps);
}

// Rows (T, S * p) of A's gradient, one a token, and B's gradient.
std::tuple<Tensor, Tensor> embedding_backward(const Tensor& grad_any, const Tensor& ids, const Tensor& a,
                                              const Tensor& b) {
    const CudaKernels kernels(a, false);
    auto args = checked_table<kron::cuda::EmbeddingBackwardArgs>(a, b);
    const auto id_sizes = ids.sizes();
    const std::vector<int64_t> shape(id_sizes.begin(), id_sizes.end());
    args.tokens = ids.numel();
    const auto tokens = kernels.indices("ids", ids, shape, args.rows, a);
    args.ids = tokens.data();
    if (grad_any.dim() != ids.dim() + 1 || grad_any.numel() != args.tokens * args.p * args.k)
        fail_shape("grad", "the shape of ids with last dimension p * k = " + text(args.p * args.k), grad_any);
    check_dtype("grad", grad_any, a);
    const Rows grad = rows_of(grad_any);
    args.grad = grad.data();
    args.grad_stride = grad.stride;
    const int64_t da_sizes[] = {args.tokens, args.terms * args.p}, db_sizes[] = {args.terms, 1, args.k};
    const Tensor da = empty(2, da_sizes, a), db = empty(3, db_sizes, a);
    args.da = da.mutable_data_ptr();
    args.db = db.mutable_data_ptr();
    kernels.embedding_backward(args);
    return {da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY(KRON_CUDA_OPS, m) {
    m.def("kron_matmul(Tensor x, Tensor a, Tensor b, Tensor? bias, int activation, bool tf32) -> Tensor");
    m.def("kron_addmm(Tensor base, Tensor x, Tensor a, Tensor b, float alpha, bool tf32) -> Tensor");
    m.def("kron_addmm_(Tensor(a!) base, Tensor x, Tensor a, Tensor b, float alpha, bool tf32) -> ()");
    m.def(
        "kron_matmul_backward(Tensor grad, Tensor x, Tensor a, Tensor b, int needs, bool tf32) -> (Tensor, Tensor, "
        "Tensor, Tensor)");
    m.def(
        "kron_ffn(Tensor x, Tensor a1, Tensor b1, Tensor? bias1, Tensor a2, Tensor b2, Tensor? bias2, int activation, "
        "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps, bool tf32) -> Tensor");
    m.def(
        "kron_ffn_backward(Tensor grad, Tensor x, Tensor a1, Tensor b1, Tensor? bias1, Tensor a2, Tensor b2, "
        "int activation, int needs, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("kron_qkv(Tensor x, Tensor[] a, Tensor[] b, Tensor[] bias, bool tf32) -> Tensor[]");
    m.def(
        "kron_embedding(Tensor ids, Tensor a, Tensor b, Tensor? position_ids, Tensor? position_weight, "
        "Tensor? type_ids, Tensor? type_weight, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor");
    m.def("kron_embedding_backward(Tensor grad, Tensor ids, Tensor a, Tensor b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(KRON_CUDA_OPS, KRON_CUDA_KEY, m) {
    m.impl("kron_matmul", TORCH_BOX(&matmul));
    m.impl("kron_addmm", TORCH_BOX(&addmm));
    m.impl("kron_addmm_", TORCH_BOX(&addmm_));
    m.impl("kron_matmul_backward", TORCH_BOX(&matmul_backward));
    m.impl("kron_ffn", TORCH_BOX(&ffn));
    m.impl("kron_ffn_backward", TORCH_BOX(&ffn_backward));
    m.impl("kron_qkv", TORCH_BOX(&qkv));
    m.impl("kron_embedding", TORCH_BOX(&embedding));
    m.impl("kron_embedding_backward", TORCH_BOX(&embedding_backward));
}
