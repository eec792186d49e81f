#define KRON_ISA avx2
#define KRON_VEC_BYTES 32
#include "cpu/isa/entry.h"

namespace kron {
const Kernels kAvx2Kernels = avx2::kKernels;
}
