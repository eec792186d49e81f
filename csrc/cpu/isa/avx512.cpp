#define KRON_ISA avx512
#define KRON_VEC_BYTES 64
#include "cpu/isa/entry.h"

namespace kron {
const Kernels kAvx512Kernels = avx512::kKernels;
}
