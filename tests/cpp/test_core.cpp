// Tests of the torch-free core against a naive fp64 product: every compiled instruction-set level the machine can run,
// every dtype, both directions. Built alone (no torch, no Python), so that sanitizers see all of it.
//   test_core [iterations of the random part [only]]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulated.h"
#include "support.h"

void test_blocks(int rounds, bool only_random);  // test_blocks.cpp

namespace {

using namespace test;

struct Case {
    int64_t tokens, terms, m1, n1, m2, n2;
    DType dtype;
    bool bias, transposed;  // transposed: the factors are stored column by column
    Activation activation;
    int64_t gap;  // extra elements between rows of x and of the gradient
};

struct Product {
    explicit Product(const Case& c)
        : c(c),
          n(c.n1 * c.n2),
          m(c.m1 * c.m2),
          x(c.tokens * (n + c.gap), c.dtype),
          a(c.terms * c.m1 * c.n1, c.dtype),
          b(c.terms * c.m2 * c.n2, c.dtype),
          bias(m, c.dtype),
          g(c.tokens * (m + c.gap), c.dtype),
          base(c.tokens * m, c.dtype) {
        x.randomise(), a.randomise(), b.randomise(), bias.randomise(), g.randomise(), base.randomise();
    }
    kron::Factor factor(const Buffer& f, int64_t rows, int64_t cols) const {
        return c.transposed ? kron::Factor{f.get(), rows * cols, 1, rows} : kron::Factor{f.get(), rows * cols, cols, 1};
    }
    double A(int64_t s, int64_t i, int64_t k) const {
        return a.at(s * c.m1 * c.n1 + (c.transposed ? k * c.m1 + i : i * c.n1 + k));
    }
    double B(int64_t s, int64_t j, int64_t k) const {
        return b.at(s * c.m2 * c.n2 + (c.transposed ? k * c.m2 + j : j * c.n2 + k));
    }
    double X(int64_t t, int64_t i) const { return x.at(t * (n + c.gap) + i); }
    double G(int64_t t, int64_t i) const { return g.at(t * (m + c.gap) + i); }
    kron::Shape shape() const { return kron::Shape{c.tokens, c.terms, c.m1, c.n1, c.m2, c.n2, c.dtype}; }

    Case c;
    int64_t n, m;
    Buffer x, a, b, bias, g, base;
};

constexpr double kAlpha = 0.75;

// What fp64 gives, computed once a case: the naive sums are far slower than all the kernels together.
struct Expected {
    explicit Expected(const Product& p);
    std::vector<double> y, added, dx, da, db, dbias;  // added: base + kAlpha * product
};

Expected::Expected(const Product& p)
    : y(size_t(p.c.tokens * p.m)),
      added(y.size()),
      dx(size_t(p.c.tokens * p.n)),
      da(size_t(p.a.count)),
      db(size_t(p.b.count)),
      dbias(size_t(p.m)) {
    const Case& c = p.c;
    for (int64_t t = 0; t < c.tokens; ++t) {
        for (int64_t i = 0; i < p.m; ++i) dbias[size_t(i)] += p.G(t, i);
        for (int64_t s = 0; s < c.terms; ++s)
            for (int64_t k1 = 0; k1 < c.n1; ++k1)
                for (int64_t j = 0; j < c.m2; ++j) {
                    double z = 0, v = 0;  // (X B^T)[k1, j], (A^T G)[k1, j]
                    for (int64_t k2 = 0; k2 < c.n2; ++k2) z += p.X(t, k1 * c.n2 + k2) * p.B(s, j, k2);
                    for (int64_t i = 0; i < c.m1; ++i) {
                        const double g = p.G(t, i * c.m2 + j), a = p.A(s, i, k1);
                        y[size_t(t * p.m + i * c.m2 + j)] += a * z;
                        v += a * g;
                        da[size_t((s * c.m1 + i) * c.n1 + k1)] += g * z;
                    }
                    for (int64_t k2 = 0; k2 < c.n2; ++k2) {
                        dx[size_t(t * p.n + k1 * c.n2 + k2)] += v * p.B(s, j, k2);
                        db[size_t((s * c.m2 + j) * c.n2 + k2)] += v * p.X(t, k1 * c.n2 + k2);
                    }
                }
        for (int64_t i = 0; i < p.m; ++i) {
            double& out = y[size_t(t * p.m + i)];
            added[size_t(t * p.m + i)] = p.base.at(t * p.m + i) + kAlpha * out;
            out = activate(c.activation, out + (c.bias ? p.bias.at(i) : 0));
        }
    }
}

typedef void (*ForwardFunction)(const kron::ForwardArgs&, const kron::Executor&);

void test_forward(const Product& p, const Expected& expected, ForwardFunction forward, const kron::Executor& executor,
                  const char* where) {
    const Case& c = p.c;
    const Buffer y(c.tokens * p.m, c.dtype);
    const kron::Projection only{
        p.factor(p.a, c.m1, c.n1), p.factor(p.b, c.m2, c.n2), c.bias ? p.bias.get() : nullptr, nullptr, 0, y.get()};
    forward({p.shape(), p.x.get(), p.n + c.gap, 1, &only, c.activation, kron::NormArgs{}}, executor);
    compare(expected.y, y, tolerance(c.dtype, c.terms * (p.n + 1)), "forward", where);
}

// The product added to a tensor: into one of its own, and in place.
void test_added(const Product& p, const Expected& expected, ForwardFunction forward, const kron::Executor& executor,
                const char* where) {
    const Case& c = p.c;
    for (const bool in_place : {false, true}) {
        const Buffer y(c.tokens * p.m, c.dtype);
        if (in_place) std::memcpy(y.get(), p.base.get(), size_t(p.base.count * kron::size_of(c.dtype)));
        kron::Projection only{p.factor(p.a, c.m1, c.n1), p.factor(p.b, c.m2, c.n2), nullptr, nullptr, 0, y.get()};
        only.base = in_place ? y.get() : p.base.get();
        forward({p.shape(), p.x.get(), p.n + c.gap, 1, &only, Activation::none, kron::NormArgs{}, kAlpha}, executor);
        compare(expected.added, y, tolerance(c.dtype, c.terms * (p.n + 1)), in_place ? "added in place" : "added",
                where);
    }
}

void test_backward(const Product& p, const Expected& expected, const kron::Executor& executor, const char* where,
                   int wanted) {
    const Case& c = p.c;
    const Buffer dx(c.tokens * p.n, c.dtype), da(p.a.count, c.dtype), db(p.b.count, c.dtype), dbias(p.m, c.dtype);
    kron::kron_matmul_backward(
        {p.shape(), p.g.get(), p.m + c.gap, p.x.get(), p.n + c.gap, p.factor(p.a, c.m1, c.n1),
         p.factor(p.b, c.m2, c.n2), wanted & 1 ? dx.get() : nullptr, wanted & 2 ? da.get() : nullptr,
         wanted & 4 ? db.get() : nullptr, wanted & 8 ? dbias.get() : nullptr},
        executor);
    if (wanted & 1) compare(expected.dx, dx, tolerance(c.dtype, c.terms * p.m), "dx", where);
    if (wanted & 2) compare(expected.da, da, tolerance(c.dtype, c.tokens * p.n), "da", where);
    if (wanted & 4) compare(expected.db, db, tolerance(c.dtype, c.tokens * p.m), "db", where);
    if (wanted & 8) compare(expected.dbias, dbias, tolerance(c.dtype, c.tokens), "dbias", where);
}

void run_case(const Case& c, int wanted = 15) {
    const Product p(c);
    const Expected expected(p);
    at_every_level([&](const kron::Executor& executor, const char* level) {
        char where[200];
        std::snprintf(
            where, sizeof where, "%s, %d threads, T=%ld S=%ld A=%ldx%ld B=%ldx%ld dtype=%d act=%d gap=%ld%s%s", level,
            executor.threads, long(c.tokens), long(c.terms), long(c.m1), long(c.n1), long(c.m2), long(c.n2),
            int(c.dtype), int(c.activation), long(c.gap), c.bias ? " bias" : "", c.transposed ? " transposed" : "");
        test_forward(p, expected, kron::kron_matmul_forward, executor, where);
        test_added(p, expected, kron::kron_matmul_forward, executor, where);
        test_backward(p, expected, executor, where, wanted);
    });
    if (c.dtype == DType::bf16 && c.tokens > 0) {
        char where[200];
        std::snprintf(where, sizeof where, "emulated AMX, T=%ld S=%ld A=%ldx%ld B=%ldx%ld", long(c.tokens),
                      long(c.terms), long(c.m1), long(c.n1), long(c.m2), long(c.n2));
        test_forward(p, expected, amx_emulated_forward, kThreads, where);
        test_added(p, expected, amx_emulated_forward, kThreads, where);
    }
}

// Each activation of -128 .. 128 in steps of 1/16, of both infinities and of NaN, one value a token: the token holds it
// eight times, the product takes their mean (exact in every dtype) 24 times over, so that whole vectors are loaded and
// stored.
void test_activation(Activation kind, DType dtype, bool commuted) {
    constexpr int64_t kSteps = 4097, kTokens = kSteps + 3, kIn = 8, kOut = 24;
    const Case c = commuted ? Case{kTokens, 1, kOut, kIn, 1, 1, dtype, false, false, kind, 0}
                            : Case{kTokens, 1, 1, 1, kOut, kIn, dtype, false, false, kind, 0};
    const Product p(c);
    const double special[] = {INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; i < kTokens * kIn; ++i) {
        const int64_t t = i / kIn;
        write(p.x.get(), i, dtype, t < kSteps ? double(t) / 16 - 128 : special[t - kSteps]);
    }
    for (int64_t i = 0; i < p.a.count; ++i) write(p.a.get(), i, dtype, commuted ? 1.0 / kIn : 1);
    for (int64_t i = 0; i < p.b.count; ++i) write(p.b.get(), i, dtype, commuted ? 1 : 1.0 / kIn);
    // One rounding of the output dtype; below its smallest normal number, and where a tail vanishes, that number.
    const double relative = dtype == DType::f64   ? 1e-12
                            : dtype == DType::f32 ? 2e-6
                            : dtype == DType::f16 ? 0x1p-10
                                                  : 0x1p-7;
    const double absolute = dtype == DType::f16 ? 0x1p-24 : 1e-15;
    const auto run = [&](ForwardFunction forward, const kron::Executor& executor, const char* level) {
        const Buffer y(kTokens * kOut, dtype);
        const kron::Projection only{p.factor(p.a, c.m1, c.n1), p.factor(p.b, c.m2, c.n2), nullptr, nullptr, 0, y.get()};
        forward({p.shape(), p.x.get(), p.n, 1, &only, kind, kron::NormArgs{}}, executor);
        int64_t wrong = -1;
        for (int64_t i = 0; i < y.count && wrong < 0; ++i) {
            const double expected = activate(kind, p.X(i / kOut, 0)), got = y.at(i);
            const bool same = std::isfinite(expected)
                                  ? std::fabs(got - expected) <= relative * std::fabs(expected) + absolute
                              : std::isnan(expected) ? std::isnan(got)
                                                     : got == expected;
            if (!same) wrong = i;
        }
        char where[120];
        std::snprintf(where, sizeof where, "%s, act=%d dtype=%d%s", level, int(kind), int(dtype),
                      commuted ? " commuted" : "");
        check(wrong < 0, "activation", where);
        if (wrong >= 0) {
            const double x = p.X(wrong / kOut, 0);
            std::printf("   of %g: got %g, expected %g\n", x, y.at(wrong), activate(kind, x));
        }
    };
    at_every_level(
        [&](const kron::Executor& executor, const char* level) { run(kron::kron_matmul_forward, executor, level); });
    if (dtype == DType::bf16) run(amx_emulated_forward, kThreads, "emulated AMX");
}

void fixed_part() {
    // The classes the plan distinguishes: large x tiny both ways, balanced, odd sizes, several terms; then the dtypes.
    const int64_t shapes[][5] = {{1, 96, 96, 2, 2},  {1, 96, 24, 2, 16}, {1, 8, 2, 96, 96},   {1, 2, 8, 96, 96},
                                 {1, 16, 2, 48, 96}, {1, 2, 16, 96, 48}, {1, 24, 24, 32, 32}, {1, 48, 16, 48, 48},
                                 {3, 5, 3, 7, 2},    {2, 33, 17, 5, 3},  {1, 1, 1, 1, 1},     {1, 40, 1, 1, 24},
                                 {2, 1, 40, 24, 1},  {4, 64, 80, 2, 4},  {1, 30, 30, 8, 8}};
    for (const auto& s : shapes)
        for (const int64_t tokens : {0, 1, 3, 13, 70})
            for (const bool transposed : {false, true})
                run_case({tokens, s[0], s[1], s[2], s[3], s[4], DType::f32, true, transposed, Activation::none,
                          transposed ? 3 : 0});
    // Large enough for the blocked factor gradient (both plans, both layouts) and for panels packed ahead of the tasks.
    const int64_t large[][5] = {{1, 8, 2, 240, 250}, {2, 2, 8, 250, 240}, {1, 250, 230, 2, 2}, {1, 230, 250, 4, 2}};
    for (const auto& s : large)
        for (const int64_t tokens : {5, 130})
            run_case({tokens, s[0], s[1], s[2], s[3], s[4], DType::f32, true, false, Activation::none, 1});
    for (const DType dtype : {DType::f64, DType::bf16, DType::f16})
        for (const auto& s : shapes)
            for (const int64_t tokens : {19, 45})
                run_case({tokens, s[0], s[1], s[2], s[3], s[4], dtype, true, false, Activation::gelu, 0});
    for (int kind = 1; kind <= 4; ++kind)
        for (const DType dtype : {DType::f32, DType::f64})
            run_case({9, 1, 8, 2, 48, 32, dtype, true, false, static_cast<Activation>(kind), 0});
    for (int kind = 1; kind <= 4; ++kind)
        for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
            for (const bool commuted : {false, true}) test_activation(static_cast<Activation>(kind), dtype, commuted);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
    const bool only_random = argc > 2 && std::strcmp(argv[2], "only") == 0;
    if (!only_random) fixed_part();
    for (int r = 0; r < rounds; ++r)
        run_case({pick(0, 60), pick(1, 3), pick(1, 40), pick(1, 40), pick(1, 40), pick(1, 40),
                  static_cast<DType>(pick(0, 3)), pick(0, 1) == 1, pick(0, 1) == 1, static_cast<Activation>(pick(0, 4)),
                  pick(0, 2)},
                 int(pick(0, 15)));
    test_blocks(rounds, only_random);
    std::printf("%d checks at levels portable..%s\n", checks, kron::isa_name(kron::detected_isa()));
    std::printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
