// Products with one large and one tiny factor on Hopper (cuda/matmul_sm90.cu) against fp64.
#include <algorithm>
#include <cstring>

#include "cuda/matmul/matmul_sm90.cu"
#include "cuda_matmul.h"
#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using namespace kron::cuda;
using cuda_test::MatmulCase;
using cuda_test::Mm;
using kron::Activation;
using kron::DType;

constexpr double kAlpha = 0.75;

struct Call {
    explicit Call(const MatmulCase& c) : matmul(c) {
        for (const auto& pair : matmul.pairs)
            projections.push_back({Mm::factor(c, pair->a, c.m1, c.n1), Mm::factor(c, pair->b, c.m2, c.n2),
                                   c.bias ? pair->bias.get() : nullptr, nullptr, 0, pair->y.get()});
        for (int64_t i = 0; i < c.count; ++i) expected.push_back(matmul.expected(i, kAlpha));
    }
    kron::ForwardArgs args() const {
        return {matmul.shape(),
                matmul.x_data(),
                matmul.c.n1 * matmul.c.n2 + matmul.c.gap,
                matmul.c.count,
                projections.data(),
                matmul.c.activation,
                {},
                kAlpha};
    }
    void clear() const {
        for (const auto& pair : matmul.pairs)
            for (int64_t i = 0; i < pair->y.count; ++i) test::write(pair->y.get(), i, matmul.c.dtype, std::nan(""));
    }
    // Room for x and the least ring that the kernel takes: stages are used again soon.
    Launch tight() const {
        Launch launch{nullptr, 90, 2, 0, true, nullptr, 0};
        while (sm90::unsupported_kron_matmul(args(), launch)) {
            launch.shared_per_block += 1024;
            if (launch.shared_per_block > 227 * 1024) {
                test::check(false, sm90::unsupported_kron_matmul(args(), launch), matmul.c.text().c_str());
                break;
            }
        }
        return launch;
    }
    bool right(const Launch& launch) const {
        clear();
        if (sm90::kron_matmul(args(), launch).code) return false;
        for (size_t p = 0; p < matmul.pairs.size(); ++p)
            for (size_t i = 0; i < expected[p].size(); ++i)
                if (!(std::fabs(matmul.pairs[p]->y.at(int64_t(i)) - expected[p][i]) < 0.5)) return false;
        return true;
    }

    Mm matmul;
    std::vector<kron::Projection> projections;
    std::vector<std::vector<double>> expected;
};

void test_case(const MatmulCase& c, bool large_ring = false) {
    const Call call(c);
    Launch launch = call.tight();
    if (large_ring) launch.shared_per_block = 227 * 1024;
    for (const uint64_t seed : emulator::kSeeds) {
        emulator::settings().seed = seed;
        call.clear();
        const Status status = sm90::kron_matmul(call.args(), launch);
        test::check(!status.code, status.what, c.text().c_str());
        for (size_t p = 0; p < call.expected.size(); ++p)
            test::compare(call.expected[p], call.matmul.pairs[p]->y, 2 * cuda_test::allowed(c.dtype, c.n1 * c.n2),
                          "matmul_sm90", c.text().c_str());
    }
}

MatmulCase with(MatmulCase c, DType dtype, int64_t tokens = 70) {
    c.dtype = dtype, c.tokens = tokens;
    return c;
}

void test_unsupported() {
    const Call call({"attention", 64, 64, 2, 2, 33});
    const kron::ForwardArgs good = call.args();
    const Launch hopper{nullptr, 90, 2, 227 * 1024, true, nullptr, 0};
    const auto expect = [&](const char* reason, auto&& change) {
        kron::ForwardArgs args = good;
        kron::Projection one = good.projections[0];
        Launch launch = hopper;
        args.projections = &one;
        change(args, one, launch);
        const char* got = sm90::unsupported_kron_matmul(args, launch);
        test::check(got && std::string(got) == reason, reason, got ? got : "taken");
    };
    test::check(!sm90::unsupported_kron_matmul(good, hopper), "taken", "a good product");
    expect("not a Hopper GPU", [](auto&, auto&, auto& launch) { launch.sm = 80; });
    expect("the dtype is not bfloat16 or float16", [](auto& a, auto&, auto&) { a.shape.dtype = DType::f32; });
    expect("more than one term", [](auto& a, auto&, auto&) { a.shape.terms = 2; });
    expect("no factor is tiny (at most 16 x 16)", [](auto& a, auto&, auto&) { a.shape.n2 = 32; });
    expect("not two rows a token on either side", [](auto& a, auto&, auto&) { a.shape.m2 = a.shape.n2 = 4; });
    expect("an odd number of rows a token", [](auto& a, auto&, auto&) { a.shape.n2 = 5; });
    expect("the right factor has a number of rows other than 2, 4, 8 or 16",
           [](auto& a, auto&, auto&) { a.shape.m2 = 6; });
    expect("the large factor has more than 384 columns", [](auto& a, auto&, auto&) { a.shape.n1 = 392; });
    expect("the large factor's sizes are not multiples of 8", [](auto& a, auto&, auto&) { a.shape.m1 = 60; });
    expect("too many tokens or rows", [](auto& a, auto&, auto&) { a.shape.tokens = int64_t(1) << 31; });
    expect("fewer tiles of tokens than half the multiprocessors",
           [](auto&, auto&, auto& launch) { launch.multiprocessors = 3; });
    expect("more than 4 products of one x", [](auto& a, auto&, auto&) { a.count = 5; });
    expect("a layer norm", [](auto& a, auto&, auto&) { a.norm.residual = a.x; });
    expect("an activation, except GELU after an expanding left factor",
           [](auto& a, auto&, auto&) { a.activation = Activation::gelu; });
    expect("a tensor to add to", [](auto& a, auto& one, auto&) { one.base = a.x; });
    expect("the large factor is not row-major", [](auto&, auto& one, auto&) { one.a.stride_col = 64; });
    expect("rows that begin at addresses that are no multiples of 16", [](auto& a, auto&, auto&) { a.x_stride = 129; });
    expect("rows that begin at addresses that are no multiples of 16",
           [](auto&, auto& one, auto&) { one.a.stride_row = 65; });
    expect("a tensor at an address that is no multiple of 16",
           [](auto&, auto& one, auto&) { one.y = static_cast<char*>(one.y) + 2; });
    expect("the tiles do not fit into shared memory",
           [](auto&, auto&, auto& launch) { launch.shared_per_block = 48 * 1024; });
}

// kron_matmul takes the kernel where it can, with a packed copy of a factor that is not row-major.
void test_choice() {
    for (const bool transposed : {false, true}) {
        MatmulCase c{"attention", 72, 64, 2, 2, 40};
        c.transposed = transposed;
        const Call call(c);
        const auto on_hopper = [&](int multiprocessors) {
            Launch launch{nullptr, 90, multiprocessors, 227 * 1024, true, nullptr, 0};
            test::Buffer workspace(kron::cuda::workspace_kron_matmul(call.args(), launch) / 4 + 64, DType::f32);
            launch.workspace = workspace.get();
            emulator::forget_sites();
            call.clear();
            const Status status = kron::cuda::kron_matmul(call.args(), launch);
            test::check(!status.code, status.what, c.text().c_str());
            test::compare(call.expected[0], call.matmul.pairs[0]->y, 2 * cuda_test::allowed(c.dtype, 128),
                          "kron_matmul", c.text().c_str());
            const auto of_ring = [](const emulator::Site& site) { return std::strstr(site.file, "ring_sm90"); };
            const auto& sites = emulator::sites();
            return std::any_of(sites.begin(), sites.end(), of_ring);
        };
        test::check(on_hopper(2), "by the Hopper kernel", c.text().c_str());
        test::check(!on_hopper(132), "few tokens by the other", c.text().c_str());
    }
}

void test_matmul() {
    const MatmulCase attention{"attention of K8", 136, 200, 2, 2};
    const MatmulCase thin{"attention of K21", 136, 48, 2, 16};
    const MatmulCase widened{"its gradient", 48, 136, 16, 2};
    const MatmulCase expanding{"W1", 8, 2, 136, 192};
    const MatmulCase contracting{"W2", 2, 8, 136, 104};
    for (const MatmulCase& c : {attention, thin, widened, expanding, contracting}) {
        test_case(with(c, DType::bf16));
        test_case(with(c, DType::f16, 1), true);
    }
    for (const int64_t rows : {4, 8}) test_case({"right", 48, 136, rows, 2, 40});
    test_case({"right", 136, 72, 2, 4, 40});
    test_case({"left", 3, 2, 64, 64, 300}, true);
    test_case({"left", 2, 4, 72, 64, 40});
    MatmulCase several = attention;
    several.count = 3, several.gap = 8, several.bias = false, several.tokens = 200;
    test_case(several);
    several = thin, several.count = 2;
    test_case(several);
    MatmulCase gelu = expanding;
    gelu.activation = Activation::gelu;
    test_case(gelu);
    test_case(with(attention, DType::bf16, 0));
    for (MatmulCase c : {attention, thin}) {
        c.tokens = 300;
        const Call call(c);
        // Where the ring holds a tile's factors the next x may come while this one is read; in the least one its stages
        // are used again at once.
        const Launch tight = call.tight();
        Launch wide = tight;
        wide.shared_per_block = 227 * 1024;
        emulator::check_every_site_matters([&] { return call.right(tight) && call.right(wide); }, c.text());
    }
    test_unsupported();
    test_choice();
}

const bool added = emulator::add_test("matmul_sm90", test_matmul);

}  // namespace
