// The 64-bit ARM baseline. Same vectors as the portable level; what the compiler makes of those is already zip, uzp and
// fmla, only the 16-bit loads and stores need its intrinsics (KRON_NEON in simd.h).
#define KRON_ISA neon
#define KRON_VEC_BYTES 16
#define KRON_NEON
#include "cpu/isa/entry.h"

namespace kron {
const Kernels kNeonKernels = neon::kKernels;
}
