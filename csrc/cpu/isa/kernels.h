// What one instruction-set level offers to the dispatcher.
#pragma once

#include "kron/problem.h"

namespace kron {

struct Kernels {
    void (*forward)(const ForwardArgs&, const Executor&);
    void (*backward)(const BackwardArgs&, const Executor&);
    void (*ffn_forward)(const FfnArgs&, const Executor&);
    bool (*ffn_is_fused)(const Shape& first, const Shape& second, bool packed);
    void (*embedding)(const EmbeddingArgs&, const Executor&);
    int64_t (*packed_bytes)(const Shape&);
    void (*pack)(const Shape&, const Factor& a, const Factor& b, void* out, const Executor&);
    // Elements [from, to): out = act(h), or grad * act'(h) where grad is given; out may be grad.
    void (*activation)(Activation, DType, const void* h, const void* grad, void* out, int64_t from, int64_t to);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

const Kernels& active_kernels();

}  // namespace kron
