#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/isa/kernels.h"
#include "kron/problem.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kron {
namespace {

#if defined(__x86_64__)
// AMX needs the processor, and the kernel's permission to use the tile registers (requested once a process).
bool amx_usable() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return bf16 && tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Isa detect() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return Isa::avx2;
    return amx_usable() ? Isa::amx : Isa::avx512;
}
#elif defined(__aarch64__)
Isa detect() {
    return Isa::neon;
}
#else
Isa detect() {
    return Isa::portable;
}
#endif

Isa from_environment() {
    const char* value = std::getenv("KRON_KERNELS_CPU_ISA");
    if (value)
        for (int i = 0; i <= static_cast<int>(Isa::amx); ++i)
            if (std::strcmp(value, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
    return Isa::amx;
}

std::atomic<int>& cap() {
    static std::atomic<int> value{static_cast<int>(from_environment())};
    return value;
}

}  // namespace

const Kernels& active_kernels() {
#if defined(__x86_64__)
    switch (active_isa()) {
        case Isa::amx:
            return kAmxKernels;
        case Isa::avx512:
            return kAvx512Kernels;
        case Isa::avx2:
            return kAvx2Kernels;
        case Isa::neon:
        case Isa::portable:
            break;
    }
#elif defined(__aarch64__)
    if (active_isa() == Isa::neon) return kNeonKernels;
#endif
    return kPortableKernels;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::neon:
            return "neon";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::amx:
            return "amx";
        case Isa::portable:
            break;
    }
    return "portable";
}

bool isa_compiled(Isa isa) {
#if defined(__x86_64__)
    return isa >= Isa::portable && isa <= Isa::amx && isa != Isa::neon;
#elif defined(__aarch64__)
    return isa == Isa::portable || isa == Isa::neon;
#else
    return isa == Isa::portable;
#endif
}

Isa detected_isa() {
    static const Isa isa = detect();
    return isa;
}

Isa active_isa() {
    const Isa limit = static_cast<Isa>(cap().load(std::memory_order_relaxed));
    if (limit >= detected_isa()) return detected_isa();
    return isa_compiled(limit) ? limit : Isa::portable;  // a level of the other processor family
}

void set_isa_cap(Isa limit) {
    cap().store(static_cast<int>(limit), std::memory_order_relaxed);
}

void kron_matmul_forward(const ForwardArgs& args, const Executor& executor) {
    if (args.shape.tokens > 0) active_kernels().forward(args, executor);
}

void kron_matmul_backward(const BackwardArgs& args, const Executor& executor) {
    active_kernels().backward(args, executor);
}

bool kron_ffn_is_fused(const Shape& first, const Shape& second, bool packed) {
    return active_kernels().ffn_is_fused(first, second, packed);
}

void kron_embedding(const EmbeddingArgs& args, const Executor& executor) {
    if (args.tokens > 0) active_kernels().embedding(args, executor);
}

int64_t kron_packed_bytes(const Shape& shape) {
    return active_kernels().packed_bytes(shape);
}

void kron_pack(const Shape& shape, const Factor& a, const Factor& b, void* out, const Executor& executor) {
    active_kernels().pack(shape, a, b, out, executor);
}

}  // namespace kron
