#define KRON_ISA portable
#define KRON_VEC_BYTES 16
#include "cpu/isa/entry.h"

namespace kron {
const Kernels kPortableKernels = portable::kKernels;
}
