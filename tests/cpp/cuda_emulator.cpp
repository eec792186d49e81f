// The emulated machine itself: fragments of the tensor cores lane by lane, and mistakes that it has to notice.
#include <string>

#include "cuda/common/launch.h"
#include "cuda/common/mma.h"
#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using namespace kron::cuda;
using namespace kron::cuda::device;
using emulator::check_every_site_matters;
using emulator::check_schedules;

const Launch kLaunch{nullptr, 80, 1, 48 * 1024, true, nullptr, 0};

template <class Params>
std::string run(void (*kernel)(Params), int threads, int64_t shared_bytes, const Params& params) {
    return start(kernel, Grid{}, threads, shared_bytes, kLaunch, params).what;
}

struct Transpose {
    const float* in;  // (64, 64)
    float* out;
};
// Of 64 x 64 values by 128 threads through shared memory, copied there behind the threads' backs: 4 slabs of 16 rows,
// two of them under way at a time.
KRON_GLOBAL void transpose(Transpose p) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    const auto copy = [&](int slab) {
        for (int i = thread_index(); i < 16 * 16; i += 128) {
            const int row = slab * 16 + i / 16, column = i % 16 * 4;
            cp_async<16>(tile + row % 32 * 64 + column, p.in + row % 64 * 64 + column, row < 64);
        }
        cp_async_commit();
    };
    copy(0);
    for (int slab = 0; slab < 4; ++slab) {
        copy(slab + 1);
        cp_async_wait<1>();
        sync_threads();
        for (int i = thread_index(); i < 16 * 64; i += 128)
            p.out[i / 16 * 64 + slab * 16 + i % 16] = tile[(slab * 16 + i % 16) % 32 * 64 + i / 16];
        sync_threads();
    }
}

struct Product {
    const void *a, *b, *bt;  // (16, inner), (8, inner), (inner, 8)
    float* out;              // (2, 16, 8): with b, with bt
};
// One step of the tensor cores by a warp, its second operand read along its rows and transposed.
template <class T>
KRON_GLOBAL void product(Product p) {
    constexpr int kPitch = 48;
    char* tile = shared_memory();
    const int lane = thread_index(), kInner = 32 / sizeof(T);
    for (int i = lane; i < 24 * 2; i += 32) {
        const char* from = static_cast<const char*>(i < 32 ? p.a : p.b) + (i < 32 ? i : i - 32) * 16;
        store_shared(tile + i / 2 * kPitch + i % 2 * 16, load_global(from));
    }
    sync_warp();
    uint32_t a[4], b4[4];
    ldmatrix(a, tile + lane % 16 * kPitch + lane / 16 * 16);
    ldmatrix(b4, tile + (16 + lane % 8) * kPitch + lane / 8 % 2 * 16);
    const uint32_t b[2] = {b4[0], b4[1]};
    float d[4] = {};
    mma_sync<T>(d, a, b);
    const auto store = [&](float* out) {
        for (int e = 0; e < 4; ++e) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
    };
    store(p.out);
    if constexpr (sizeof(T) == 2) {
        const int row = kInner - 1 - lane;
        if (row >= 0) store_shared(tile + row * 16, load_global(static_cast<const char*>(p.bt) + row * 16));
        sync_warp();
        ldmatrix_transposed(b4, tile + lane % 16 * 16);
        const uint32_t bt[2] = {b4[0], b4[1]};
        for (float& value : d) value = 0;
        mma_sync<T>(d, a, bt);
    }
    store(p.out + 128);
}

template <class T>
void test_product(kron::DType dtype) {
    const int64_t inner = 32 / int64_t(sizeof(T));
    test::Buffer a(16 * inner, dtype), b(8 * inner, dtype), bt(inner * 8, dtype), out(256, kron::DType::f32);
    for (test::Buffer* operand : {&a, &b})
        for (int64_t i = 0; i < operand->count; ++i)  // exact in every type
            test::write(operand->get(), i, dtype, double(test::pick(-8, 8)));
    for (int64_t i = 0; i < bt.count; ++i) test::write(bt.get(), i, dtype, b.at(i % 8 * inner + i / 8));
    const auto right = [&] {
        if (!run(product<T>, 32, 24 * 48, Product{a.get(), b.get(), bt.get(), static_cast<float*>(out.get())}).empty())
            return false;
        for (int64_t i = 0; i < 256; ++i) {
            double sum = 0;
            for (int64_t k = 0; k < inner; ++k) sum += a.at(i % 128 / 8 * inner + k) * b.at(i % 8 * inner + k);
            if (out.at(i) != sum) return false;
        }
        return true;
    };
    check_schedules(right, "product of fragments");
    check_every_site_matters(right, "product of fragments");
}

struct Nothing {};

void expect(const std::string& error, const char* part) {
    test::check(error.find(part) != std::string::npos, ("expected: " + std::string(part)).c_str(), error.c_str());
}

void test_errors() {
    const Nothing none{};
    expect(
        run<Nothing>(
            [](Nothing) {
                if (thread_index() < 32) sync_threads();
            },
            64, 0, none),
        "deadlock: 32 threads (the first is 32) wait for nothing: it has ended; 32 threads (the first is 0) wait for "
        "sync_threads.");
    expect(run<Nothing>(
               [](Nothing) {
                   if (thread_index() != 7) sync_warp();
               },
               32, 0, none),
           "wait for sync_warp");
    expect(run<Nothing>([](Nothing) { thread_index() == 7 ? sync_warp() : void(shuffle(1.0f, 0)); }, 32, 0, none),
           "a lane of a warp came to");
    expect(run<Nothing>([](Nothing) { cp_async<16>(shared_memory() + 8, nullptr, false); }, 32, 64, none),
           "cp_async of an address that is no multiple of 16");
    expect(run<Nothing>([](Nothing) { cp_async<16>(shared_memory() + 64, nullptr, false); }, 32, 64, none),
           "outside the block's shared memory");
    expect(run<Nothing>([](Nothing) { store_shared(shared_memory() + 4, Words4{}); }, 32, 64, none),
           "a store of an address that is no multiple of 16");
    expect(run<Nothing>([](Nothing) {}, 48, 0, none), "a block of 48 threads, expected a multiple of 32");
    expect(start<Nothing>([](Nothing) {}, Grid{1, 70000, 1}, 32, 0, kLaunch, none).what, "at most 65535 along y and z");
    expect(run<Nothing>([](Nothing) {}, 32, 48 * 1024 + 1, none), "more shared memory than a block may ask for");
    test::check(run<Nothing>([](Nothing) { sync_threads(); }, 64, 0, none).empty(), "no error", "one barrier");
}

void test_shuffles() {
    const auto right = [] {
        return run<Nothing>(
                   [](Nothing) {
                       const int lane = thread_index();
                       if (shuffle_xor(float(lane), 5) != float(lane ^ 5)) emulator::fail("shuffle_xor");
                       if (shuffle(uint32_t(lane), 31 - lane) != uint32_t(31 - lane)) emulator::fail("shuffle");
                   },
                   32, 0, Nothing{})
            .empty();
    };
    check_schedules(right, "shuffles");
}

void test_emulator() {
    std::vector<float> in(64 * 64), out(64 * 64);
    for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
    const auto right = [&] {
        std::fill(out.begin(), out.end(), -1.0f);
        if (!run(transpose, 128, 32 * 64 * 4, Transpose{in.data(), out.data()}).empty()) return false;
        for (size_t i = 0; i < in.size(); ++i)
            if (out[i] != in[i % 64 * 64 + i / 64]) return false;
        return true;
    };
    check_schedules(right, "transpose");
    check_every_site_matters(right, "transpose");
    test_product<Bf16>(kron::DType::bf16);
    test_product<F16>(kron::DType::f16);
    test_product<float>(kron::DType::f32);
    test_shuffles();
    test_errors();
}

const bool added = emulator::add_test("emulator", test_emulator);

}  // namespace
