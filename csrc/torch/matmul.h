// The ops of one product on given kernels: operands checked and laid out, results allocated on the device of x.
// `kernels` has a function for each operation of kron/problem.h.
#pragma once

#include <initializer_list>
#include <tuple>

#include "operands.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

// The product of x with one pair of factors; all else in `args` is set.
template <class Kernels>
void run_product(const Kernels& kernels, kron::ForwardArgs& args, const kron::Projection& only, const Tensor& x_any) {
    const Rows x = rows_of(x_any);
    args.x = x.data();
    args.x_stride = x.stride;
    args.count = 1;
    args.projections = &only;
    kernels.matmul(args);
}

template <class Kernels>
Tensor kron_matmul(const Kernels& kernels, const Tensor& x_any, const Tensor& a, const Tensor& b,
                   std::optional<Tensor> bias, int64_t activation, const std::optional<Tensor>& packed) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b, true);
    args.activation = checked_activation(activation);
    Tensor y = empty_rows(x_any, args.shape.m1 * args.shape.m2);
    kron::Projection only = projection(args.shape, x_any, a, b, bias, packed, y.mutable_data_ptr());
    if (args.shape.tokens == 0) return y;
    run_product(kernels, args, only, x_any);
    return y;
}

// y = base + alpha * product, y being base itself or a tensor of its own.
template <class Kernels>
void add_product(const Kernels& kernels, const Tensor& base, const Tensor& x_any, const Tensor& a, const Tensor& b,
                 double alpha, const Tensor& y) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b, true);
    check_like("base", base, x_any, args.shape.m1 * args.shape.m2, "m1 * m2 = ");
    if (args.shape.tokens == 0) return;
    std::optional<Tensor> no_bias;
    kron::Projection only = projection(args.shape, x_any, a, b, no_bias, std::nullopt, y.mutable_data_ptr());
    only.base = base.const_data_ptr();
    args.alpha = alpha;
    run_product(kernels, args, only, x_any);
}

template <class Kernels>
Tensor kron_addmm(const Kernels& kernels, const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                  double alpha) {
    const Tensor rows = torch::stable::contiguous(base);
    const Tensor y = empty_rows(base, base.dim() > 0 ? base.size(base.dim() - 1) : 1);
    add_product(kernels, rows, x, a, b, alpha, y);
    return y;
}

template <class Kernels>
void kron_addmm_(const Kernels& kernels, Tensor base, const Tensor& x, const Tensor& a, const Tensor& b, double alpha) {
    if (!base.is_contiguous()) fail("base", "a contiguous tensor", "strides that are not");
    add_product(kernels, base, x, a, b, alpha, base);
}

// Gradients of x, a, b, bias by the bits of `needs`, bit 0 that of x; one that is not wanted has shape (0,).
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> kron_matmul_backward(const Kernels& kernels, const Tensor& grad_any,
                                                                const Tensor& x_any, const Tensor& a, const Tensor& b,
                                                                int64_t needs) {
    const bool need_x = needs & 1, need_a = needs >> 1 & 1, need_b = needs >> 2 & 1, need_bias = needs >> 3 & 1;
    kron::BackwardArgs args{};
    args.shape = checked_shape(x_any, a, b, false);
    const kron::Shape& s = args.shape;
    const int64_t m = s.m1 * s.m2;
    check_like("grad", grad_any, x_any, m, "m1 * m2 = ");

    const auto output = [&](bool need, std::initializer_list<int64_t> sizes) {
        const int64_t none = 0;
        return need ? empty(sizes.size(), sizes.begin(), x_any) : empty(1, &none, x_any);
    };
    std::tuple<Tensor, Tensor, Tensor, Tensor> gradients{need_x ? empty_rows(x_any, s.n1 * s.n2) : output(false, {}),
                                                         output(need_a, {s.terms, s.m1, s.n1}),
                                                         output(need_b, {s.terms, s.m2, s.n2}), output(need_bias, {m})};
    const auto& [dx, da, db, dbias] = gradients;
    if (s.tokens == 0) {
        zero(da);
        zero(db);
        zero(dbias);
        return gradients;
    }
    const Rows grad = rows_of(grad_any), x = rows_of(x_any);
    args.grad = grad.data();
    args.grad_stride = grad.stride;
    args.x = x.data();
    args.x_stride = x.stride;
    args.a = factor(a);
    args.b = factor(b);
    args.dx = need_x ? dx.mutable_data_ptr() : nullptr;
    args.da = need_a ? da.mutable_data_ptr() : nullptr;
    args.db = need_b ? db.mutable_data_ptr() : nullptr;
    args.dbias = need_bias ? dbias.mutable_data_ptr() : nullptr;
    kernels.matmul_backward(args);
    return gradients;
}

}  // namespace kron_torch
