// The CUDA kernels as torch ops of a namespace of their own, from which kron_kernels/_cuda.py picks. Key CUDA; the
// emulator of the tests builds the same source for tensors on the CPU.
#include <tuple>

#include "cuda_kernels.h"

#ifndef KRON_CUDA_KEY
#define KRON_CUDA_KEY CUDA
#endif

namespace {

using namespace kron_torch;

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

std::string device_status(int64_t device) {
    kron::cuda::DeviceInfo info{};
    const char* reason = kron::cuda::refuse_device(static_cast<int>(device), &info);
    return reason ? reason : "";
}

kron::DType dtype_of(int64_t code) {
    if (code < 0 || code > static_cast<int64_t>(kron::DType::f16)) fail("dtype", "a code from 0 to 3", text(code));
    return static_cast<kron::DType>(code);
}

void check_sizes(const std::vector<int64_t>& sizes, size_t count, const char* expected) {
    if (sizes.size() != count) fail("sizes", expected, text(static_cast<int64_t>(sizes.size())) + " numbers");
}

std::string answer(const char* reason) {
    return reason ? reason : "";
}

// Why the kernels do not take a problem whose operands are contiguous and aligned; empty where they do. Needs no GPU.
std::string refusal(const std::string& op, int64_t dtype, const std::vector<int64_t>& n, int64_t sm,
                    int64_t shared_per_block, bool tf32) {
    const kron::cuda::Launch launch{nullptr, static_cast<int>(sm), 1, shared_per_block, tf32, nullptr, 0};
    if (!kron::cuda::runs_on(kron::cuda::built_architectures(), launch.sm))
        return "the kernels were built for " + std::string(kron::cuda::built_architectures()) + ", not for sm_" +
               text(sm);
    if (op == "kron_embedding") {
        check_sizes(n, 5, "T, S, V, p, k");
        kron::EmbeddingArgs args{};
        args.tokens = n[0], args.terms = n[1], args.rows = n[2], args.p = n[3], args.k = n[4];
        args.dtype = dtype_of(dtype);
        return answer(kron::cuda::refuse_kron_embedding(args, launch));
    }
    return "there is no kernel of " + op;
}

}  // namespace

STABLE_TORCH_LIBRARY(KRON_KERNELS_OPS, m) {
    m.def(
        "kron_embedding(Tensor ids, Tensor a, Tensor b, Tensor? position_ids, Tensor? position_weight, "
        "Tensor? type_ids, Tensor? type_weight, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor");
    m.def("kron_embedding_backward(Tensor grad, Tensor ids, Tensor a, Tensor b) -> (Tensor, Tensor)");
    m.def("device_status(int device) -> str");
    m.def("refusal(str op, int dtype, int[] sizes, int sm, int shared_per_block, bool tf32) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(KRON_KERNELS_OPS, KRON_CUDA_KEY, m) {
    m.impl("kron_embedding", TORCH_BOX(&embedding));
    m.impl("kron_embedding_backward", TORCH_BOX(&embedding_backward));
}

STABLE_TORCH_LIBRARY_IMPL(KRON_KERNELS_OPS, CompositeExplicitAutograd, m) {
    m.impl("device_status", TORCH_BOX(&device_status));
    m.impl("refusal", TORCH_BOX(&refusal));
}
