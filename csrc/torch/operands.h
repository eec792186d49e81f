// Checks of the operands, and their memory layout. Only the stable ABI is used, so that one
// binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kron/problem.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kMaxDimensions = 64;  // torch's own limit on what can be indexed; checked in checked_shape

inline std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    const auto sizes = tensor.sizes();
    for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "(") << sizes[i];
    text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
    return text.str();
}

[[noreturn]] inline void fail(const char* argument, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(std::string("kron_kernels: ") + argument + ": expected " + expected + ", got " + got);
}

[[noreturn]] inline void fail_shape(const char* argument, const std::string& expected, const Tensor& tensor) {
    fail(argument, expected, "shape " + shape_text(tensor));
}

inline std::string text(int64_t value) {
    return std::to_string(value);
}

inline int32_t dtype_code(const Tensor& tensor) {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    return code;
}

inline kron::DType kernel_dtype(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return kron::DType::f32;
        case ScalarType::Double:
            return kron::DType::f64;
        case ScalarType::BFloat16:
            return kron::DType::bf16;
        case ScalarType::Half:
            return kron::DType::f16;
        default:
            fail("x", "dtype float32, float64, bfloat16 or float16", "another dtype");
    }
}

inline int32_t device_type(const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
}

inline int32_t device_index(const Tensor& tensor) {
    int32_t index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    return index;
}

inline void check_device(const char* argument, const Tensor& tensor, const Tensor& x) {
    if (device_type(tensor) != device_type(x) || device_index(tensor) != device_index(x))
        fail(argument, "the device of x", "another device");
}

inline void check_dtype(const char* argument, const Tensor& tensor, const Tensor& x) {
    if (dtype_code(tensor) != dtype_code(x)) fail(argument, "the dtype of x", "another dtype");
    check_device(argument, tensor, x);
}

// Sizes (S, m, n) of a stack of factors; one matrix (m, n) is a stack of one, when `single` allows it.
inline std::optional<std::array<int64_t, 3>> stack_sizes(const Tensor& factor, bool single) {
    const auto size = factor.sizes();
    std::array<int64_t, 3> sizes{1, 0, 0};
    if (size.size() == 3) {
        sizes = {size[0], size[1], size[2]};
    } else if (size.size() == 2 && single) {
        sizes = {1, size[0], size[1]};
    }
    if (sizes[0] < 1 || sizes[1] < 1 || sizes[2] < 1) return std::nullopt;
    return sizes;
}

// Checks a (S, m1, n1) and b (S, m2, n2), and x (..., n1 * n2) against them; T is the product of x's leading sizes.
inline kron::Shape checked_shape(const Tensor& x, const Tensor& a, const Tensor& b, bool single) {
    const auto x_size = x.sizes();
    const auto a_size = stack_sizes(a, single && b.dim() == 2);
    if (!a_size) fail_shape("a", "(S, m1, n1) with no empty dimension", a);
    const auto [terms, m1, n1] = *a_size;
    const auto b_size = stack_sizes(b, single && a.dim() == 2);
    if (!b_size || (*b_size)[0] != terms) {
        fail_shape("b", "(S, m2, n2) with S = " + text(terms) + " as in a and no empty dimension", b);
    }
    const int64_t m2 = (*b_size)[1], n2 = (*b_size)[2];
    const int64_t n = n1 * n2;
    if (x_size.size() < 1 || x_size.size() > kMaxDimensions || x_size[x_size.size() - 1] != n)
        fail_shape("x", "(..., n1 * n2) = (..., " + text(n) + ")", x);
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < x_size.size(); ++i) tokens *= x_size[i];
    check_dtype("a", a, x);
    check_dtype("b", b, x);
    return {tokens, terms, m1, n1, m2, n2, kernel_dtype(x)};
}

// A tensor (..., n) as rows at one distance, each contiguous: what the kernels read.
struct Rows {
    Tensor tensor;
    int64_t stride;
    const void* data() const { return tensor.const_data_ptr(); }
};

inline Rows rows_of(const Tensor& tensor) {
    const auto size = tensor.sizes(), stride = tensor.strides();
    const int64_t last = static_cast<int64_t>(size.size()) - 1, n = size[last];
    bool regular = n == 1 || stride[last] == 1;
    int64_t row_stride = -1, expected = 0;
    for (int64_t i = last - 1; i >= 0; --i) {
        if (size[i] == 1) continue;
        if (row_stride < 0) {
            row_stride = stride[i];
        } else {
            regular = regular && stride[i] == expected;
        }
        expected = stride[i] * size[i];
    }
    if (!regular) return {torch::stable::contiguous(tensor), n};
    return {tensor, row_stride < 0 ? n : row_stride};
}

inline kron::Factor factor(const Tensor& stack) {
    const auto strides = stack.strides();
    if (strides.size() == 2) return {stack.const_data_ptr(), 0, strides[0], strides[1]};
    return {stack.const_data_ptr(), strides[0], strides[1], strides[2]};
}

// On the device of `like`. torch::stable::new_empty would go through the dispatcher, at the price of a small product.
inline Tensor empty_of(int64_t dimensions, const int64_t* sizes, int32_t dtype, const Tensor& like) {
    std::array<int64_t, kMaxDimensions> strides;
    int64_t stride = 1;
    for (int64_t i = dimensions; i-- > 0; stride *= sizes[i]) strides[i] = stride;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides.data(), dtype, device_type(like),
                                                    device_index(like), &handle));
    return Tensor(handle);
}

inline Tensor empty(int64_t dimensions, const int64_t* sizes, const Tensor& like) {
    return empty_of(dimensions, sizes, dtype_code(like), like);
}

// Shape of x with another last dimension.
inline Tensor empty_rows(const Tensor& x, int64_t last, int32_t dtype) {
    const auto size = x.sizes();
    std::array<int64_t, kMaxDimensions> sizes;
    std::copy(size.begin(), size.end(), sizes.begin());
    sizes[size.size() - 1] = last;
    return empty_of(static_cast<int64_t>(size.size()), sizes.data(), dtype, x);
}

inline Tensor empty_rows(const Tensor& x, int64_t last) {
    return empty_rows(x, last, dtype_code(x));
}

inline void zero(Tensor tensor) {
    if (tensor.is_cpu())
        std::memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel()) * tensor.element_size());
    else
        torch::stable::zero_(tensor);
}

// The shape of x, but for the last dimension, which is `last`; and x's dtype.
inline void check_like(const char* argument, const Tensor& tensor, const Tensor& x, int64_t last,
                       const char* last_name) {
    const auto size = tensor.sizes(), x_size = x.sizes();
    if (size.size() != x_size.size() || size[x_size.size() - 1] != last ||
        !std::equal(x_size.begin(), x_size.end() - 1, size.begin()))
        fail_shape(argument, "the shape of x, " + shape_text(x) + ", with last dimension " + last_name + text(last),
                   tensor);
    check_dtype(argument, tensor, x);
}

// A vector (size,) of x's dtype, contiguous.
inline Tensor checked_vector(const char* argument, const char* expected, const Tensor& vector, int64_t size,
                             const Tensor& like) {
    if (vector.dim() != 1 || vector.size(0) != size)
        fail_shape(argument, std::string(expected) + " = (" + text(size) + ",)", vector);
    check_dtype(argument, vector, like);
    return vector.stride(0) == 1 || size == 1 ? vector : torch::stable::contiguous(vector);
}

inline kron::Activation checked_activation(int64_t code) {
    if (code < 0 || code > static_cast<int64_t>(kron::Activation::silu)) {
        fail("activation", "a code from 0 to 4", text(code));
    }
    return static_cast<kron::Activation>(code);
}

// One pair of factors with its bias; `bias` holds what must live as long as the call. No bytes of `packed`: kron_pack
// had nothing to pack, the factors are plain.
inline kron::Projection projection(const kron::Shape& s, const Tensor& x, const Tensor& a, const Tensor& b,
                                   std::optional<Tensor>& bias, const std::optional<Tensor>& packed, void* y) {
    kron::Projection p{factor(a), factor(b), nullptr, nullptr, 0, y};
    if (bias) {
        bias = checked_vector("bias", "(m1 * m2,)", *bias, s.m1 * s.m2, x);
        p.bias = bias->const_data_ptr();
    }
    if (packed && packed->numel() > 0) {
        if (packed->scalar_type() != ScalarType::Byte || packed->dim() != 1 || packed->stride(0) != 1 ||
            !packed->is_cpu())
            fail("packed", "a contiguous uint8 tensor (N,) on the CPU, as kron_pack returns", "another tensor");
        p.packed = packed->const_data_ptr();
        p.packed_bytes = packed->numel();
    }
    return p;
}

}  // namespace kron_torch
