// Random operands, their fp64 values, and the comparison of results: what the tests of the core share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kron/problem.h"

namespace test {

using kron::Activation;
using kron::DType;

inline int failures = 0, checks = 0;

inline void check(bool ok, const char* what, const char* where) {
    ++checks;
    if (ok) return;
    ++failures;
    std::printf("FAILED %s: %s\n", what, where);
}

inline uint64_t state = 1;
inline double uniform() {  // splitmix64, in (-1, 1)
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1;
}
inline int64_t pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>((uniform() + 1) / 2 * double(high - low + 1));
}

inline double read(const void* p, int64_t i, DType d) {
    switch (d) {
        case DType::f32:
            return static_cast<const float*>(p)[i];
        case DType::f64:
            return static_cast<const double*>(p)[i];
        case DType::f16:
            return static_cast<double>(static_cast<const kron::Half*>(p)[i]);
        case DType::bf16:
            break;
    }
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline void write(void* p, int64_t i, DType d, double v) {
    switch (d) {
        case DType::f32:
            static_cast<float*>(p)[i] = static_cast<float>(v);
            return;
        case DType::f64:
            static_cast<double*>(p)[i] = v;
            return;
        case DType::f16:
            static_cast<kron::Half*>(p)[i] = static_cast<kron::Half>(v);
            return;
        case DType::bf16:
            break;
    }
    const float f = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits >> 16);
}

// Exactly as many elements as asked for, so that the address sanitizer sees one read or written beyond; filled with
// NaN.
struct Buffer {
    Buffer(int64_t count, DType dtype)
        : count(count), dtype(dtype), data(static_cast<char*>(std::malloc(size_t(count * kron::size_of(dtype)) + 1))) {
        for (int64_t i = 0; i < count; ++i) write(get(), i, dtype, std::nan(""));
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    void* get() const { return data; }
    void randomise() {
        for (int64_t i = 0; i < count; ++i) write(data, i, dtype, uniform());
    }
    double at(int64_t i) const { return read(data, i, dtype); }
    int64_t count;
    DType dtype;
    char* data;
};

inline void run_serial(int64_t count, void (*task)(void*, int64_t), void* arg) {
    for (int64_t i = 0; i < count; ++i) task(arg, i);
}
inline void run_threads(int64_t count, void (*task)(void*, int64_t), void* arg) {
    std::vector<std::thread> workers;
    for (int w = 0; w < 3; ++w)
        workers.emplace_back([=] {
            for (int64_t i = w; i < count; i += 3) task(arg, i);
        });
    for (auto& worker : workers) worker.join();
}
inline const kron::Executor kSerial{1, run_serial}, kThreads{3, run_threads};

inline double activate(Activation kind, double x) {
    switch (kind) {
        case Activation::gelu:
            return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu:
            return x < 0 ? 0 : x;
        case Activation::silu:
            return x / (1 + std::exp(-x));
        case Activation::none:
            break;
    }
    return x;
}

// Largest error relative to the largest magnitude expected, at least a quarter. One rounding of the output dtype and a
// short fp32 sum.
inline double tolerance(DType d, int64_t depth) {
    const double eps = d == DType::f64 ? 0x1p-52 : d == DType::f32 ? 0x1p-23 : d == DType::f16 ? 0x1p-10 : 0x1p-7;
    const double accumulate = d == DType::f64 ? 0x1p-52 : 0x1p-23;
    return eps + accumulate * (4 + std::sqrt(double(depth)));
}

inline void compare(const std::vector<double>& expected, const Buffer& got, double tol, const char* what,
                    const char* where) {
    double scale = 0.25, worst = 0;  // sums of a few products that cancel err as their terms do
    bool finite = true;
    for (size_t i = 0; i < expected.size(); ++i) {
        scale = std::fmax(scale, std::fabs(expected[i]));
        const double error = std::fabs(expected[i] - got.at(int64_t(i)));
        finite = finite && std::isfinite(error);
        worst = std::fmax(worst, error);
    }
    check(finite && worst <= tol * scale, what, where);
    if (!(finite && worst <= tol * scale))
        std::printf("   error %.3g of scale %.3g, allowed %.3g\n", worst, scale, tol * scale);
}

// Calls one(executor, name of the level) at every compiled level of this machine, on one thread and on three.
template <class F>
void at_every_level(F one) {
    for (int level = 0; level <= static_cast<int>(kron::detected_isa()); ++level) {
        if (!kron::isa_compiled(static_cast<kron::Isa>(level))) continue;
        kron::set_isa_cap(static_cast<kron::Isa>(level));
        for (const kron::Executor& executor : {kSerial, kThreads}) one(executor, kron::isa_name(kron::active_isa()));
    }
    kron::set_isa_cap(kron::Isa::amx);
}

}  // namespace test
