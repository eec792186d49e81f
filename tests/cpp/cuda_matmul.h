// Operands of products for the tests of the CUDA kernels, and what fp64 makes of them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "emulator/schedules.h"
#include "kron/cuda.h"
#include "support.h"

namespace cuda_test {

using kron::Activation;
using kron::DType;

struct MatmulCase {
    const char* name;
    int64_t m1, n1, m2, n2;
    int64_t tokens = 33, terms = 1;
    DType dtype = DType::bf16;
    int64_t gap = 0;          // values between rows of x and of the gradient
    int64_t shift = 0;        // values before the first of x: misaligned
    bool transposed = false;  // factors stored column by column
    bool bias = true, base = false;
    Activation activation = Activation::none;
    int64_t count = 1;
    int64_t shared = 100 * 1024;

    std::string text() const {
        static const char* const types[] = {"f32", "f64", "bf16", "f16"};
        std::string s = name;
        for (const int64_t v : {m1, n1, m2, n2, tokens, terms, gap, shift, count, shared}) s += " " + std::to_string(v);
        return s + " " + types[int(dtype)] + (transposed ? " transposed" : "") + (bias ? " bias" : "") +
               (base ? " base" : "") + " act " + std::to_string(int(activation));
    }
};

inline kron::cuda::Launch launch_of(const MatmulCase& c) {
    const int multiprocessors = c.tokens > 60 ? 1 : 4;  // one: a block has several tiles, or steps of tokens
    return kron::cuda::Launch{nullptr, 80, multiprocessors, c.shared, true, nullptr, 0};
}

// float goes through TF32, which has as many bits as fp16: the operands are rounded to it, not only the result.
inline double allowed(DType dtype, int64_t depth) {
    return dtype == DType::f32 ? 2 * test::tolerance(DType::f16, depth) : test::tolerance(dtype, depth);
}

struct Pair {
    Pair(const MatmulCase& c)
        : a(c.terms * c.m1 * c.n1, c.dtype),
          b(c.terms * c.m2 * c.n2, c.dtype),
          bias(c.m1 * c.m2, c.dtype),
          base(c.tokens * c.m1 * c.m2, c.dtype),
          y(c.tokens * c.m1 * c.m2, c.dtype) {
        a.randomise(), b.randomise(), bias.randomise(), base.randomise();
    }
    test::Buffer a, b, bias, base, y;
};

struct Mm {
    explicit Mm(const MatmulCase& c) : c(c), x(c.shift + c.tokens * (c.n1 * c.n2 + c.gap), c.dtype) {
        x.randomise();
        for (int64_t i = 0; i < c.count; ++i) pairs.push_back(std::make_unique<Pair>(c));
    }
    static kron::Factor factor(const MatmulCase& c, const test::Buffer& f, int64_t rows, int64_t columns) {
        const int64_t size = rows * columns;
        return c.transposed ? kron::Factor{f.get(), size, 1, rows} : kron::Factor{f.get(), size, columns, 1};
    }
    double A(int64_t i, int64_t s, int64_t row, int64_t column) const {
        return pairs[size_t(i)]->a.at(s * c.m1 * c.n1 + (c.transposed ? column * c.m1 + row : row * c.n1 + column));
    }
    double B(int64_t i, int64_t s, int64_t row, int64_t column) const {
        return pairs[size_t(i)]->b.at(s * c.m2 * c.n2 + (c.transposed ? column * c.m2 + row : row * c.n2 + column));
    }
    double X(int64_t t, int64_t k) const { return x.at(c.shift + t * (c.n1 * c.n2 + c.gap) + k); }
    kron::Shape shape() const { return kron::Shape{c.tokens, c.terms, c.m1, c.n1, c.m2, c.n2, c.dtype}; }
    const void* x_data() const { return x.data + c.shift * kron::size_of(c.dtype); }

    std::vector<double> expected(int64_t i, double alpha) const {
        std::vector<double> y(size_t(c.tokens * c.m1 * c.m2)), z(size_t(c.n1 * c.m2));
        for (int64_t t = 0; t < c.tokens; ++t) {
            double* row = y.data() + t * c.m1 * c.m2;
            for (int64_t s = 0; s < c.terms; ++s) {
                for (int64_t k = 0; k < c.n1; ++k)
                    for (int64_t j = 0; j < c.m2; ++j) {
                        double sum = 0;
                        for (int64_t l = 0; l < c.n2; ++l) sum += X(t, k * c.n2 + l) * B(i, s, j, l);
                        z[size_t(k * c.m2 + j)] = sum;
                    }
                for (int64_t r = 0; r < c.m1; ++r)
                    for (int64_t k = 0; k < c.n1; ++k)
                        for (int64_t j = 0; j < c.m2; ++j)
                            row[r * c.m2 + j] += alpha * A(i, s, r, k) * z[size_t(k * c.m2 + j)];
            }
            for (int64_t j = 0; j < c.m1 * c.m2; ++j) {
                if (c.bias) row[j] += pairs[size_t(i)]->bias.at(j);
                if (c.base) row[j] += pairs[size_t(i)]->base.at(t * c.m1 * c.m2 + j);
                row[j] = test::activate(c.activation, row[j]);
            }
        }
        return y;
    }

    MatmulCase c;
    test::Buffer x;
    std::vector<std::unique_ptr<Pair>> pairs;
};

// The largest error, relative to the largest magnitude expected, at least a quarter.
inline double worst_error(const std::vector<double>& expected, const test::Buffer& got) {
    double scale = 0.25, worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        scale = std::fmax(scale, std::fabs(expected[i]));
        const double error = std::fabs(expected[i] - got.at(int64_t(i)));
        worst = std::isfinite(error) ? std::fmax(worst, error) : HUGE_VAL;
    }
    return worst / scale;
}

inline const MatmulCase kShapes[] = {
    {"k8-attention", 48, 48, 2, 2},
    {"k21-attention", 96, 12, 2, 16},
    {"k21-attention^T", 12, 96, 16, 2},
    {"k8-w1", 8, 2, 96, 96},
    {"k8-w2", 2, 8, 96, 96},
    {"k21-w1", 16, 2, 48, 96},
    {"k21-w2", 2, 16, 96, 48},
    {"odd", 3, 5, 7, 2},
    {"scalar", 1, 1, 1, 1},
    {"row-b", 37, 20, 1, 3},
    {"column-b", 20, 37, 3, 1},
    {"plain-gemm", 70, 50, 1, 1},
    {"sixteens", 16, 16, 24, 40},
    {"sixteens-right", 40, 24, 16, 16},
    {"twelve-rows", 12, 3, 40, 24},
    {"eights-right", 24, 40, 8, 4},
    {"fours-right", 24, 40, 4, 8},
    {"columns", 3, 2, 200, 33},
    {"more-columns", 261, 16, 4, 4},
};

}  // namespace cuda_test
