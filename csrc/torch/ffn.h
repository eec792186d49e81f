// The feed-forward block and its gradients on given kernels.
#pragma once

#include <initializer_list>
#include <tuple>

#include "norm.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

// The second pair takes what the first gives.
inline kron::Shape checked_second(const kron::Shape& first, const Tensor& x, const Tensor& a2, const Tensor& b2) {
    const auto a_size = stack_sizes(a2, false), b_size = stack_sizes(b2, false);
    if (!a_size) fail_shape("a2", "(S, m1, n1) with no empty dimension", a2);
    if (!b_size || (*b_size)[0] != (*a_size)[0]) fail_shape("b2", "(S, m2, n2) with as many terms as a2", b2);
    const int64_t middle = first.m1 * first.m2;
    if ((*a_size)[2] * (*b_size)[2] != middle)
        fail("a2, b2", "n1 * n2 = " + text(middle) + ", what the first pair gives",
             "shapes " + shape_text(a2) + " and " + shape_text(b2));
    check_dtype("a2", a2, x);
    check_dtype("b2", b2, x);
    return {first.tokens, (*a_size)[0], (*a_size)[1], (*a_size)[2], (*b_size)[1], (*b_size)[2], first.dtype};
}

template <class Kernels>
Tensor kron_ffn(const Kernels& kernels, const Tensor& x_any, const Tensor& a1, const Tensor& b1,
                std::optional<Tensor> bias1, const Tensor& a2, const Tensor& b2, std::optional<Tensor> bias2,
                int64_t activation, const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight,
                const std::optional<Tensor>& norm_bias, double eps, const std::optional<Tensor>& packed1,
                const std::optional<Tensor>& packed2) {
    kron::FfnArgs args{};
    args.first = checked_shape(x_any, a1, b1, false);
    args.second = checked_second(args.first, x_any, a2, b2);
    args.activation = checked_activation(activation);
    const int64_t m = args.second.m1 * args.second.m2;
    std::optional<Norm> norm;
    if (residual) {
        if (!norm_weight || !norm_bias) fail("norm_weight, norm_bias", "both with a residual", "none");
        norm.emplace(x_any, m, *residual, *norm_weight, *norm_bias, eps);
        args.norm = norm->args();
    }
    Tensor y = empty_rows(x_any, m);
    args.w1 = projection(args.first, x_any, a1, b1, bias1, packed1, nullptr);
    args.w2 = projection(args.second, x_any, a2, b2, bias2, packed2, y.mutable_data_ptr());
    if (args.first.tokens == 0) return y;
    const Rows x = rows_of(x_any);
    args.x = x.data();
    args.x_stride = x.stride;
    kernels.ffn(args);
    return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Kernels>
Gradients kron_ffn_backward(const Kernels& kernels, const Tensor& grad_any, const Tensor& x_any, const Tensor& a1,
                            const Tensor& b1, std::optional<Tensor> bias1, const Tensor& a2, const Tensor& b2,
                            int64_t activation, int64_t needs) {
    kron::FfnBackwardArgs args{};
    args.first = checked_shape(x_any, a1, b1, false);
    args.second = checked_second(args.first, x_any, a2, b2);
    args.activation = checked_activation(activation);
    const kron::Shape &f = args.first, &s = args.second;
    check_like("grad", grad_any, x_any, s.m1 * s.m2, "");
    if (bias1) {
        bias1 = checked_vector("bias1", "(m1 * m2,)", *bias1, f.m1 * f.m2, x_any);
        args.bias1 = bias1->const_data_ptr();
    }
    const auto output = [&](int bit, std::initializer_list<int64_t> sizes, void*& place) {
        const int64_t none = 0;
        if (!(needs >> bit & 1)) return empty(1, &none, x_any);
        Tensor tensor = empty(static_cast<int64_t>(sizes.size()), sizes.begin(), x_any);
        place = tensor.mutable_data_ptr();
        return tensor;
    };
    const int64_t none = 0;
    Tensor dx = needs & 1 ? empty_rows(x_any, f.n1 * f.n2) : empty(1, &none, x_any);
    if (needs & 1) args.dx = dx.mutable_data_ptr();
    Gradients gradients{dx,
                        output(1, {f.terms, f.m1, f.n1}, args.da1),
                        output(2, {f.terms, f.m2, f.n2}, args.db1),
                        output(3, {f.m1 * f.m2}, args.dbias1),
                        output(4, {s.terms, s.m1, s.n1}, args.da2),
                        output(5, {s.terms, s.m2, s.n2}, args.db2),
                        output(6, {s.m1 * s.m2}, args.dbias2)};
    if (f.tokens == 0) {
        std::apply([](const auto&... each) { (zero(each), ...); }, gradients);
        return gradients;
    }
    const Rows grad = rows_of(grad_any), x = rows_of(x_any);
    args.grad = grad.data();
    args.grad_stride = grad.stride;
    args.x = x.data();
    args.x_stride = x.stride;
    args.a1 = factor(a1), args.b1 = factor(b1), args.a2 = factor(a2), args.b2 = factor(b2);
    kernels.ffn_backward(args);
    return gradients;
}

}  // namespace kron_torch
