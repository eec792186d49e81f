// The feed-forward block's forward kernel of sm_80 on the emulated machine.
#include "cuda_ffn.h"

#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using kron::cuda::Launch;
using kron::cuda::Status;
using test::Activation;
using test::DType;
using test::Ffn;

bool right(const test::FfnOperands& o, const std::vector<double>& expected, Launch launch) {
    test::Buffer y(int64_t(expected.size()), o.f.dtype);
    const kron::FfnArgs args = o.args(y.get());
    const test::Workspace workspace(launch, kron::cuda::workspace_kron_ffn(args, launch));
    const Status status = kron::cuda::kron_ffn(args, launch);
    if (status.code) return std::printf("   %s\n", status.what), false;
    double scale = 0.25, worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double error = std::fabs(y.at(int64_t(i)) - expected[i]);
        worst = error <= worst ? worst : error;  // a NaN stays
        scale = std::fmax(scale, std::fabs(expected[i]));
    }
    return worst <= test::ffn_tolerance(o.f.dtype) * scale;
}

void test_one(const Ffn& f, const Launch& launch = test::ffn_launch()) {
    const test::FfnOperands o(f);
    test::Buffer y(1, f.dtype);
    const char* reason = kron::cuda::unsupported_kron_ffn(o.args(nullptr), launch);
    test::check(!reason, reason ? reason : "", f.name().c_str());
    const std::vector<double> expected = o.forward();
    emulator::check_schedules([&] { return right(o, expected, launch); }, f.name());
}

Ffn with(void (*change)(Ffn&)) {
    Ffn f;
    change(f);
    return f;
}

void test_shapes() {
    for (const int64_t tokens : {0, 1, 5, 33, 70})
        for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
            Ffn f;
            f.tokens = tokens;
            f.dtype = dtype;
            f.normed = tokens % 2;
            test_one(f);  // K8
            f.wide = 16, f.k = 48, f.middle = 16, f.n = 64, f.biased = f.normed;
            test_one(f);  // K21
        }
    for (const Activation kind :
         {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu}) {
        Ffn f;
        f.activation = kind;
        f.tokens = 9;
        test_one(f);
    }
    for (const DType dtype : {DType::bf16, DType::f32}) {
        Ffn f;
        f.dtype = dtype;
        f.rows = 1, f.wide = 3, f.tokens = 21;
        test_one(f);
        f.normed = true;
        test_one(f, test::ffn_launch(8));
        f.rows = 2, f.tokens = 11;
        for (const int64_t gap : {3, 16}) {
            f.gap = gap;
            test_one(f);
        }
        f.n = 144, f.k = 16, f.tokens = 5;
        test_one(f);
        f.n = 288;
        test_one(f);
        f.n = 400, f.normed = false;
        test_one(f);
    }
}

// BERT-base compressed 8 and 21 times, and a device with less shared memory.
void test_models() {
    Ffn f;
    f.tokens = 9, f.k = f.middle = f.n = 384;
    test_one(f, test::ffn_launch(4));
    f.normed = true;
    test_one(f);
    f.wide = 16, f.middle = 192, f.dtype = DType::f32;
    test_one(f, test::ffn_launch(1, 99 * 1024));
}

// The middle shared out among blocks, evenly and not.
void test_parts() {
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
        for (const int64_t middle : {16, 48, 80}) {
            Ffn f;
            f.tokens = 6, f.middle = middle, f.dtype = dtype;
            test_one(f, test::ffn_launch(2));
            f.normed = true, f.gap = 3;
            test_one(f, test::ffn_launch(40));
        }
}

void test_barriers() {
    Ffn f;
    f.tokens = 70, f.middle = 64, f.normed = true;
    const test::FfnOperands o(f);
    const std::vector<double> expected = o.forward();
    emulator::check_every_site_matters([&] { return right(o, expected, test::ffn_launch()); }, "ffn");
}

void expect_unsupported(const char* reason, const Ffn& f, Launch launch = test::ffn_launch(), int64_t y = 0) {
    Ffn small = f;
    small.tokens = 0;  // shapes alone matter
    const test::FfnOperands o(small);
    const char* got = kron::cuda::unsupported_kron_ffn(o.args(reinterpret_cast<void*>(y)), launch);
    test::check(got && !std::strcmp(got, reason), reason, got ? got : "taken");
}

void test_unsupported() {
    Launch old = test::ffn_launch(), exact = test::ffn_launch();
    old.sm = 75;
    exact.tf32 = false;
    const Ffn usual;
    expect_unsupported("the CUDA kernels need a device of compute capability 8.0 or newer", usual, old);
    expect_unsupported("the CUDA kernels have no float64", with([](Ffn& f) { f.dtype = DType::f64; }));
    expect_unsupported("the CUDA kernels compute float32 in TF32, which is off (torch.backends.cuda.matmul.allow_tf32)",
                       with([](Ffn& f) { f.dtype = DType::f32; }), exact);
    expect_unsupported("the narrow grids are not of one or two rows", with([](Ffn& f) { f.rows = 3; }));
    expect_unsupported("the middle has more than 16 rows", with([](Ffn& f) { f.wide = 17; }));
    expect_unsupported("a size of the right factors is no multiple of 16", with([](Ffn& f) { f.middle = 24; }));
    expect_unsupported("a size of the right factors is no multiple of 16", with([](Ffn& f) { f.k = 0; }));
    expect_unsupported("the second right factor has more than 768 rows", with([](Ffn& f) { f.n = 784; }));
    expect_unsupported("the norm is over more than 384 columns a row",
                       with([](Ffn& f) { f.n = 400, f.normed = true; }));
    expect_unsupported("the result is not aligned to 16 bytes", usual, test::ffn_launch(), 8);
    expect_unsupported("16 rows of x and two tiles of the right factors exceed the shared memory of a block",
                       with([](Ffn& f) { f.k = 4096; }));
    const test::FfnOperands o(with([](Ffn& f) { f.tokens = 0; }));
    kron::FfnArgs args = o.args(nullptr);
    const auto expect = [&](const char* reason) {
        const char* got = kron::cuda::unsupported_kron_ffn(args, test::ffn_launch());
        test::check(got && !std::strcmp(got, reason), reason, got ? got : "taken");
    };
    args.second.terms = 2;
    expect("a pair has more than one term");
    args = o.args(nullptr);
    args.first.m2 = 16, args.first.m1 = 16;
    expect("the middle has another grid in each of the pairs");
    args = o.args(nullptr);
    args.w2.base = &args;
    expect("a tensor is to be added before the activation");
}

const bool added = emulator::add_test("ffn", test_shapes) && emulator::add_test("ffn parts", test_parts) &&
                   emulator::add_test("ffn models", test_models) && emulator::add_test("ffn barriers", test_barriers) &&
                   emulator::add_test("ffn unsupported", test_unsupported);

}  // namespace
