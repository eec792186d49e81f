// What one instruction-set level offers to the dispatcher.
#pragma once

#include "kron/problem.h"

namespace kron {

struct Kernels {
    void (*forward)(const ForwardArgs&, const Executor&);
    void (*backward)(const BackwardArgs&, const Executor&);
    int float_lanes;
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace kron
