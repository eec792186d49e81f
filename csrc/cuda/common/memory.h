// Copies that run beside the threads (cp.async), and accesses of 16 bytes.
#pragma once

#include "cuda/common/core.h"

namespace kron {
namespace cuda {
namespace device {

struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};

#ifdef __CUDACC__

KRON_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes (16, 8 or 4, to which both addresses are aligned) from global to shared memory; where `valid` is false
// zeros arrive and nothing is read. They are there for this thread after cp_async_wait, for others after a barrier
// behind it.
template <int kBytes>
KRON_DEVICE void cp_async(void* to, const void* from, bool valid) {
    static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "cp.async copies 16, 8 or 4 bytes");
    const int bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16)  // past L1: a tile is read once by a block
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                     "r"(bytes)
                     : "memory");
}
KRON_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of the latest groups that this thread committed are under way.
template <int kPending>
KRON_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

KRON_DEVICE Words4 load_global(const void* p) {
    Words4 v;
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(p));
    return v;
}
// Zeros, and no access, where `there` is false: no branch, so that several loads are under way at a time.
KRON_DEVICE Words4 load_global_if(const void* p, bool there) {
    Words4 v;
    asm("{\n\t.reg .pred q;\n\tsetp.ne.b32 q, %5, 0;\n\t"
        "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
        "@q ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
        : "l"(p), "r"(int(there)));
    return v;
}
KRON_DEVICE Words2 load_global8(const void* p) {
    Words2 v;
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p));
    return v;
}
KRON_DEVICE void store_global(void* p, const Words4& v) {
    *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
KRON_DEVICE void store_global8(void* p, const Words2& v) {
    *static_cast<uint2*>(p) = make_uint2(v.w[0], v.w[1]);
}
KRON_DEVICE Words4 load_shared(const void* p) {
    const uint4 v = *static_cast<const uint4*>(p);
    return Words4{{v.x, v.y, v.z, v.w}};
}
// Of two 16-bit values.
KRON_DEVICE uint32_t load_word(const void* p) {
    return *static_cast<const uint32_t*>(p);
}
KRON_DEVICE Words2 load_shared8(const void* p) {
    const uint2 v = *static_cast<const uint2*>(p);
    return Words2{{v.x, v.y}};
}
KRON_DEVICE void store_shared(void* p, const Words4& v) {
    *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron

#else

}  // namespace device
}  // namespace cuda
}  // namespace kron
#include "emulator/memory.h"

#endif
