// Starts a kernel. A kernel takes one struct of parameters by value.
#pragma once

#include "cuda/common/core.h"
#include "kron/cuda.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator/launch.h"
#endif

namespace kron {
namespace cuda {

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

#ifdef __CUDACC__

inline Status status_of(cudaError_t error) {
    return Status{static_cast<int>(error), cudaGetErrorString(error)};
}

template <class Params>
Status start(void (*kernel)(Params), const Grid& grid, int threads, int64_t shared_bytes, const Launch& launch,
             const Params& params) {
    if (shared_bytes > 48 * 1024) {  // more must be requested
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return status_of(error);
    }
    const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
    kernel<<<blocks, threads, size_t(shared_bytes), static_cast<cudaStream_t>(launch.stream)>>>(params);
    return status_of(cudaGetLastError());
}

#else

template <class Params>
Status start(void (*kernel)(Params), const Grid& grid, int threads, int64_t shared_bytes, const Launch& launch,
             const Params& params) {
    if (shared_bytes > launch.shared_per_block) return Status{1, "more shared memory than a block may ask for"};
    return emulator::run_kernel({int(grid.x), int(grid.y), int(grid.z)}, threads, shared_bytes,
                                [&] { kernel(params); });
}

#endif

}  // namespace cuda
}  // namespace kron
