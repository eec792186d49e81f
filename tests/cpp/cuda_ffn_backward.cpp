// The feed-forward block's backward on the emulated machine.
#include "cuda_ffn.h"
#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using kron::cuda::Launch;
using kron::cuda::Status;
using test::Activation;
using test::DType;
using test::Ffn;

// Bits of the outputs that are asked for, in the order of Gradients.
constexpr int kAll = 127;

bool right(const test::FfnOperands& o, const test::FfnOperands::Gradients& expected, Launch launch, int needs,
           bool tell = true) {
    const std::vector<double>* values[] = {&expected.x,  &expected.a1, &expected.b1,   &expected.bias1,
                                           &expected.a2, &expected.b2, &expected.bias2};
    const char* const names[] = {"dx", "da1", "db1", "dbias1", "da2", "db2", "dbias2"};
    kron::FfnBackwardArgs args = o.backward_args();
    void** const outputs[] = {&args.dx, &args.da1, &args.db1, &args.dbias1, &args.da2, &args.db2, &args.dbias2};
    std::vector<std::unique_ptr<test::Buffer>> results;
    for (int i = 0; i < 7; ++i) {
        results.push_back(std::make_unique<test::Buffer>(int64_t(values[i]->size()), o.f.dtype));
        if (needs >> i & 1) *outputs[i] = results.back()->get();
    }
    if (const char* reason = kron::cuda::unsupported_kron_ffn_backward(args, launch))
        return std::printf("   unsupported: %s\n", reason), false;
    const test::Workspace workspace(launch, kron::cuda::workspace_kron_ffn_backward(args, launch));
    const Status status = kron::cuda::kron_ffn_backward(args, launch);
    if (status.code) return std::printf("   %s\n", status.what), false;
    for (int i = 0; i < 7; ++i) {
        if (!(needs >> i & 1)) continue;
        double scale = 0.25, worst = 0;
        for (size_t at = 0; at < values[i]->size(); ++at) {
            const double error = std::fabs(results[size_t(i)]->at(int64_t(at)) - (*values[i])[at]);
            worst = error <= worst ? worst : error;  // a NaN stays
            scale = std::fmax(scale, std::fabs((*values[i])[at]));
        }
        if (worst <= test::ffn_tolerance(o.f.dtype) * scale) continue;
        if (tell) std::printf("   %s: error %.3g of %.3g\n", names[i], worst, scale);
        return false;
    }
    return true;
}

void test_one(const Ffn& f, const Launch& launch = test::ffn_launch(), int needs = kAll) {
    const test::FfnOperands o(f);
    const test::FfnOperands::Gradients expected = o.backward();
    emulator::check_schedules([&] { return right(o, expected, launch, needs); }, f.name());
}

void test_shapes() {
    for (const int64_t tokens : {1, 5, 33, 70})
        for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
            Ffn f;
            f.tokens = tokens;
            f.dtype = dtype;
            test_one(f);  // K8
            f.wide = 16, f.k = 64, f.middle = 48, f.n = 32, f.biased = tokens % 2;
            test_one(f, test::ffn_launch(4));  // K21, the tokens among several blocks
        }
    for (const Activation kind :
         {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu}) {
        Ffn f;
        f.activation = kind;
        f.tokens = 19;
        test_one(f);
    }
    Ffn many;  // sums of more than 32 blocks
    many.tokens = 150, many.k = many.n = 16, many.middle = 272;
    test_one(many, test::ffn_launch(64), 1 << 1 | 1 << 3 | 1 << 4);
    for (const DType dtype : {DType::bf16, DType::f32}) {
        Ffn f;
        f.dtype = dtype;
        f.rows = 1, f.wide = 3, f.tokens = 37, f.middle = 16;
        test_one(f);
        f.rows = 2, f.tokens = 11;
        for (const int64_t gap : {3, 16}) {
            f.gap = gap;
            test_one(f);
        }
        for (int output = 0; output < 7; ++output) test_one(f, test::ffn_launch(2), 1 << output);
    }
}

void test_models() {
    Ffn f;
    f.tokens = 9, f.k = f.middle = f.n = 384;
    test_one(f, test::ffn_launch(16));
    f.wide = 16, f.middle = 192;
    test_one(f);
}

void test_barriers() {
    Ffn f;
    f.tokens = 70, f.k = 160, f.n = 112;
    const test::FfnOperands o(f);
    const test::FfnOperands::Gradients expected = o.backward();
    const auto middle = [&] { return right(o, expected, test::ffn_launch(), 1 << 1 | 1 << 3 | 1 << 4, false); };
    emulator::check_every_site_matters(middle, "ffn backward");
}

void test_unsupported() {
    Ffn f;
    f.tokens = 1;
    const auto expect = [](const char* reason, const Ffn& f) {
        const test::FfnOperands o(f);
        const char* got = kron::cuda::unsupported_kron_ffn_backward(o.backward_args(), test::ffn_launch());
        test::check(got && !std::strcmp(got, reason), reason, got ? got : "taken");
    };
    f.wide = 17;
    expect("the middle has more than 16 rows", f);
    f.wide = 8, f.k = 4096;
    expect("32 rows of B1 and 32 columns of B2 exceed the shared memory of a block", f);
    f.k = 48, f.tokens = 0;
    expect("gradients of no tokens", f);
}

const bool added = emulator::add_test("ffn backward", test_shapes) &&
                   emulator::add_test("ffn backward models", test_models) &&
                   emulator::add_test("ffn backward barriers", test_barriers) &&
                   emulator::add_test("ffn backward unsupported", test_unsupported);

}  // namespace
