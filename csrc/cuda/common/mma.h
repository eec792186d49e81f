// Tensor cores of sm_80: fragments from shared memory, and the product of two of them.
//
// One step multiplies 16 rows by 8 columns over 32 bytes of the inner dimension: 16 values of bf16 and fp16 (m16n8k16)
// or 8 of TF32 (m16n8k8). With g = lane / 4, t = lane % 4, in 4-byte words along the inner dimension (8 a step):
//   a[0] (row g, word t), a[1] (row g+8, word t), a[2] (row g, word t+4), a[3] (row g+8, word t+4)
//   b[0] (column g, word t), b[1] (column g, word t+4)
//   d[0], d[1] (row g, columns 2t, 2t+1), d[2], d[3] (row g+8, columns 2t, 2t+1)
#pragma once

#include "cuda/common/memory.h"
#include "cuda/common/values.h"

#ifdef __CUDACC__

namespace kron {
namespace cuda {
namespace device {

// Four matrices of 8 rows of 16 bytes. Lane i gives the address of row i % 8 of matrix i / 8 and gets in r[m] word
// lane % 4 of row lane / 4 of matrix m.
KRON_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of matrices of 16-bit values, transposed: r[m] holds (row 2t, column g) and (row 2t+1, column g).
KRON_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define KRON_MMA(shape_and_types)                                                                              \
    asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d += a b^T. T is Bf16, F16, or float, whose words must have been rounded by to_tf32.
template <class T>
KRON_DEVICE void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
KRON_DEVICE void mma_sync<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KRON_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
KRON_DEVICE void mma_sync<F16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KRON_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
KRON_DEVICE void mma_sync<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    KRON_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef KRON_MMA

}  // namespace device
}  // namespace cuda
}  // namespace kron

#else
#include "emulator/mma.h"
#endif
