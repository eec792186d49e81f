// Instantiates the kernels for every dtype at the level of the including file.
#pragma once

#include "cpu/embedding/embedding.h"
#include "cpu/ffn/ffn.h"
#include "cpu/isa/kernels.h"
#include "cpu/product/activation_grad.h"
#include "cpu/product/backward.h"
#include "cpu/product/forward.h"

namespace kron {
namespace KRON_ISA {

template <class Compute, class Stored>
struct Types {
    typedef Compute C;
    typedef Stored E;
};

// Calls f with the types of a dtype: fp16 and bf16 compute in fp32.
template <class F>
static auto by_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f64:
            return f(Types<double, double>{});
        case DType::bf16:
            return f(Types<float, bf16>{});
        case DType::f16:
            return f(Types<float, f16>{});
        case DType::f32:
            break;
    }
    return f(Types<float, float>{});
}

static void forward_entry(const ForwardArgs& args, const Executor& executor) {
    by_dtype(args.shape.dtype, [&](auto types) {
        typedef decltype(types) T;
        forward<typename T::C, typename T::E>(args, executor);
    });
}

static void backward_entry(const BackwardArgs& args, const Executor& executor) {
    by_dtype(args.shape.dtype, [&](auto types) {
        typedef decltype(types) T;
        backward<typename T::C, typename T::E>(args, executor);
    });
}

static void ffn_entry(const FfnArgs& args, const Executor& executor) {
    by_dtype(args.first.dtype, [&](auto types) {
        typedef decltype(types) T;
        ffn_forward<typename T::C, typename T::E>(args, executor);
    });
}

static bool ffn_is_fused_entry(const Shape& first, const Shape& second, bool packed) {
    return by_dtype(first.dtype, [&](auto types) {
        typedef decltype(types) T;
        return ffn_is_fused<typename T::C, typename T::E>(first, second, packed);
    });
}

static void embedding_entry(const EmbeddingArgs& args, const Executor& executor) {
    by_dtype(args.dtype, [&](auto types) {
        typedef decltype(types) T;
        embedding<typename T::C, typename T::E>(args, executor);
    });
}

static int64_t packed_bytes_entry(const Shape& shape) {
    return by_dtype(shape.dtype, [&](auto types) {
        typedef decltype(types) T;
        return Packing<typename T::C, typename T::E>(shape, Factor{}, Factor{}).bytes();
    });
}

static void pack_entry(const Shape& shape, const Factor& a, const Factor& b, void* out, const Executor& executor) {
    by_dtype(shape.dtype, [&](auto types) {
        typedef decltype(types) T;
        Packing<typename T::C, typename T::E>(shape, a, b).pack(shape, out, executor);
    });
}

static void activation_entry(Activation kind, DType dtype, const void* h, const void* grad, void* out, int64_t from,
                             int64_t to) {
    by_dtype(dtype, [&](auto types) {
        typedef typename decltype(types)::E E;
        activation_range<E>(kind, static_cast<const E*>(h), static_cast<const E*>(grad), static_cast<E*>(out), from,
                            to);
    });
}

constexpr Kernels kKernels{forward_entry,   backward_entry,     ffn_entry,  ffn_is_fused_entry,
                           embedding_entry, packed_bytes_entry, pack_entry, activation_entry};

}  // namespace KRON_ISA
}  // namespace kron
