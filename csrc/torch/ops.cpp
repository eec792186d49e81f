// The CPU kernels of kron_kernels::kron_mm and kron_mm_backward: checks, layouts, memory and threads of torch around
// the core. The schemas are registered from Python (kron_kernels/_ops.py). Only the stable ABI is used, so that one
// binary serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kron/problem.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    const auto sizes = tensor.sizes();
    for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "(") << sizes[i];
    text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
    return text.str();
}

[[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(std::string("kron_kernels: ") + argument + ": expected " + expected + ", got " + got);
}

[[noreturn]] void fail_shape(const char* argument, const std::string& expected, const Tensor& tensor) {
    fail(argument, expected, "shape " + shape_text(tensor));
}

std::string text(int64_t value) {
    return std::to_string(value);
}

kron::DType kernel_dtype(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return kron::DType::f32;
        case ScalarType::Double:
            return kron::DType::f64;
        case ScalarType::BFloat16:
            return kron::DType::bf16;
        case ScalarType::Half:
            return kron::DType::f16;
        default:
            fail("x", "dtype float32, float64, bfloat16 or float16", "another dtype");
    }
}

void check_like(const char* argument, const Tensor& tensor, ScalarType dtype) {
    if (tensor.scalar_type() != dtype) fail(argument, "the dtype of x", "another dtype");
    if (!tensor.is_cpu()) fail(argument, "a tensor on the cpu", "one on another device");
}

// Checks a (S, m1, n1) and b (S, m2, n2), and x (T, n1 * n2) against them.
kron::Shape checked_shape(const Tensor& x, const Tensor& a, const Tensor& b) {
    const auto x_size = x.sizes(), a_size = a.sizes(), b_size = b.sizes();
    if (a_size.size() != 3 || a_size[0] < 1 || a_size[1] < 1 || a_size[2] < 1) {
        fail_shape("a", "(S, m1, n1) with no empty dimension", a);
    }
    if (b_size.size() != 3 || b_size[0] != a_size[0] || b_size[1] < 1 || b_size[2] < 1) {
        fail_shape("b", "(S, m2, n2) with S = " + text(a_size[0]) + " as in a and no empty dimension", b);
    }
    const int64_t n = a_size[2] * b_size[2];
    if (x_size.size() != 2 || x_size[1] != n) fail_shape("x", "(T, n1 * n2) = (T, " + text(n) + ")", x);
    const ScalarType dtype = x.scalar_type();
    check_like("x", x, dtype);
    check_like("a", a, dtype);
    check_like("b", b, dtype);
    return {x_size[0], a_size[0], a_size[1], a_size[2], b_size[1], b_size[2], kernel_dtype(x)};
}

// The kernels want the last dimension contiguous; rows may lie at any distance.
Tensor rows_contiguous(const Tensor& matrix) {
    return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : torch::stable::contiguous(matrix);
}

kron::Factor factor(const Tensor& stack) {
    const auto strides = stack.strides();
    return {stack.const_data_ptr(), strides[0], strides[1], strides[2]};
}

// torch::stable::new_empty would go through the dispatcher, at the price of a small product.
template <size_t N>
Tensor empty(const int64_t (&sizes)[N], const Tensor& like) {
    int64_t strides[N];
    int64_t stride = 1;
    for (size_t i = N; i-- > 0; stride *= sizes[i]) strides[i] = stride;
    int32_t dtype;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(N, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

void zero(const Tensor& tensor) {
    std::memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel()) * tensor.element_size());
}

struct Tasks {
    void (*task)(void* arg, int64_t index);
    void* arg;
};

void run_range(int64_t begin, int64_t end, void* context) {
    const Tasks& tasks = *static_cast<const Tasks*>(context);
    for (int64_t i = begin; i < end; ++i) tasks.task(tasks.arg, i);
}

void run_on_torch_threads(int64_t count, void (*task)(void*, int64_t), void* arg) {
    Tasks tasks{task, arg};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, run_range, &tasks));
}

kron::Executor torch_executor() {
    return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_threads};
}

Tensor kron_mm(const Tensor& x_any, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias_any,
               int64_t activation) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b);
    const int64_t m = args.shape.m1 * args.shape.m2;
    if (activation < 0 || activation > static_cast<int64_t>(kron::Activation::silu)) {
        fail("activation", "a code from 0 to 4", text(activation));
    }
    std::optional<Tensor> bias;
    if (bias_any) {
        if (bias_any->dim() != 1 || bias_any->size(0) != m)
            fail_shape("bias", "(m1 * m2,) = (" + text(m) + ",)", *bias_any);
        check_like("bias", *bias_any, x_any.scalar_type());
        bias = bias_any->stride(0) == 1 ? *bias_any : torch::stable::contiguous(*bias_any);
        args.bias = bias->const_data_ptr();
    }
    Tensor y = empty({args.shape.tokens, m}, x_any);
    if (args.shape.tokens == 0) return y;

    const Tensor x = rows_contiguous(x_any);
    args.x = x.const_data_ptr();
    args.x_stride = x.stride(0);
    args.a = factor(a);
    args.b = factor(b);
    args.activation = static_cast<kron::Activation>(activation);
    args.y = y.mutable_data_ptr();
    kron::kron_mm_forward(args, torch_executor());
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kron_mm_backward(const Tensor& grad_any, const Tensor& x_any,
                                                            const Tensor& a, const Tensor& b, bool need_x, bool need_a,
                                                            bool need_b, bool need_bias) {
    kron::BackwardArgs args{};
    args.shape = checked_shape(x_any, a, b);
    const kron::Shape& s = args.shape;
    if (grad_any.dim() != 2 || grad_any.size(0) != s.tokens || grad_any.size(1) != s.m1 * s.m2) {
        fail_shape("grad", "(T, m1 * m2) = (" + text(s.tokens) + ", " + text(s.m1 * s.m2) + ")", grad_any);
    }
    check_like("grad", grad_any, x_any.scalar_type());

    const auto output = [&](bool need, const auto& sizes) { return need ? empty(sizes, x_any) : empty({0}, x_any); };
    const int64_t x_sizes[] = {s.tokens, s.n1 * s.n2}, a_sizes[] = {s.terms, s.m1, s.n1};
    const int64_t b_sizes[] = {s.terms, s.m2, s.n2}, bias_sizes[] = {s.m1 * s.m2};
    std::tuple<Tensor, Tensor, Tensor, Tensor> gradients{output(need_x, x_sizes), output(need_a, a_sizes),
                                                         output(need_b, b_sizes), output(need_bias, bias_sizes)};
    const auto& [dx, da, db, dbias] = gradients;
    if (s.tokens == 0) {
        zero(da);
        zero(db);
        zero(dbias);
        return gradients;
    }
    const Tensor grad = rows_contiguous(grad_any), x = rows_contiguous(x_any);
    args.grad = grad.const_data_ptr();
    args.grad_stride = grad.stride(0);
    args.x = x.const_data_ptr();
    args.x_stride = x.stride(0);
    args.a = factor(a);
    args.b = factor(b);
    args.dx = need_x ? dx.mutable_data_ptr() : nullptr;
    args.da = need_a ? da.mutable_data_ptr() : nullptr;
    args.db = need_b ? db.mutable_data_ptr() : nullptr;
    args.dbias = need_bias ? dbias.mutable_data_ptr() : nullptr;
    kron::kron_mm_backward(args, torch_executor());
    return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kron_kernels, CPU, m) {
    m.impl("kron_mm", TORCH_BOX(&kron_mm));
    m.impl("kron_mm_backward", TORCH_BOX(&kron_mm_backward));
}
