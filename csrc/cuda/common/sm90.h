// What Hopper (sm_90a) adds: barriers in shared memory that count bytes, copies of tiles by the tensor memory
// accelerator (TMA), and products of warpgroups (wgmma).
//
// A warpgroup is 4 warps whose first is a multiple of 4. wgmma multiplies 64 rows of A by the rows of B (N, 16) over 16
// values of the inner dimension; with g = lane / 4, t = lane % 4, and w the warp's place in its warpgroup a thread has
//   d[4j + 0], d[4j + 1]  (row 16w + g, columns 8j + 2t, 8j + 2t + 1), d[4j + 2], d[4j + 3] (row 16w + g + 8)
//   a[0] (row 16w + g, k 2t and 2t + 1), a[1] (row + 8), a[2] (k + 8), a[3] (row + 8, k + 8)
// Operands in shared memory are tiles of rows of 128 bytes (or 64), one after another, in the swizzle in which a TMA
// load writes them: bits 4 to 6 of an address (4 and 5) are those of the offset in the tile, exclusive or its bits 7 to
// 9 (7 and 8). A tile begins at a multiple of 1024.
#pragma once

#include "cuda/common/memory.h"
#include "cuda/common/values.h"

namespace kron {
namespace cuda {
namespace device {

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<Bf16> = true;

}  // namespace device
}  // namespace cuda
}  // namespace kron

#ifdef __CUDACC__

#include <cuda.h>

#define KRON_GRID_CONSTANT __grid_constant__
// The body of a kernel, in code for other architectures empty.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRON_SM90
#endif

namespace kron {
namespace cuda {

typedef CUtensorMap TensorMap;

namespace device {

typedef uint64_t Barrier;  // an mbarrier

// ---- Barriers. A phase ends when `arrivals` threads have arrived and all bytes expected have come; the first has
// parity 0.
KRON_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before a barrier of the block: makes them known to TMA.
KRON_DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
KRON_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
KRON_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Returns once the latest phase of this parity is over.
KRON_DEVICE void barrier_wait(Barrier* barrier, int parity) {
    const uint32_t address = shared_address(barrier);
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    } while (!done);
}
// The same of a barrier that orders threads for the sake of speed alone.
KRON_DEVICE void wait_turn(Barrier* barrier, int parity) {
    barrier_wait(barrier, parity);
}

// ---- TMA. The box of the map at these coordinates (innermost first; what is outside the tensor is zero) goes to
// shared memory, and its bytes count on the barrier.
KRON_DEVICE void tma_load(void* to, const TensorMap& map, Barrier* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}
KRON_DEVICE void tma_load(void* to, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
KRON_DEVICE void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- Registers of the warps of a warpgroup, all of which must come here.
template <int kCount>
KRON_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
KRON_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// thread_index(), read again: the compiler keeps nothing made of it in a register until then.
KRON_DEVICE int thread_index_again() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// ---- wgmma.
// A store of an operand. The tensor cores see it after fence_operands by the same thread and then a barrier.
KRON_DEVICE void store_operand(void* p, const Words4& v) {
    store_shared(p, v);
}
KRON_DEVICE void fence_operands() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Describes a tile of rows of kRowBytes. Shared addresses have 18 bits.
template <int kRowBytes>
KRON_DEVICE uint64_t operand(const void* tile) {
    static_assert(kRowBytes == 128 || kRowBytes == 64, "rows of 128 bytes or 64");
    constexpr uint32_t kSwizzle = (kRowBytes == 128 ? 1u : 2u) << 30, kEightRows = kRowBytes / 2;
    return uint64_t(kSwizzle | kEightRows) << 32 | 1u << 16 | shared_address(tile) >> 4;
}
// The same from byte `offset` of each row on, by one addition: the tensor cores wait for descriptors.
KRON_DEVICE uint64_t part_of(uint64_t operand, int offset) {
    return operand >> 32 << 32 | (uint32_t(operand) + uint32_t(offset / 16));
}
// Before the first product of a group: what this thread did with its registers comes first.
KRON_DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
KRON_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the latest groups run, d and the operands of those that ran may not be touched.
template <int kPending>
KRON_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler may not move uses of these registers over this place.
template <int kCount>
KRON_DEVICE void hold(float (&d)[kCount]) {
    KRON_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define KRON_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KRON_D16(i) KRON_D4(i), KRON_D4(i + 4), KRON_D4(i + 8), KRON_D4(i + 12)
#define KRON_D32 KRON_D16(0), KRON_D16(16)
#define KRON_D64 KRON_D32, KRON_D16(32), KRON_D16(48)
#define KRON_TEXT16_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KRON_TEXT16_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KRON_TEXT16_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KRON_TEXT16_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KRON_TEXT32 "{" KRON_TEXT16_0 ", " KRON_TEXT16_1 "}"
#define KRON_TEXT64 "{" KRON_TEXT16_0 ", " KRON_TEXT16_1 ", " KRON_TEXT16_2 ", " KRON_TEXT16_3 "}"
#define KRON_WGMMA(shape, type, operands) "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " operands
#define KRON_WGMMA_TYPES(shape, operands, ...)                           \
    if constexpr (kIsBf16<T>)                                            \
        asm volatile(KRON_WGMMA(shape, "bf16", operands) : __VA_ARGS__); \
    else                                                                 \
        asm volatile(KRON_WGMMA(shape, "f16", operands) : __VA_ARGS__)

// d += a b^T; T is Bf16 or F16. A from shared memory; B has as many rows as d has columns.
template <class T>
KRON_DEVICE void wgmma(float (&d)[16], uint64_t a, uint64_t b) {
    KRON_WGMMA_TYPES("m64n32k16", "{" KRON_TEXT16_0 "}, %16, %17, 1, 1, 1, 0, 0;", KRON_D16(0) : "l"(a), "l"(b));
}
template <class T>
KRON_DEVICE void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
    KRON_WGMMA_TYPES("m64n64k16", KRON_TEXT32 ", %32, %33, 1, 1, 1, 0, 0;", KRON_D32 : "l"(a), "l"(b));
}
template <class T>
KRON_DEVICE void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
    KRON_WGMMA_TYPES("m64n128k16", KRON_TEXT64 ", %64, %65, 1, 1, 1, 0, 0;", KRON_D64 : "l"(a), "l"(b));
}
// A from registers.
template <class T>
KRON_DEVICE void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    KRON_WGMMA_TYPES("m64n128k16", KRON_TEXT64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 0;", KRON_D64 : "r"(a[0]),
                     "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef KRON_WGMMA_TYPES
#undef KRON_WGMMA
#undef KRON_TEXT64
#undef KRON_TEXT32
#undef KRON_TEXT16_3
#undef KRON_TEXT16_2
#undef KRON_TEXT16_1
#undef KRON_TEXT16_0
#undef KRON_D64
#undef KRON_D32
#undef KRON_D16
#undef KRON_D4

}  // namespace device
}  // namespace cuda
}  // namespace kron

#else

#define KRON_GRID_CONSTANT
#define KRON_SM90
#include "emulator/sm90.h"

#endif
