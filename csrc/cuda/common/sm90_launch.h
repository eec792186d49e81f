// Kernels for Hopper alone, and what they take of the operations of kron/cuda.h. As there, `unsupported_` gives the
// reason why they do not take a problem. They need no workspace. Builds for other architectures alone leave them out.
#pragma once

#include "kron/cuda.h"

namespace kron {
namespace cuda {
namespace sm90 {

#if defined(__CUDACC__) && !defined(KRON_CUDA_SM90)

inline const char* unsupported_kron_matmul(const ForwardArgs&, const Launch&) {
    return "built without kernels of sm_90a";
}
inline Status kron_matmul(const ForwardArgs&, const Launch&) {
    return Status{1, "built without kernels of sm_90a"};
}
inline const char* unsupported_kron_ffn(const FfnArgs&, const Launch&) {
    return "built without kernels of sm_90a";
}
inline Status kron_ffn(const FfnArgs&, const Launch&) {
    return Status{1, "built without kernels of sm_90a"};
}

#else

// Several projections of one x in one launch.
const char* unsupported_kron_matmul(const ForwardArgs& args, const Launch& launch);
Status kron_matmul(const ForwardArgs& args, const Launch& launch);

const char* unsupported_kron_ffn(const FfnArgs& args, const Launch& launch);
Status kron_ffn(const FfnArgs& args, const Launch& launch);

#endif

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
