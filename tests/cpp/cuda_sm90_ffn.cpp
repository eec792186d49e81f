// The feed-forward block on Hopper (cuda/ffn_sm90.cu) against fp64.
#include <string>

#include "cuda/ffn/ffn_sm90.cu"
#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using namespace kron::cuda;
using kron::Activation;
using kron::DType;
using test::Buffer;

struct Block {
    int64_t tokens, hidden, inner, middle, outer;
    DType dtype = DType::bf16;
    Activation activation = Activation::gelu;
    bool biased = true;
    double scale = 1;     // of x and of bias1
    int64_t padding = 0;  // between rows of x and of the residual
    bool norm = false;
};

struct Operands {
    explicit Operands(const Block& block)
        : block(block),
          x(block.tokens * stride(), block.dtype),
          a1(block.hidden * 2, block.dtype),
          b1(block.middle * block.inner, block.dtype),
          bias1(block.hidden * block.middle, block.dtype),
          a2(2 * block.hidden, block.dtype),
          b2(block.outer * block.middle, block.dtype),
          bias2(2 * block.outer, block.dtype),
          residual(block.tokens * (2 * block.outer + block.padding), block.dtype),
          weight(2 * block.outer, block.dtype),
          bias(2 * block.outer, block.dtype),
          y(block.tokens * 2 * block.outer, block.dtype) {
        for (Buffer* b : {&x, &a1, &b1, &bias1, &a2, &b2, &bias2, &residual, &weight, &bias}) b->randomise();
        for (Buffer* b : {&x, &bias1})
            for (int64_t i = 0; i < b->count; ++i) test::write(b->get(), i, block.dtype, block.scale * b->at(i));
        expected = reference();
    }
    int64_t stride() const { return 2 * block.inner + block.padding; }
    kron::FfnArgs args() const {
        const kron::Factor fa1{a1.get(), 0, 2, 1}, fb1{b1.get(), 0, block.inner, 1};
        const kron::Factor fa2{a2.get(), 0, block.hidden, 1}, fb2{b2.get(), 0, block.middle, 1};
        const kron::Shape first{block.tokens, 1, block.hidden, 2, block.middle, block.inner, block.dtype};
        const kron::Shape second{block.tokens, 1, 2, block.hidden, block.outer, block.middle, block.dtype};
        return {first,
                second,
                x.get(),
                stride(),
                {fa1, fb1, block.biased ? bias1.get() : nullptr, nullptr, 0, nullptr},
                {fa2, fb2, block.biased ? bias2.get() : nullptr, nullptr, 0, y.get()},
                block.activation,
                block.norm
                    ? kron::NormArgs{residual.get(), 2 * block.outer + block.padding, weight.get(), bias.get(), kEps}
                    : kron::NormArgs{}};
    }
    std::vector<double> reference() const {
        const auto& [tokens, hidden, inner, middle, outer, dtype, activation, biased, scale, padding, norm] = block;
        std::vector<double> result(size_t(tokens * 2 * outer)), h(size_t(2 * middle)), z(size_t(2 * middle));
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t i = 0; i < 2 * middle; ++i) {
                h[size_t(i)] = z[size_t(i)] = 0;
                for (int64_t k = 0; k < inner; ++k)
                    h[size_t(i)] += x.at(t * stride() + i / middle * inner + k) * b1.at(i % middle * inner + k);
            }
            for (int64_t m = 0; m < hidden; ++m)
                for (int64_t p = 0; p < middle; ++p) {
                    const double v = a1.at(2 * m) * h[size_t(p)] + a1.at(2 * m + 1) * h[size_t(middle + p)];
                    const double u = test::activate(activation, v + (biased ? bias1.at(m * middle + p) : 0));
                    for (int64_t i = 0; i < 2; ++i) z[size_t(i * middle + p)] += a2.at(i * hidden + m) * u;
                }
            for (int64_t i = 0; i < 2 * outer; ++i) {
                double sum = biased ? bias2.at(i) : 0;
                for (int64_t p = 0; p < middle; ++p)
                    sum += z[size_t(i / outer * middle + p)] * b2.at(i % outer * middle + p);
                result[size_t(t * 2 * outer + i)] = sum;
            }
        }
        const int64_t width = 2 * outer;
        for (int64_t t = 0; norm && t < tokens; ++t) {
            double* y = result.data() + t * width;
            double mean = 0, variance = 0;
            for (int64_t i = 0; i < width; ++i)
                y[i] += residual.at(t * (width + padding) + i), mean += y[i] / double(width);
            for (int64_t i = 0; i < width; ++i) variance += (y[i] - mean) * (y[i] - mean) / double(width);
            for (int64_t i = 0; i < width; ++i)
                y[i] = (y[i] - mean) / std::sqrt(variance + kEps) * weight.at(i) + bias.at(i);
        }
        return result;
    }

    Block block;
    static constexpr double kEps = 1e-3;
    Buffer x, a1, b1, bias1, a2, b2, bias2, residual, weight, bias, y;
    std::vector<double> expected;
};

// Room for x, bias and the least ring that the kernel takes: stages are used again soon.
Launch tight(const kron::FfnArgs& args) {
    Launch launch{nullptr, 90, 2, 0, true, nullptr, 0};
    while (sm90::unsupported_kron_ffn(args, launch)) launch.shared_per_block += 1024;
    return launch;
}

std::string name_of(const Block& b) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "T=%ld hidden=%ld inner=%ld middle=%ld outer=%ld dtype=%d act=%d biased=%d scale=%g", long(b.tokens),
                  long(b.hidden), long(b.inner), long(b.middle), long(b.outer), int(b.dtype), int(b.activation),
                  int(b.biased), b.scale);
    return text;
}

void clear(const Buffer& y) {
    for (int64_t i = 0; i < y.count; ++i) test::write(y.get(), i, y.dtype, std::nan(""));
}

// x, what is between the products and y are rounded.
double tolerance(const Block& b) {
    return 3 * test::tolerance(b.dtype, b.inner + b.middle);
}

// Relative to the largest result, however small.
void compare(const Operands& operands) {
    double scale = 0, worst = 0;
    bool finite = true;
    for (size_t i = 0; i < operands.expected.size(); ++i) {
        const double error = std::fabs(operands.expected[i] - operands.y.at(int64_t(i)));
        scale = std::fmax(scale, std::fabs(operands.expected[i])), worst = std::fmax(worst, error);
        finite = finite && std::isfinite(error);
    }
    const bool fine = finite && worst <= tolerance(operands.block) * scale;
    test::check(fine, "ffn_sm90", name_of(operands.block).c_str());
    if (!fine) std::printf("   error %.3g of scale %.3g\n", worst, scale);
}

void test_block(const Block& block, bool large_ring) {
    const Operands operands(block);
    Launch launch = tight(operands.args());
    if (large_ring) launch.shared_per_block = 227 * 1024;
    for (const uint64_t seed : emulator::kSeeds) {
        emulator::settings().seed = seed;
        clear(operands.y);
        const Status status = sm90::kron_ffn(operands.args(), launch);
        test::check(!status.code, status.what, name_of(block).c_str());
        compare(operands);
    }
}

bool right(const Operands& operands, const Launch& launch) {
    clear(operands.y);
    if (sm90::kron_ffn(operands.args(), launch).code) return false;
    for (int64_t i = 0; i < operands.y.count; ++i)
        if (!(std::fabs(operands.y.at(i) - operands.expected[size_t(i)]) < 1)) return false;
    return true;
}

void test_unsupported() {
    const Operands operands({70, 8, 128, 64, 128});
    const kron::FfnArgs good = operands.args();
    const Launch hopper{nullptr, 90, 2, 227 * 1024, true, nullptr, 0};
    const auto expect = [&](const char* reason, auto&& change) {
        kron::FfnArgs args = good;
        Launch launch = hopper;
        change(args, launch);
        const char* got = sm90::unsupported_kron_ffn(args, launch);
        test::check(got && std::string(got) == reason, reason, got ? got : "taken");
    };
    test::check(!sm90::unsupported_kron_ffn(good, hopper), "taken", "a good block");
    expect("not a Hopper GPU", [](auto&, auto& launch) { launch.sm = 80; });
    expect("not a Hopper GPU", [](auto&, auto& launch) { launch.sm = 100; });
    expect("the dtype is not bfloat16 or float16", [](auto& a, auto&) { a.first.dtype = DType::f32; });
    expect("more than one term", [](auto& a, auto&) { a.first.terms = 2; });
    expect("not two rows a token in and out", [](auto& a, auto&) { a.first.n1 = 4; });
    expect("the pairs do not chain", [](auto& a, auto&) { a.second.n2 = 72; });
    expect("more than 32 rows a token in the middle", [](auto& a, auto&) { a.first.m1 = a.second.n1 = 33; });
    expect("the large factors' sizes are not multiples of 8", [](auto& a, auto&) { a.first.n2 = 100; });
    expect("the second pair's large factor has more than 384 rows", [](auto& a, auto&) { a.second.m2 = 392; });
    expect("too many tokens", [](auto& a, auto&) { a.first.tokens = int64_t(1) << 31; });
    expect("rows of the residual at addresses that are no multiples of 4",
           [](auto& a, auto&) { a.norm.residual_stride = 129; });
    expect("fewer tiles of tokens than half the multiprocessors",
           [](auto&, auto& launch) { launch.multiprocessors = 5; });
    expect("a tensor to add to", [](auto& a, auto&) { a.w2.base = a.x; });
    expect("the large factors are not row-major", [](auto& a, auto&) { a.w1.b.stride_col = 64; });
    expect("rows that begin at addresses that are no multiples of 16", [](auto& a, auto&) { a.x_stride = 257; });
    expect("a tensor at an address that is no multiple of 16",
           [](auto& a, auto&) { a.x = static_cast<const char*>(a.x) + 2; });
    expect("the tiles do not fit into shared memory", [](auto& a, auto&) { a.first.n2 = 1024; });
    expect("the tiles do not fit into shared memory", [](auto&, auto& launch) { launch.shared_per_block = 48 * 1024; });
}

// The activation of two fp16 values: tanh may be off by 2^-11, gelu's fit by 2.7e-4.
template <Activation kKind>
void test_activate2() {
    using namespace kron::cuda::device;
    double worst = 0;
    for (float x = -70; x < 70; x += 0.0137f) {
        const float half = kTakesHalf<kKind> ? 0.5f : 1.0f;
        float low, high, v0, v1;
        const uint32_t v = pack<F16>(half * x, half * x / 16);
        unpack<F16>(v, v0, v1);
        unpack<F16>(activate2<kKind>(v), low, high);
        for (const auto& [got, at] : {std::pair{low, v0 / half}, std::pair{high, v1 / half}}) {
            const double error = std::fabs(double(got) - test::activate(kKind, double(at)));
            worst = std::fmax(worst, error / (3e-4 + 1e-3 * std::fabs(double(at))));
        }
    }
    test::check(worst < 1, "activate2", std::to_string(worst).c_str());
}

void test_ffn() {
    test_activate2<Activation::gelu>();
    test_activate2<Activation::gelu_tanh>();
    test_activate2<Activation::silu>();
    test_activate2<Activation::relu>();
    for (const int64_t tokens : {1, 64, 70}) test_block({tokens, 8, 128, 64, 128}, false);
    test_block({70, 8, 384, 384, 384}, true);   // K8
    test_block({70, 16, 384, 192, 384}, true);  // K21
    // Such shapes, smaller: more than one step of the middle, padded sizes, more than two tiles a block.
    test_block({300, 8, 192, 160, 384}, false);
    test_block({130, 16, 72, 96, 264, DType::bf16, Activation::gelu, true, 1, 24}, true);
    test_block({70, 16, 200, 104, 192, DType::f16}, true);
    for (const Activation activation :
         {Activation::none, Activation::gelu_tanh, Activation::relu, Activation::silu, Activation::gelu})
        for (const DType dtype : {DType::bf16, DType::f16}) {
            test_block({20, 8, 64, 64, 136, dtype, activation, false}, true);
            test_block({33, 4, 64, 64, 320, dtype, activation}, true);
        }
    // Values between the products that fp16 does not hold, or holds with few digits.
    for (const double scale : {1e6, 1e-8})
        for (const bool biased : {false, true})
            test_block({40, 8, 64, 64, 128, DType::bf16, Activation::gelu, biased, scale}, true);
    for (const int64_t outer : {128, 200, 384})
        test_block({70, 8, 64, 64, outer, DType::bf16, Activation::gelu, true, 1, 8, true}, true);
    test_block({70, 8, 64, 64, 320, DType::f16, Activation::relu, false, 1, 0, true}, true);
    test_block({0, 8, 128, 64, 128}, true);

    const Operands operands({200, 4, 512, 64, 264});
    const Launch launch = tight(operands.args());
    emulator::check_every_site_matters([&] { return right(operands, launch); }, "ffn_sm90");
    test_unsupported();
}

const bool added = emulator::add_test("ffn_sm90", test_ffn);

}  // namespace
