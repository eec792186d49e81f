// The head of packed factors: what they were made of, so that bytes of another origin are never taken for them.
#pragma once

#include "kron/problem.h"

namespace kron {

struct alignas(64) PackedHead {
    uint64_t magic;
    uint64_t values;  // a hash of samples of both factors
    int64_t terms, m1, n1, m2, n2;
    int32_t dtype;
    int32_t layout;  // row type, lanes and vectors of a panel, orientation
};

// Bytes of an element of the rows that the GEMM reads, lanes of a vector, vectors of a panel, orientation.
inline int32_t layout_code(int row_bytes, int lanes, int vectors, bool commuted) {
    return row_bytes | lanes << 8 | vectors << 16 | static_cast<int32_t>(commuted) << 24;
}

PackedHead packed_head(const Shape& shape, const Factor& a, const Factor& b, int32_t layout);

// The panels behind the head, or null where the bytes are of other factors or another layout.
const void* packed_panels(const Projection& projection, const Shape& shape, int32_t layout, int64_t panel_bytes);

}  // namespace kron
