// What a kernel does about indices that it finds wrong: the stream fails, as it does in torch's own kernels.
#pragma once

#include "cuda/common/core.h"

#ifdef __CUDACC__
// What assert() calls, which builds without assertions do not declare.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned, const char*) noexcept
    __attribute__((noreturn));
#endif

namespace kron {
namespace cuda {
namespace device {

#ifdef __CUDACC__

// Later calls on the device give cudaErrorAssert. The thread ends here.
KRON_DEVICE void index_out_of_range() {
    __assert_fail("kron_kernels: expected every index to be a row of its table", "embedding.cuh", 0, "kron_embedding");
}

#else

inline void index_out_of_range() {
    emulator::fail("an index is no row of its table");
}

#endif

}  // namespace device
}  // namespace cuda
}  // namespace kron
