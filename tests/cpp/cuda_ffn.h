// A feed-forward block for the tests of its CUDA kernels: operands, and forward and backward in fp64.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kron/cuda.h"
#include "support.h"

namespace test {

// Of an activation in fp64.
inline double slope(Activation kind, double x) {
    const double c = 2 * std::sqrt(2 / M_PI), v = kind == Activation::silu ? x : c * (x + 0.044715 * x * x * x);
    const double s = 1 / (1 + std::exp(-v));
    switch (kind) {
        case Activation::gelu:
            return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        case Activation::gelu_tanh:
            return s + x * s * (1 - s) * c * (1 + 3 * 0.044715 * x * x);
        case Activation::relu:
            return x > 0;
        case Activation::silu:
            return s * (1 + x * (1 - s));
        case Activation::none:
            break;
    }
    return 1;
}

struct Ffn {
    int64_t tokens = 33, rows = 2, wide = 8, k = 48, middle = 32, n = 48;
    DType dtype = DType::bf16;
    Activation activation = Activation::gelu;
    bool biased = true, normed = false;
    // x, its gradient and the residual within rows wider by so many values; where that is odd also beginning at the
    // second, and the factors are transposed.
    int64_t gap = 0;
    bool odd() const { return gap % 2; }

    std::string name() const {
        std::string all = "ffn";
        for (const int64_t v : {tokens, rows, wide, k, middle, n, int64_t(dtype), int64_t(activation), int64_t(biased),
                                int64_t(normed), gap})
            all += " " + std::to_string(v);
        return all;
    }
    kron::Shape first() const { return {tokens, 1, wide, rows, middle, k, dtype}; }
    kron::Shape second() const { return {tokens, 1, rows, wide, n, middle, dtype}; }
};

// Random values of a matrix (rows, columns), of the scale that keeps sums over `inner` values of order one.
struct Matrix {
    Matrix(int64_t rows, int64_t columns, DType dtype, bool strided, double inner)
        : rows(rows),
          columns(columns),
          stride_row(strided ? 1 : columns),
          stride_col(strided ? rows : 1),
          buffer(rows * columns, dtype) {
        for (int64_t i = 0; i < buffer.count; ++i)
            write(buffer.get(), i, dtype, uniform() * std::sqrt(3.0 / std::fmax(inner, 1)));
    }
    double at(int64_t row, int64_t column) const { return buffer.at(row * stride_row + column * stride_col); }
    kron::Factor factor() const { return {buffer.get(), 0, stride_row, stride_col}; }
    int64_t rows, columns, stride_row, stride_col;
    Buffer buffer;
};

// Rows of activations as Ffn::gap says.
struct Tokens {
    Tokens(int64_t tokens, int64_t width, DType dtype, int64_t gap)
        : stride(width + gap), offset(gap % 2), buffer(tokens * stride + offset, dtype) {
        buffer.randomise();
    }
    double at(int64_t token, int64_t i) const { return buffer.at(token * stride + offset + i); }
    const void* get() const { return buffer.data + offset * kron::size_of(buffer.dtype); }
    int64_t stride, offset;
    Buffer buffer;
};

struct FfnOperands {
    explicit FfnOperands(const Ffn& f)
        : f(f),
          x(f.tokens, f.rows * f.k, f.dtype, f.gap),
          grad(f.tokens, f.rows * f.n, f.dtype, f.gap),
          residual(f.tokens, f.rows * f.n, f.dtype, f.gap),
          a1(f.wide, f.rows, f.dtype, f.odd(), double(f.rows)),
          b1(f.middle, f.k, f.dtype, f.odd(), double(f.k)),
          a2(f.rows, f.wide, f.dtype, f.odd(), double(f.wide)),
          b2(f.n, f.middle, f.dtype, f.odd(), double(f.middle)),
          bias1(f.wide * f.middle, f.dtype),
          bias2(f.rows * f.n, f.dtype),
          weight(f.rows * f.n, f.dtype),
          shift(f.rows * f.n, f.dtype) {
        for (Buffer* vector : {&bias1, &bias2, &weight, &shift}) vector->randomise();
    }

    // One token: h (rows, middle), pre (wide, middle), z (rows, middle), y (rows * n).
    struct Token {
        std::vector<double> h, pre, z, y;
    };
    Token token(int64_t t) const {
        const int64_t P = f.middle;
        Token o{std::vector<double>(size_t(f.rows * P)), std::vector<double>(size_t(f.wide * P)),
                std::vector<double>(size_t(f.rows * P)), std::vector<double>(size_t(f.rows * f.n))};
        for (int64_t c = 0; c < f.rows; ++c)
            for (int64_t p = 0; p < P; ++p)
                for (int64_t k = 0; k < f.k; ++k) o.h[size_t(c * P + p)] += x.at(t, c * f.k + k) * b1.at(p, k);
        for (int64_t m = 0; m < f.wide; ++m)
            for (int64_t p = 0; p < P; ++p) {
                double& pre = o.pre[size_t(m * P + p)];
                pre = f.biased ? bias1.at(m * P + p) : 0;
                for (int64_t c = 0; c < f.rows; ++c) pre += a1.at(m, c) * o.h[size_t(c * P + p)];
                const double u = activate(f.activation, pre);
                for (int64_t i = 0; i < f.rows; ++i) o.z[size_t(i * P + p)] += a2.at(i, m) * u;
            }
        for (int64_t i = 0; i < f.rows; ++i)
            for (int64_t n = 0; n < f.n; ++n) {
                double& y = o.y[size_t(i * f.n + n)];
                y = f.biased ? bias2.at(i * f.n + n) : 0;
                for (int64_t p = 0; p < P; ++p) y += o.z[size_t(i * P + p)] * b2.at(n, p);
            }
        if (f.normed) norm(o.y, t);
        return o;
    }
    std::vector<double> forward() const {
        std::vector<double> all;
        for (int64_t t = 0; t < f.tokens; ++t) {
            const std::vector<double> y = token(t).y;
            all.insert(all.end(), y.begin(), y.end());
        }
        return all;
    }

    struct Gradients {
        std::vector<double> x, a1, b1, bias1, a2, b2, bias2;
    };
    Gradients backward() const {
        const int64_t P = f.middle;
        const auto zeros = [](int64_t count) { return std::vector<double>(size_t(count)); };
        Gradients d{zeros(f.tokens * f.rows * f.k), zeros(f.wide * f.rows), zeros(P * f.k),     zeros(f.wide * P),
                    zeros(f.rows * f.wide),         zeros(f.n * P),         zeros(f.rows * f.n)};
        for (int64_t t = 0; t < f.tokens; ++t) {
            const Token o = token(t);
            std::vector<double> dz = zeros(f.rows * P), dh = zeros(f.rows * P);
            for (int64_t i = 0; i < f.rows; ++i)
                for (int64_t n = 0; n < f.n; ++n) {
                    const double g = grad.at(t, i * f.n + n);
                    d.bias2[size_t(i * f.n + n)] += g;
                    for (int64_t p = 0; p < P; ++p) {
                        dz[size_t(i * P + p)] += g * b2.at(n, p);
                        d.b2[size_t(n * P + p)] += g * o.z[size_t(i * P + p)];
                    }
                }
            for (int64_t m = 0; m < f.wide; ++m)
                for (int64_t p = 0; p < P; ++p) {
                    const double pre = o.pre[size_t(m * P + p)], u = activate(f.activation, pre);
                    double dpre = 0;
                    for (int64_t i = 0; i < f.rows; ++i) {
                        dpre += a2.at(i, m) * dz[size_t(i * P + p)];
                        d.a2[size_t(i * f.wide + m)] += dz[size_t(i * P + p)] * u;
                    }
                    dpre *= slope(f.activation, pre);
                    d.bias1[size_t(m * P + p)] += dpre;
                    for (int64_t c = 0; c < f.rows; ++c) {
                        d.a1[size_t(m * f.rows + c)] += dpre * o.h[size_t(c * P + p)];
                        dh[size_t(c * P + p)] += a1.at(m, c) * dpre;
                    }
                }
            for (int64_t c = 0; c < f.rows; ++c)
                for (int64_t p = 0; p < P; ++p)
                    for (int64_t k = 0; k < f.k; ++k) {
                        d.x[size_t((t * f.rows + c) * f.k + k)] += dh[size_t(c * P + p)] * b1.at(p, k);
                        d.b1[size_t(p * f.k + k)] += dh[size_t(c * P + p)] * x.at(t, c * f.k + k);
                    }
        }
        return d;
    }

    kron::FfnArgs args(void* y) const {
        kron::FfnArgs all{f.first(), f.second(), x.get(),      x.stride,
                          {},        {},         f.activation, {nullptr, 0, nullptr, nullptr, kEps}};
        all.w1.a = a1.factor(), all.w1.b = b1.factor(), all.w2.a = a2.factor(), all.w2.b = b2.factor();
        all.w1.bias = f.biased ? bias1.get() : nullptr;
        all.w2.bias = f.biased ? bias2.get() : nullptr;
        all.w2.y = y;
        if (f.normed) all.norm = {residual.get(), residual.stride, weight.get(), shift.get(), kEps};
        return all;
    }

    kron::FfnBackwardArgs backward_args() const {
        return {f.first(),
                f.second(),
                grad.get(),
                grad.stride,
                x.get(),
                x.stride,
                a1.factor(),
                b1.factor(),
                a2.factor(),
                b2.factor(),
                f.biased ? bias1.get() : nullptr,
                f.activation,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                nullptr};
    }

    static constexpr double kEps = 1e-5;
    Ffn f;
    Tokens x, grad, residual;
    Matrix a1, b1, a2, b2;
    Buffer bias1, bias2, weight, shift;

  private:
    void norm(std::vector<double>& y, int64_t t) const {
        double mean = 0, variance = 0;
        const double count = double(y.size());
        for (size_t i = 0; i < y.size(); ++i) mean += (y[i] += residual.at(t, int64_t(i))) / count;
        for (const double v : y) variance += (v - mean) * (v - mean) / count;
        for (size_t i = 0; i < y.size(); ++i)
            y[i] = (y[i] - mean) / std::sqrt(variance + kEps) * weight.at(int64_t(i)) + shift.at(int64_t(i));
    }
};

// An A100's limits; `multiprocessors` says among how many blocks little work is shared out.
inline kron::cuda::Launch ffn_launch(int multiprocessors = 1, int64_t shared = 163 * 1024) {
    return {nullptr, 80, multiprocessors, shared, true, nullptr, 0};
}
// Device memory as a call asks for it, filled with NaNs and no byte too large.
struct Workspace {
    Workspace(kron::cuda::Launch& launch, int64_t bytes) : memory(std::malloc(size_t(bytes) + 1)) {
        std::memset(memory, 0xff, size_t(bytes));
        launch.workspace = memory;
        launch.workspace_bytes = bytes;
    }
    ~Workspace() { std::free(memory); }
    Workspace(const Workspace&) = delete;
    void* memory;
};

// Error allowed relative to the largest magnitude: intermediates are rounded once more than results, and TF32 rounds
// what it multiplies.
inline double ffn_tolerance(DType dtype) {
    return dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0x1p-9;
}

}  // namespace test
