// A feed-forward block for the tests of its CUDA kernels: operands, and forward and backward in fp64.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kron/cuda.h"
#include "support.h"

namespace test {

struct Ffn {
    int64_t tokens = 33, rows = 2, wide = 8, k = 48, middle = 32, n = 48;
    DType dtype = DType::bf16;
    Activation activation = Activation::gelu;
    bool biased = true, normed = false;
    // x and its gradient within wider rows and off by one element, factors transposed.
    bool strided = false;

    std::string name() const {
        std::string all = "ffn";
        for (const int64_t v : {tokens, rows, wide, k, middle, n, int64_t(dtype), int64_t(activation), int64_t(biased),
                                int64_t(normed), int64_t(strided)})
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

// Rows of activations: contiguous, or within rows three wider and beginning with the second element.
struct Tokens {
    Tokens(int64_t tokens, int64_t width, DType dtype, bool strided)
        : stride(width + (strided ? 3 : 0)), offset(strided), buffer(tokens * stride + offset, dtype) {
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
          x(f.tokens, f.rows * f.k, f.dtype, f.strided),
          grad(f.tokens, f.rows * f.n, f.dtype, f.strided),
          residual(f.tokens, f.rows * f.n, f.dtype, f.strided),
          a1(f.wide, f.rows, f.dtype, f.strided, double(f.rows)),
          b1(f.middle, f.k, f.dtype, f.strided, double(f.k)),
          a2(f.rows, f.wide, f.dtype, f.strided, double(f.wide)),
          b2(f.n, f.middle, f.dtype, f.strided, double(f.middle)),
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

// Error allowed relative to the largest magnitude: intermediates rounded once more than the result.
inline double ffn_tolerance(DType dtype) {
    return dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0x1p-10;
}

}  // namespace test
