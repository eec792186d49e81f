// Which devices and problems the CUDA kernels take, known without one: ops without tensors.
#include <vector>

#include "kron/cuda.h"
#include "kron/cuda_device.h"
#include "operands.h"

namespace {

using namespace kron_torch;
using kron::cuda::Launch;

std::string answer(const char* reason) {
    return reason ? reason : "";
}

// Why the kernels cannot run on a device; empty where they can.
std::string device_status(int64_t device) {
    kron::cuda::DeviceInfo info{};
    return answer(kron::cuda::unsupported_device(static_cast<int>(device), &info));
}

// Contiguous operands at no address: null counts as aligned.
kron::Factor contiguous_factor(int64_t m, int64_t n) {
    return {nullptr, m * n, n, 1};
}

kron::Projection projection_of(const kron::Shape& s) {
    return {contiguous_factor(s.m1, s.n1), contiguous_factor(s.m2, s.n2), nullptr, nullptr, 0, nullptr};
}

const char* unsupported_matmul(const kron::Shape& s, const Launch& launch) {
    const kron::Projection only = projection_of(s);
    kron::ForwardArgs args{};
    args.shape = s, args.x_stride = s.n1 * s.n2, args.count = 1, args.projections = &only;
    return kron::cuda::unsupported_kron_matmul(args, launch);
}

const char* unsupported_matmul_backward(const kron::Shape& s, const Launch& launch) {
    kron::BackwardArgs args{};
    args.shape = s, args.grad_stride = s.m1 * s.m2, args.x_stride = s.n1 * s.n2;
    args.a = contiguous_factor(s.m1, s.n1), args.b = contiguous_factor(s.m2, s.n2);
    return kron::cuda::unsupported_kron_matmul_backward(args, launch);
}

const char* unsupported_ffn(const kron::Shape& first, const kron::Shape& second, bool norm, const Launch& launch) {
    kron::FfnArgs args{};
    args.first = first, args.second = second, args.x_stride = first.n1 * first.n2;
    args.w1 = projection_of(first), args.w2 = projection_of(second);
    alignas(16) static const char somewhere[16] = {};
    if (norm) args.norm = {somewhere, second.m1 * second.m2, somewhere, somewhere, 0};
    return kron::cuda::unsupported_kron_ffn(args, launch);
}

const char* unsupported_ffn_backward(const kron::Shape& first, const kron::Shape& second, const Launch& launch) {
    kron::FfnBackwardArgs args{};
    args.first = first, args.second = second;
    args.grad_stride = second.m1 * second.m2, args.x_stride = first.n1 * first.n2;
    args.a1 = contiguous_factor(first.m1, first.n1), args.b1 = contiguous_factor(first.m2, first.n2);
    args.a2 = contiguous_factor(second.m1, second.n1), args.b2 = contiguous_factor(second.m2, second.n2);
    return kron::cuda::unsupported_kron_ffn_backward(args, launch);
}

const char* unsupported_embedding(const kron::Shape& s, const Launch& launch) {
    kron::EmbeddingArgs args{};
    args.tokens = s.tokens, args.terms = s.terms, args.rows = s.m1, args.p = s.n1, args.k = s.n2, args.dtype = s.dtype;
    args.a = contiguous_factor(s.m1, s.n1), args.b = contiguous_factor(1, s.n2);
    return kron::cuda::unsupported_kron_embedding(args, launch);
}

const char* unsupported_embedding_backward(const kron::Shape& s, const Launch& launch) {
    kron::cuda::EmbeddingBackwardArgs args{};
    args.tokens = s.tokens, args.terms = s.terms, args.rows = s.m1, args.p = s.n1, args.k = s.n2, args.dtype = s.dtype;
    args.grad_stride = s.n1 * s.n2;
    args.a = contiguous_factor(s.m1, s.n1), args.b = contiguous_factor(1, s.n2);
    return kron::cuda::unsupported_kron_embedding_backward(args, launch);
}

constexpr size_t kSizes = 5;

// Why the kernels do not take an op's problem with contiguous, aligned operands; empty where they do. `sizes` are
// S, m1, n1, m2, n2 of each product of the op. "kron_ffn_norm" is a kron_ffn with residual and norm.
std::string unsupported_reason(const std::string& op, int64_t dtype, int64_t tokens, const std::vector<int64_t>& sizes,
                               int64_t sm, int64_t shared_per_block, bool tf32) {
    if (dtype < 0 || dtype > static_cast<int64_t>(kron::DType::f16)) fail("dtype", "a code from 0 to 3", text(dtype));
    const size_t count = sizes.size() / kSizes;
    const bool norm = op == "kron_ffn_norm", is_ffn = norm || op == "kron_ffn";
    const size_t wanted = is_ffn || op == "kron_ffn_backward" ? 2 : op == "kron_qkv" ? count : 1;
    if (count == 0 || sizes.size() != wanted * kSizes)
        fail("sizes", "S, m1, n1, m2, n2 of each product", text(static_cast<int64_t>(sizes.size())) + " numbers");
    const char* architectures = kron::cuda::built_architectures();
    if (!kron::cuda::runs_on(architectures, static_cast<int>(sm)))
        return std::string("the kernels were built for ") + architectures + ", not for sm_" + text(sm);
    const Launch launch{nullptr, static_cast<int>(sm), 1, shared_per_block, tf32, nullptr, 0};
    std::vector<kron::Shape> shapes;
    for (const int64_t* n = sizes.data(); shapes.size() < count; n += kSizes)
        shapes.push_back({tokens, n[0], n[1], n[2], n[3], n[4], static_cast<kron::DType>(dtype)});
    if (is_ffn) return answer(unsupported_ffn(shapes[0], shapes[1], norm, launch));
    if (op == "kron_ffn_backward") return answer(unsupported_ffn_backward(shapes[0], shapes[1], launch));
    if (op == "kron_matmul_backward") return answer(unsupported_matmul_backward(shapes[0], launch));
    if (op == "kron_embedding_backward") return answer(unsupported_embedding_backward(shapes[0], launch));
    if (op == "kron_embedding") return answer(unsupported_embedding(shapes[0], launch));
    if (op != "kron_matmul" && op != "kron_addmm" && op != "kron_addmm_" && op != "kron_qkv")
        return "there is no CUDA kernel of " + op;
    for (const kron::Shape& shape : shapes)
        if (const char* reason = unsupported_matmul(shape, launch)) return reason;
    return "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KRON_CUDA_OPS, m) {
    m.def("device_status(int device) -> str");
    m.def(
        "unsupported_reason(str op, int dtype, int tokens, int[] sizes, int sm, int shared_per_block, bool tf32) -> "
        "str");
}

STABLE_TORCH_LIBRARY_IMPL(KRON_CUDA_OPS, CompositeExplicitAutograd, m) {
    m.impl("device_status", TORCH_BOX(&device_status));
    m.impl("unsupported_reason", TORCH_BOX(&unsupported_reason));
}
