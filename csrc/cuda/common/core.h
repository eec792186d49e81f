// What a kernel uses of the machine it runs on: indices, barriers, shuffles, shared memory. With the other files of
// this folder the only place of PTX and of CUDA's own names, so that the same kernel source compiles as plain C++ and
// runs under the emulator of tests/cpp/emulator.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#define KRON_DEVICE __device__ __forceinline__
#define KRON_GLOBAL __global__
// Also of constants of the host that kernels use.
#define KRON_BOTH __host__ __device__ inline
#define KRON_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define KRON_UNROLL _Pragma("unroll")
#define KRON_UNROLL_BY_2 _Pragma("unroll 2")
#define KRON_UNROLL_BY_4 _Pragma("unroll 4")
#define KRON_NO_UNROLL _Pragma("unroll 1")
#define KRON_PRAGMA(text) _Pragma(#text)
#define KRON_UNROLL_BY(count) KRON_PRAGMA(unroll count)

namespace kron {
namespace cuda {
namespace device {

KRON_DEVICE int thread_index() {
    return static_cast<int>(threadIdx.x);
}
KRON_DEVICE int threads_of_block() {
    return static_cast<int>(blockDim.x);
}
KRON_DEVICE int block_x() {
    return static_cast<int>(blockIdx.x);
}
KRON_DEVICE int block_y() {
    return static_cast<int>(blockIdx.y);
}
KRON_DEVICE int block_z() {
    return static_cast<int>(blockIdx.z);
}
KRON_DEVICE int blocks_x() {
    return static_cast<int>(gridDim.x);
}
KRON_DEVICE int blocks_y() {
    return static_cast<int>(gridDim.y);
}

// Dynamic shared memory, the only kind the kernels use.
KRON_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char kron_shared[];
    return kron_shared;
}

KRON_DEVICE void sync_threads() {
    __syncthreads();
}
KRON_DEVICE void sync_warp() {
    __syncwarp();
}

KRON_DEVICE float shuffle(float value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
KRON_DEVICE uint32_t shuffle(uint32_t value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
KRON_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
KRON_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron

#else

#define KRON_DEVICE inline
#define KRON_GLOBAL static
#define KRON_BOTH inline
#define KRON_LAUNCH_BOUNDS(threads, blocks)
#define KRON_UNROLL
#define KRON_UNROLL_BY_2
#define KRON_UNROLL_BY_4
#define KRON_NO_UNROLL
#define KRON_UNROLL_BY(count)
#include "emulator/core.h"

#endif
