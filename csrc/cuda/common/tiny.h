// Which factor of a pair is the tiny one, and what that makes of the product. Host code of all launchers.
#pragma once

#include "cuda/matmul/matmul_params.h"
#include "kron/cuda.h"

namespace kron {
namespace cuda {

struct TinyShape {
    bool right;      // the tiny factor is B
    int64_t co, ci;  // of the tiny factor
    int64_t lo, li;  // of the large one
};

// False where both factors are larger than kMostTiny. The smaller of two tiny ones counts as tiny.
inline bool tiny_shape(const Shape& s, TinyShape& out) {
    const auto tiny = [](int64_t rows, int64_t columns) { return rows <= kMostTiny && columns <= kMostTiny; };
    const bool left_tiny = tiny(s.m1, s.n1), right_tiny = tiny(s.m2, s.n2);
    if (!left_tiny && !right_tiny) return false;
    const bool right = right_tiny && (!left_tiny || s.m2 * s.n2 <= s.m1 * s.n1);
    out = right ? TinyShape{true, s.m2, s.n2, s.m1, s.n1} : TinyShape{false, s.m1, s.n1, s.m2, s.n2};
    return true;
}

inline Factor transposed(const Factor& f) {
    return Factor{f.data, f.stride_term, f.stride_col, f.stride_row};
}
inline Shape transposed(const Shape& s) {
    return Shape{s.tokens, s.terms, s.n1, s.m1, s.n2, s.m2, s.dtype};
}

inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
inline int64_t divide_up(int64_t value, int64_t by) {
    return (value + by - 1) / by;
}
// Parts of a workspace.
inline int64_t aligned_bytes(int64_t bytes) {
    return round_up(bytes, 256);
}
inline bool is_aligned(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Why no kernel of the tensor cores takes operands of this type; null if it does.
inline const char* unsupported_type(DType dtype, const Launch& launch) {
    if (launch.sm < 80) return "the CUDA kernels need a device of compute capability 8.0 or newer";
    if (dtype == DType::f64) return "the CUDA kernels have no float64";
    if (dtype == DType::f32 && !launch.tf32)
        return "the CUDA kernels compute float32 in TF32, which is off (torch.backends.cuda.matmul.allow_tf32)";
    return nullptr;
}

}  // namespace cuda
}  // namespace kron
