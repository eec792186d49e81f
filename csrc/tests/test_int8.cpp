// Products that leave as bytes, against the fp64 product: at every level, dtype and layout of the plan.
#include <algorithm>

#include "emulated.h"
#include "support.h"

namespace {

using namespace test;

struct Int8Case {
    int64_t tokens, terms, m1, n1, m2, n2;
    DType dtype;
    bool bias;
};

// The rows (tokens, m) that the case's product has in fp64.
std::vector<double> product(const Int8Case& c, const Buffer& x, const Buffer& a, const Buffer& b, const Buffer* bias) {
    const int64_t m = c.m1 * c.m2, n = c.n1 * c.n2;
    std::vector<double> y(size_t(c.tokens * m));
    for (int64_t i = 0; i < c.tokens * m; ++i) {
        const int64_t t = i / m, row = i % m / c.m2, column = i % c.m2;
        for (int64_t s = 0; s < c.terms; ++s)
            for (int64_t k = 0; k < n; ++k)
                y[size_t(i)] += a.at((s * c.m1 + row) * c.n1 + k / c.n2) * b.at((s * c.m2 + column) * c.n2 + k % c.n2) *
                                x.at(t * n + k);
        if (bias) y[size_t(i)] += bias->at(i % m);
    }
    return y;
}

typedef void (*ForwardFunction)(const kron::ForwardArgs&, const kron::Executor&);

void run_case(const Int8Case& c) {
    const int64_t m = c.m1 * c.m2, n = c.n1 * c.n2;
    Buffer x(c.tokens * n, c.dtype), a(c.terms * c.m1 * c.n1, c.dtype), b(c.terms * c.m2 * c.n2, c.dtype),
        bias(m, c.dtype);
    x.randomise(), a.randomise(), b.randomise(), bias.randomise();
    if (c.tokens > 2 && !c.bias)  // the third token holds zeros
        for (int64_t i = 2 * n; i < 3 * n; ++i) write(x.get(), i, c.dtype, 0);
    const std::vector<double> y = product(c, x, a, b, c.bias ? &bias : nullptr);
    double largest = 0;
    for (const double value : y) largest = std::fmax(largest, std::fabs(value));
    // How far results may be off before they are rounded: as where they are stored, but for 16 bits fp32.
    const double off = tolerance(c.dtype, c.terms * (n + 1)) * largest;
    const kron::Projection only{{a.get(), c.m1 * c.n1, c.n1, 1},
                                {b.get(), c.m2 * c.n2, c.n2, 1},
                                c.bias ? bias.get() : nullptr,
                                nullptr,
                                0,
                                nullptr};
    const auto run = [&](ForwardFunction forward, const kron::Executor& executor, const char* level) {
        char where[200];
        std::snprintf(where, sizeof where, "%s, %d threads, T=%ld S=%ld A=%ldx%ld B=%ldx%ld dtype=%d%s", level,
                      executor.threads, long(c.tokens), long(c.terms), long(c.m1), long(c.n1), long(c.m2), long(c.n2),
                      int(c.dtype), c.bias ? " bias" : "");
        // Exactly as long as the results are, for the address sanitizer.
        std::vector<int8_t> q(size_t(c.tokens * m), 99);
        std::vector<float> scale(size_t(c.tokens), NAN);
        kron::ForwardArgs args{};
        args.shape = {c.tokens, c.terms, c.m1, c.n1, c.m2, c.n2, c.dtype};
        args.x = x.get(), args.x_stride = n, args.count = 1, args.projections = &only;
        args.int8 = {q.data(), scale.data()};
        forward(args, executor);
        bool scales = true, bytes = true;
        for (int64_t t = 0; t < c.tokens; ++t) {
            const double step = double(scale[size_t(t)]);
            double most = 0;
            for (int64_t i = 0; i < m; ++i) most = std::fmax(most, std::fabs(y[size_t(t * m + i)]));
            scales = scales && std::fabs(step * 127 - most) <= off + most * 0x1p-22;
            for (int64_t i = 0; i < m; ++i) {
                const double got = q[size_t(t * m + i)], wanted = y[size_t(t * m + i)];
                bytes = bytes && std::fabs(got) <= 127 &&
                        std::fabs(got * step - wanted) <= step / 2 + off + std::fabs(wanted) * 0x1p-21;
            }
        }
        check(scales, "int8 scale", where);
        check(bytes, "int8 bytes", where);
    };
    at_every_level(
        [&](const kron::Executor& executor, const char* level) { run(kron::kron_matmul_forward, executor, level); });
    if (c.dtype == DType::bf16 && c.tokens > 0) run(amx_emulated_forward, kThreads, "emulated AMX");
}

// Identity factors: what comes in is what is rounded. Ties, the ends of the range, tiny tokens, and no numbers.
void test_rounding(DType dtype) {
    constexpr int64_t n = 24;
    const double rows[][n] = {{127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126, -127, 3, 3.5},
                              {-127, 127, 63.5, 64.5, -63.5},
                              {},
                              {1, NAN, 2},
                              {1, 2, -INFINITY},
                              {1, NAN, INFINITY}};
    constexpr int64_t tokens = sizeof rows / sizeof rows[0];
    Buffer x(tokens * n, dtype), a(1, dtype), b(n * n, dtype);
    write(a.get(), 0, dtype, 1);
    for (int64_t i = 0; i < n * n; ++i) write(b.get(), i, dtype, i / n == i % n ? 1 : 0);
    for (int64_t i = 0; i < tokens * n; ++i) write(x.get(), i, dtype, rows[i / n][i % n]);
    const kron::Projection only{{a.get(), 1, 1, 1}, {b.get(), n * n, n, 1}, nullptr, nullptr, 0, nullptr};
    at_every_level([&](const kron::Executor& executor, const char* level) {
        std::vector<int8_t> q(tokens * n, 99);
        std::vector<float> scale(tokens, -1);
        kron::ForwardArgs args{};
        args.shape = {tokens, 1, 1, 1, n, n, dtype};
        args.x = x.get(), args.x_stride = n, args.count = 1, args.projections = &only;
        args.int8 = {q.data(), scale.data()};
        kron::kron_matmul_forward(args, executor);
        const int8_t ties[] = {127, 0, 2, 2, 0, -2, -2, 126, -127, 3, 4}, ends[] = {-127, 127, 64, 64, -64};
        check(scale[0] == 1 && std::equal(std::begin(ties), std::end(ties), q.begin()), "int8 ties", level);
        check(scale[1] == 1 && std::equal(std::begin(ends), std::end(ends), q.begin() + n), "int8 ends", level);
        check(scale[2] == 0, "int8 scale of zeros", level);
        for (int64_t t = 3; t < tokens; ++t) check(!std::isfinite(scale[size_t(t)]), "int8 no number", level);
        check(std::all_of(q.begin() + 2 * n, q.end(), [](int8_t byte) { return byte == 0; }), "int8 zeros", level);
    });
}

}  // namespace

void test_int8(int rounds, bool only_random) {
    if (!only_random) {
        // Both orders and layouts of the plan, whole and broken panels, few and many tokens; last, right factors whose
        // panels would be shared out if tokens were not to stay whole.
        const int64_t shapes[][5] = {{1, 24, 24, 32, 32}, {1, 64, 64, 64, 64}, {2, 48, 48, 2, 2}, {1, 8, 2, 40, 48},
                                     {1, 2, 8, 48, 40},   {3, 5, 3, 7, 2},     {1, 1, 1, 1, 1},   {1, 3, 40, 33, 24},
                                     {1, 2, 2, 200, 180}, {1, 190, 180, 2, 2}};
        for (const auto& s : shapes)
            for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::f16})
                for (const int64_t tokens : {0, 1, 5, 40}) {
                    if (tokens == 40 && s[1] * s[3] > 2000) continue;  // the naive sums would take seconds
                    run_case({tokens, s[0], s[1], s[2], s[3], s[4], dtype, tokens == 5});
                }
        for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::f16}) test_rounding(dtype);
    }
    for (int r = 0; r < rounds; ++r)
        run_case({pick(0, 40), pick(1, 2), pick(1, 20), pick(1, 20), pick(1, 40), pick(1, 20),
                  static_cast<DType>(pick(0, 3)), pick(0, 1) == 1});
}
