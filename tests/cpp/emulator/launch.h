// csrc/cuda/common/launch.h on the emulated machine.
#pragma once

#include <string>

#include "emulator/machine.h"
#include "kron/cuda.h"

namespace emulator {

inline kron::cuda::Status run_kernel(Dim3 grid, int threads, int64_t shared_bytes,
                                     const std::function<void()>& thread) {
    static std::string error;
    error = run(grid, threads, shared_bytes, thread);
    return kron::cuda::Status{error.empty() ? 0 : 1, error.c_str()};
}

}  // namespace emulator
