// Gradients of the product with one large and one tiny factor on the emulated machine.
#include "cuda_matmul.h"
#include "emulator/tests.h"

namespace {

using namespace cuda_test;

struct Gradients {
    explicit Gradients(const MatmulCase& c)
        : matmul(c),
          grad(c.shift + c.tokens * (c.m1 * c.m2 + c.gap), c.dtype),
          dx(c.tokens * c.n1 * c.n2, c.dtype),
          da(c.terms * c.m1 * c.n1, c.dtype),
          db(c.terms * c.m2 * c.n2, c.dtype),
          dbias(c.m1 * c.m2, c.dtype) {
        grad.randomise();
    }
    double G(int64_t t, int64_t j) const {
        return grad.at(matmul.c.shift + t * (matmul.c.m1 * matmul.c.m2 + matmul.c.gap) + j);
    }

    Mm matmul;
    test::Buffer grad, dx, da, db, dbias;
};

struct Expected {
    explicit Expected(const Gradients& g) : dx(g.dx.count), da(g.da.count), db(g.db.count), dbias(g.dbias.count) {
        const MatmulCase& c = g.matmul.c;
        const int64_t m = c.m1 * c.m2, n = c.n1 * c.n2;
        std::vector<double> z(size_t(c.n1 * c.m2)), v(size_t(c.n1 * c.m2));
        for (int64_t t = 0; t < c.tokens; ++t) {
            for (int64_t j = 0; j < m; ++j) dbias[size_t(j)] += g.G(t, j);
            for (int64_t s = 0; s < c.terms; ++s) {
                for (int64_t k = 0; k < c.n1; ++k)
                    for (int64_t j = 0; j < c.m2; ++j) {
                        double x_b = 0, a_g = 0;  // (X B^T)[k, j], (A^T G)[k, j]
                        for (int64_t l = 0; l < c.n2; ++l) x_b += g.matmul.X(t, k * c.n2 + l) * g.matmul.B(0, s, j, l);
                        for (int64_t i = 0; i < c.m1; ++i) a_g += g.matmul.A(0, s, i, k) * g.G(t, i * c.m2 + j);
                        z[size_t(k * c.m2 + j)] = x_b, v[size_t(k * c.m2 + j)] = a_g;
                    }
                for (int64_t k = 0; k < c.n1; ++k)
                    for (int64_t j = 0; j < c.m2; ++j) {
                        const double x_b = z[size_t(k * c.m2 + j)], a_g = v[size_t(k * c.m2 + j)];
                        for (int64_t i = 0; i < c.m1; ++i)
                            da[size_t((s * c.m1 + i) * c.n1 + k)] += g.G(t, i * c.m2 + j) * x_b;
                        for (int64_t l = 0; l < c.n2; ++l) {
                            dx[size_t(t * n + k * c.n2 + l)] += a_g * g.matmul.B(0, s, j, l);
                            db[size_t((s * c.m2 + j) * c.n2 + l)] += a_g * g.matmul.X(t, k * c.n2 + l);
                        }
                    }
            }
        }
    }
    std::vector<double> dx, da, db, dbias;
};

constexpr int kNeedX = 1, kNeedA = 2, kNeedB = 4, kNeedBias = 8, kAll = 15;

std::string run(Gradients& g, int needs) {
    const MatmulCase& c = g.matmul.c;
    for (test::Buffer* out : {&g.dx, &g.da, &g.db, &g.dbias})
        for (int64_t i = 0; i < out->count; ++i) test::write(out->get(), i, c.dtype, std::nan(""));
    const auto wanted = [&](int need, test::Buffer& out) { return needs & need ? out.get() : nullptr; };
    const kron::BackwardArgs args{g.matmul.shape(),
                                  g.grad.data + c.shift * kron::size_of(c.dtype),
                                  c.m1 * c.m2 + c.gap,
                                  g.matmul.x_data(),
                                  c.n1 * c.n2 + c.gap,
                                  Mm::factor(c, g.matmul.pairs[0]->a, c.m1, c.n1),
                                  Mm::factor(c, g.matmul.pairs[0]->b, c.m2, c.n2),
                                  wanted(kNeedX, g.dx),
                                  wanted(kNeedA, g.da),
                                  wanted(kNeedB, g.db),
                                  wanted(kNeedBias, g.dbias)};
    kron::cuda::Launch launch = launch_of(c);
    if (const char* reason = kron::cuda::unsupported_kron_matmul_backward(args, launch)) return reason;
    test::Buffer workspace(kron::cuda::workspace_kron_matmul_backward(args, launch) / 4, DType::f32);
    launch.workspace = workspace.get(), launch.workspace_bytes = workspace.count * 4;
    return kron::cuda::kron_matmul_backward(args, launch).what;
}

struct Output {
    int need;
    const char* name;
    const std::vector<double>& expected;
    const test::Buffer& got;
    double tolerance;
};
std::vector<Output> outputs(const Gradients& g, const Expected& e) {
    const MatmulCase& c = g.matmul.c;
    const double x = allowed(c.dtype, c.m1 * c.m2 * c.terms), sums = allowed(c.dtype, c.tokens * c.m1 * c.m2);
    return {{kNeedX, "dx", e.dx, g.dx, x},
            {kNeedA, "da", e.da, g.da, sums},
            {kNeedB, "db", e.db, g.db, sums},
            {kNeedBias, "dbias", e.dbias, g.dbias, sums}};
}

void check(const MatmulCase& c, int needs = kAll, int schedules = 1) {
    Gradients g(c);
    const Expected expected(g);
    for (int s = 0; s < schedules; ++s) {
        emulator::settings().seed = emulator::kSeeds[s];
        const std::string error = run(g, needs);
        test::check(error.empty(), error.c_str(), c.text().c_str());
        for (const Output& out : outputs(g, expected))
            if (needs & out.need)
                test::compare(out.expected, out.got, out.tolerance, out.name,
                              (c.text() + " needs " + std::to_string(needs)).c_str());
    }
}

void test_backward() {
    const DType types[] = {DType::bf16, DType::f16, DType::f32};
    const int64_t tokens[] = {1, 5, 33, 70};
    int n = 0;
    for (MatmulCase c : kShapes)
        for (int variant = 0; variant < 4; ++variant, ++n) {
            c.dtype = types[n % 3];
            c.tokens = tokens[(n + variant) % 4];
            c.terms = variant < 2 ? 1 : variant;
            c.gap = variant % 2 * 4;
            c.shift = variant == 1 && n % 2;
            c.transposed = variant % 2;
            check(c, variant == 1 ? 1 + n % 15 : kAll, variant == 0 ? 3 : 1);
        }
    MatmulCase terms{"nine terms", 24, 16, 2, 2, 20, 9};
    check(terms);
    check(MatmulCase{"k8-attention", 384, 384, 2, 2, 10});
    check(MatmulCase{"many tokens", 2, 8, 136, 72, 230});
    check(MatmulCase{"more blocks than threads that add them", 8, 8, 17, 20, 1100}, kNeedA);
}

void test_barriers() {
    for (const MatmulCase& c :
         {MatmulCase{"k8-attention", 136, 72, 2, 2, 110}, MatmulCase{"k8-w1", 8, 2, 136, 72, 110}}) {
        Gradients g(c);
        const Expected expected(g);
        const auto right = [&] {
            bool all = run(g, kAll).empty();
            for (const Output& out : outputs(g, expected))
                all = all && worst_error(out.expected, out.got) <= out.tolerance;
            return all;
        };
        emulator::check_every_site_matters(right, c.text());
    }
}

void test_unsupported() {
    Gradients none(MatmulCase{"no tokens", 48, 48, 2, 2, 0}), balanced(MatmulCase{"balanced", 24, 24, 32, 32, 2});
    test::check(run(none, kAll) == "gradients of no tokens", "unsupported", "no tokens");
    test::check(run(balanced, kAll) == "no factor is tiny (at most 16 x 16)", "unsupported", "balanced");
}

const bool added = emulator::add_test("matmul backward", test_backward) &&
                   emulator::add_test("matmul backward barriers", test_barriers) &&
                   emulator::add_test("matmul backward unsupported", test_unsupported);

}  // namespace
