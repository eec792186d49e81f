// Packed factors, for models whose weights no longer change: a head, then the panels of the GEMM's factor (the right
// one of the oriented problem, plan.h) as the kernels of one instruction-set level read them. The other factor is small
// and stays plain. A kernel that is given panels reads no element of the plain factor they were made of.
#pragma once

#include <cstddef>

#include "kron/problem.h"

namespace kron {

// How the panels lie, and of which factor they are.
struct PanelLayout {
    uint8_t row_bytes;  // of an element of the rows that the GEMM reads
    uint8_t lanes;      // of a vector
    uint8_t vectors;    // of a panel
    uint8_t packs_a;    // 1: the panels are a's (the plan commutes the factors), 0: b's
};

struct alignas(64) PackedHead {
    uint64_t magic;
    int64_t terms, m1, n1, m2, n2;
    int32_t dtype;
    PanelLayout layout;
};
// kron_kernels/schemas reads this byte.
static_assert(offsetof(PackedHead, layout.packs_a) == 55, "the byte that says which factor is packed");

PackedHead packed_head(const Shape& shape, PanelLayout layout);

// The panels behind the head, or null where the caller packed nothing. Throws std::invalid_argument where its bytes are
// of another shape, dtype, layout or size, or not aligned.
const void* packed_panels(const Projection& projection, const Shape& shape, PanelLayout layout, int64_t panel_bytes);

}  // namespace kron
