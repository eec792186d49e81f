// Feed-forward blocks as chains of products: the backward, and the forward of factors that do not chain. Tokens go
// through in blocks, so that the wide intermediate is a few megabytes whatever the number of tokens.
#include <algorithm>
#include <cstring>

#define KRON_ISA blocks
#define KRON_VEC_BYTES 16
#include "cpu/isa/kernels.h"
#include "cpu/isa/scratch.h"
#include "cpu/isa/simd.h"

namespace kron {
namespace {

constexpr int64_t kBlockBytes = 8 << 20;

char* at(const void* base, int64_t elements, DType dtype) {
    return static_cast<char*>(const_cast<void*>(base)) + elements * size_of(dtype);
}

int64_t block_tokens(const Shape& first) {
    const int64_t bytes = first.m1 * first.m2 * size_of(first.dtype);
    return std::min(first.tokens, std::max<int64_t>(64, kBlockBytes / bytes));
}

Shape with_tokens(Shape shape, int64_t tokens) {
    shape.tokens = tokens;
    return shape;
}

// x (tokens, ...) through one pair.
void product(const Shape& shape, const void* x, int64_t x_stride, const Projection& w, void* y, Activation activation,
             const NormArgs& norm, const Executor& executor) {
    Projection projection = w;
    projection.y = y;
    kron_matmul_forward(ForwardArgs{shape, x, x_stride, 1, &projection, activation, norm}, executor);
}

// Elementwise over all threads: see Kernels::activation.
void activation(Activation kind, DType dtype, const void* h, const void* grad, void* out, int64_t count,
                const Executor& executor) {
    struct Job {
        Activation kind;
        DType dtype;
        const void *h, *grad;
        void* out;
        int64_t count, tasks;
    } job{kind, dtype, h, grad, out, count, executor.threads};
    executor.run(
        job.tasks,
        [](void* arg, int64_t i) {
            const Job& j = *static_cast<const Job*>(arg);
            // Shares of whole cache lines.
            const int64_t lines = (j.count + 63) / 64;
            const int64_t from = lines * i / j.tasks * 64, to = std::min(j.count, lines * (i + 1) / j.tasks * 64);
            if (from < to) active_kernels().activation(j.kind, j.dtype, j.h, j.grad, j.out, from, to);
        },
        &job);
}

// A gradient of a factor, summed over the blocks in the compute type; the only block's goes straight to its place.
struct Sum {
    void* out;
    int64_t count;
    char *part, *total;

    template <class C, class E>
    void add(bool first, bool last) const {
        C* sums = reinterpret_cast<C*>(total);
        const E* values = reinterpret_cast<const E*>(part);
        for (int64_t i = 0; i < count; ++i) {
            sums[i] = (first ? C{} : sums[i]) + blocks::get<C, E>(values + i);
            if (last) blocks::put<C, E>(static_cast<E*>(out) + i, sums[i]);
        }
    }
    void add(DType dtype, bool first, bool last) const {
        if (!out) return;
        switch (dtype) {
            case DType::f32:
                return add<float, float>(first, last);
            case DType::f64:
                return add<double, double>(first, last);
            case DType::bf16:
                return add<float, blocks::bf16>(first, last);
            case DType::f16:
                return add<float, blocks::f16>(first, last);
        }
    }
};

// Each product by itself.
void unfused(const FfnArgs& args, const Executor& executor) {
    const DType dtype = args.first.dtype;
    const int64_t block = block_tokens(args.first), middle = args.first.m1 * args.first.m2;
    const int64_t outputs = args.second.m1 * args.second.m2;
    void* hidden = scratch(ScratchSlot::block, static_cast<size_t>(block * middle * size_of(dtype)));
    for (int64_t t = 0; t < args.first.tokens; t += block) {
        const int64_t tokens = std::min(block, args.first.tokens - t);
        product(with_tokens(args.first, tokens), at(args.x, t * args.x_stride, dtype), args.x_stride, args.w1, hidden,
                args.activation, NormArgs{}, executor);
        NormArgs norm = args.norm;
        if (norm.residual) norm.residual = at(norm.residual, t * norm.residual_stride, dtype);
        product(with_tokens(args.second, tokens), hidden, middle, args.w2, at(args.w2.y, t * outputs, dtype),
                Activation::none, norm, executor);
    }
}

}  // namespace

void kron_ffn_forward(const FfnArgs& args, const Executor& executor) {
    if (args.first.tokens == 0) return;
    if (kron_ffn_is_fused(args.first, args.second, args.w1.packed || args.w2.packed))
        active_kernels().ffn_forward(args, executor);
    else
        unfused(args, executor);
}

void kron_ffn_backward(const FfnBackwardArgs& args, const Executor& executor) {
    const Shape &first = args.first, &second = args.second;
    const DType dtype = first.dtype;
    const int64_t block = block_tokens(first), middle = first.m1 * first.m2, inputs = first.n1 * first.n2;
    const int64_t wide = block * middle * size_of(dtype);
    Sum sums[6] = {{args.da1, first.terms * first.m1 * first.n1, nullptr, nullptr},
                   {args.db1, first.terms * first.m2 * first.n2, nullptr, nullptr},
                   {args.dbias1, middle, nullptr, nullptr},
                   {args.da2, second.terms * second.m1 * second.n1, nullptr, nullptr},
                   {args.db2, second.terms * second.m2 * second.n2, nullptr, nullptr},
                   {args.dbias2, second.m1 * second.m2, nullptr, nullptr}};
    const bool one_block = block == first.tokens;
    char *hidden = nullptr, *active = nullptr, *grad = nullptr;
    const auto carve = [&](Carver& c) {
        hidden = c.take<char>(wide), active = c.take<char>(wide), grad = c.take<char>(wide);
        for (Sum& sum : sums) {
            sum.part = static_cast<char*>(sum.out);
            if (!sum.out || one_block) continue;
            sum.part = c.take<char>(sum.count * size_of(dtype));
            sum.total = c.take<char>(sum.count * 8);
        }
    };
    Carver count(nullptr);
    carve(count);
    Carver carver(scratch(ScratchSlot::block, count.used()));
    carve(carver);
    const Projection w1{args.a1, args.b1, args.bias1, nullptr, 0, nullptr};
    for (int64_t t = 0; t < first.tokens; t += block) {
        const int64_t tokens = std::min(block, first.tokens - t);
        const Shape shape1 = with_tokens(first, tokens), shape2 = with_tokens(second, tokens);
        const void* x = at(args.x, t * args.x_stride, dtype);
        product(shape1, x, args.x_stride, w1, hidden, Activation::none, NormArgs{}, executor);
        activation(args.activation, dtype, hidden, nullptr, active, tokens * middle, executor);
        kron_matmul_backward(BackwardArgs{shape2, at(args.grad, t * args.grad_stride, dtype), args.grad_stride, active,
                                          middle, args.a2, args.b2, grad, sums[3].part, sums[4].part, sums[5].part},
                             executor);
        activation(args.activation, dtype, hidden, grad, grad, tokens * middle, executor);
        kron_matmul_backward(
            BackwardArgs{shape1, grad, middle, x, args.x_stride, args.a1, args.b1,
                         args.dx ? at(args.dx, t * inputs, dtype) : nullptr, sums[0].part, sums[1].part, sums[2].part},
            executor);
        if (one_block) return;
        for (const Sum& sum : sums) sum.add(dtype, t == 0, t + tokens == first.tokens);
    }
}

}  // namespace kron
