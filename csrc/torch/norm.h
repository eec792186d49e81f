// The product with a residual and a layer norm on given kernels, as matmul.h has the plain product.
#pragma once

#include "matmul.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

// A residual and a norm's vectors for results (..., m) of x, alive as long as the call.
class Norm {
  public:
    Norm(const Tensor& x, int64_t m, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps)
        : rows_(checked_residual(x, m, residual)),
          weight_(checked_vector("norm_weight", "(m1 * m2,)", weight, m, x)),
          bias_(checked_vector("norm_bias", "(m1 * m2,)", bias, m, x)),
          eps_(checked_eps(eps)) {}
    kron::NormArgs args() const {
        return {rows_.data(), rows_.stride, weight_.const_data_ptr(), bias_.const_data_ptr(), eps_};
    }

  private:
    static Rows checked_residual(const Tensor& x, int64_t m, const Tensor& residual) {
        check_like("residual", residual, x, m, "");
        return rows_of(residual);
    }
    static double checked_eps(double eps) {
        if (!(eps >= 0)) fail("eps", "a number of at least 0", std::to_string(eps));
        return eps;
    }
    Rows rows_;
    Tensor weight_, bias_;
    double eps_;
};

template <class Kernels>
Tensor kron_matmul_norm(const Kernels& kernels, const Tensor& x_any, const Tensor& a, const Tensor& b,
                        std::optional<Tensor> bias, const Tensor& residual, const Tensor& norm_weight,
                        const Tensor& norm_bias, double eps, const std::optional<Tensor>& packed) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b, false);
    const int64_t m = args.shape.m1 * args.shape.m2;
    const Norm norm(x_any, m, residual, norm_weight, norm_bias, eps);
    Tensor y = empty_rows(x_any, m);
    kron::Projection only = projection(args.shape, x_any, a, b, bias, packed, y.mutable_data_ptr());
    if (args.shape.tokens == 0) return y;
    args.norm = norm.args();
    run_product(kernels, args, only, x_any);
    return y;
}

}  // namespace kron_torch
