// The product with one large and one tiny factor on the emulated machine.
#include "cuda_matmul.h"

#include "emulator/tests.h"

namespace {

using namespace cuda_test;

constexpr double kAlpha = 0.75;

// Runs the product of a case; empty, or the error of the launch.
std::string run(Mm& matmul) {
    const MatmulCase& c = matmul.c;
    std::vector<kron::Projection> projections;
    for (auto& pair : matmul.pairs) {
        for (int64_t i = 0; i < pair->y.count; ++i) test::write(pair->y.get(), i, c.dtype, std::nan(""));
        projections.push_back({Mm::factor(c, pair->a, c.m1, c.n1), Mm::factor(c, pair->b, c.m2, c.n2),
                               c.bias ? pair->bias.get() : nullptr, nullptr, 0, pair->y.get(),
                               c.base ? pair->base.get() : nullptr});
    }
    const kron::ForwardArgs args{matmul.shape(),     matmul.x_data(), c.n1 * c.n2 + c.gap, c.count,
                                 projections.data(), c.activation,    kron::NormArgs{},    kAlpha};
    kron::cuda::Launch launch = launch_of(c);
    if (const char* reason = kron::cuda::unsupported_kron_matmul(args, launch)) return reason;
    test::Buffer workspace(kron::cuda::workspace_kron_matmul(args, launch) / 4, DType::f32);
    launch.workspace = workspace.get(), launch.workspace_bytes = workspace.count * 4;
    return kron::cuda::kron_matmul(args, launch).what;
}

void check(const MatmulCase& c, int schedules = 1) {
    Mm matmul(c);
    std::vector<std::vector<double>> expected;
    for (int64_t i = 0; i < c.count; ++i) expected.push_back(matmul.expected(i, kAlpha));
    for (int s = 0; s < schedules; ++s) {
        emulator::settings().seed = emulator::kSeeds[s];
        const std::string error = run(matmul);
        test::check(error.empty(), error.c_str(), c.text().c_str());
        for (int64_t i = 0; i < c.count; ++i)
            test::compare(expected[size_t(i)], matmul.pairs[size_t(i)]->y, allowed(c.dtype, c.n1 * c.n2 * c.terms),
                          "product", c.text().c_str());
    }
}

bool right(Mm& matmul, const std::vector<double>& expected) {
    return run(matmul).empty() && worst_error(expected, matmul.pairs[0]->y) <=
                                      allowed(matmul.c.dtype, matmul.c.n1 * matmul.c.n2 * matmul.c.terms);
}

void test_matmul() {
    const DType types[] = {DType::bf16, DType::f16, DType::f32};
    const int64_t tokens[] = {1, 5, 33, 70};
    int n = 0;
    for (MatmulCase c : kShapes)
        for (int variant = 0; variant < 6; ++variant, ++n) {
            c.dtype = types[n % 3];
            c.tokens = tokens[n % 4];
            c.terms = variant < 3 ? 1 : variant - 1;
            c.gap = variant % 3 * 4;
            c.shift = variant == 5;
            c.transposed = variant % 2;
            c.bias = variant != 1, c.base = variant == 2 || variant == 4;
            c.activation = static_cast<Activation>((n / 2) % 5);
            c.count = variant == 4 ? 3 : 1;
            c.shared = variant == 3 ? 49 * 1024 : 100 * 1024;
            check(c, variant == 0 ? 3 : 1);
        }
    MatmulCase attention{"k8-attention", 384, 384, 2, 2, 20};
    check(attention);
    MatmulCase expanding{"k8-w1", 8, 2, 384, 384, 20};
    expanding.activation = Activation::gelu;
    check(expanding);
    check(MatmulCase{"no tokens", 48, 48, 2, 2, 0});
}

void test_barriers() {
    for (const MatmulCase& c : {MatmulCase{"k8-attention", 200, 200, 2, 2}, MatmulCase{"k8-w1", 8, 2, 200, 200}})
        for (const int64_t shared : {int64_t(100), int64_t(48)}) {  // the second: in two panels
            MatmulCase one = c;
            one.shared = shared * 1024;
            Mm matmul(one);
            const std::vector<double> expected = matmul.expected(0, kAlpha);
            emulator::check_every_site_matters([&] { return right(matmul, expected); }, one.text());
        }
}

void test_unsupported() {
    const auto expect = [](MatmulCase c, const char* reason) {
        Mm matmul(c);
        test::check(run(matmul) == reason, reason, run(matmul).c_str());
    };
    expect({"balanced", 24, 24, 32, 32}, "no factor is tiny (at most 16 x 16)");
    expect({"doubles", 48, 48, 2, 2, 3, 1, DType::f64}, "the CUDA kernels have no float64");
    expect({"terms", 4, 4, 2, 2, 3, 17}, "more than 16 terms");
    MatmulCase narrow{"narrow", 48, 48, 2, 2};
    narrow.shared = 40 * 1024;
    expect(narrow, "the device has too little shared memory for a block of the CUDA product");

    // What no operands of that size are needed for.
    const auto unsupported = [](int64_t tokens, int64_t rows, int64_t columns, bool tf32, int sm, const char* reason) {
        const kron::Projection projection{};
        const kron::Shape shape{tokens, 1, rows, columns, 2, 2, DType::f32};
        const kron::ForwardArgs args{shape, nullptr, columns * 2, 1, &projection, Activation::none, kron::NormArgs{}};
        const kron::cuda::Launch launch{nullptr, sm, 4, 100 * 1024, tf32, nullptr, 0};
        const char* got = kron::cuda::unsupported_kron_matmul(args, launch);
        test::check(got && std::string(got) == reason, reason, got ? got : "taken");
    };
    const char* sizes = "more than 2^26 tokens or rows of the large factor, or 2^20 columns of it";
    unsupported((1 << 26) + 1, 48, 48, true, 80, sizes);
    unsupported(9, (1 << 26) + 1, 48, true, 80, sizes);
    unsupported(9, 48, (1 << 20) + 1, true, 80, sizes);
    unsupported(9, 48, 48, true, 75, "the CUDA kernels need a device of compute capability 8.0 or newer");
    unsupported(9, 48, 48, false, 80,
                "the CUDA kernels compute float32 in TF32, which is off (torch.backends.cuda.matmul.allow_tf32)");
}

const bool added = emulator::add_test("matmul", test_matmul) && emulator::add_test("matmul barriers", test_barriers) &&
                   emulator::add_test("matmul unsupported", test_unsupported);

}  // namespace
