// Kernels for Hopper alone, and what they take of the operations of kron/cuda.h. As there, `refuse_` gives the reason
// why they do not take a problem. They need no workspace.
#pragma once

#include "kron/cuda.h"

namespace kron {
namespace cuda {
namespace sm90 {

const char* refuse_kron_ffn(const FfnArgs& args, const Launch& launch);
Status kron_ffn(const FfnArgs& args, const Launch& launch);

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
