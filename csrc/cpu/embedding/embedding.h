// Rows of a Kronecker-factored table: gather, expand, add rows of other tables, norm.
#pragma once

#include "cpu/isa/scratch.h"
#include "cpu/product/output.h"

namespace kron {
namespace KRON_ISA {

template <class C, class E>
struct Embedding {
    EmbeddingArgs args;
    int64_t tokens_a_task;
    C* b;  // (S, k), then per term k repeated to a vector where a vector holds whole repeats

    static constexpr int W = Simd<C>::W;
    int64_t size() const { return args.p * args.k; }
    bool repeats() const { return args.k <= W && W % args.k == 0; }
    int64_t b_step() const { return repeats() ? W : args.k; }

    void load_b() {
        const E* data = static_cast<const E*>(args.b.data);
        for (int64_t s = 0; s < args.terms; ++s)
            for (int64_t l = 0; l < b_step(); ++l)
                b[s * b_step() + l] = get<C, E>(data + s * args.b.stride_term + l % args.k * args.b.stride_col);
    }

    // row [+]= A_s[id] (x) B_s; row padded to whole vectors.
    void expand(int64_t s, int64_t id, C* row, C* values) const {
        const E* a = static_cast<const E*>(args.a.data) + s * args.a.stride_term + id * args.a.stride_row;
        const C* factor = b + s * b_step();
        for (int64_t c = 0; c < args.p; ++c) values[c] = get<C, E>(a + c * args.a.stride_col);
        for (int64_t c = args.p; c < args.p + W; ++c) values[c] = 0;  // read, and never used
        if (repeats()) {
            // One vector of output holds W / k of a's values, each k times.
            const Vec<C> bs = load<C>(factor);
            const int64_t held = W / args.k;
            auto lane = iota<C>();
            for (int l = 0; l < W; ++l) lane[l] = static_cast<int>(l / args.k);
            for (int64_t c = 0, at = 0; c < args.p; c += held, at += W) {
                const Vec<C> product = __builtin_shuffle(load<C>(values + c), lane) * bs;
                store<C>(row + at, s ? load<C>(row + at) + product : product);
            }
        } else {
            for (int64_t c = 0; c < args.p; ++c)
                for (int64_t l = 0; l < args.k; ++l) {
                    C& to = row[c * args.k + l];
                    to = (s ? to : 0) + values[c] * factor[l];
                }
        }
    }

    void run(int64_t index) const {
        const int64_t first = index * tokens_a_task;
        const int64_t last = args.tokens - first < tokens_a_task ? args.tokens : first + tokens_a_task;
        const int64_t width = padded<C>(size());
        C* row = static_cast<C*>(scratch(ScratchSlot::task, static_cast<size_t>(width + args.p + W) * sizeof(C)));
        for (int64_t t = first; t < last; ++t) {
            for (int64_t s = 0; s < args.terms; ++s) expand(s, args.ids[t], row, row + width);
            for (const AddedRows& added : args.added)
                if (added.weight) add(static_cast<const E*>(added.weight) + added.ids[t] * size(), row);
            E* y = static_cast<E*>(args.y) + t * size();
            if (args.norm_weight)
                norm_row<C, E>(row, size(), static_cast<const E*>(args.norm_weight),
                               static_cast<const E*>(args.norm_bias), static_cast<C>(args.eps), y);
            else
                finish_rows<C, E>(row, 0, 1, size(), y, 0, Finish<C, E>{nullptr, Act{}}, 0, 0, 1);
        }
    }

    void add(const E* other, C* row) const {
        int64_t c = 0;
        for (; c + W <= size(); c += W) store<C>(row + c, load<C>(row + c) + load<C, E>(other + c));
        for (; c < size(); ++c) row[c] += get<C, E>(other + c);
    }
};

template <class C, class E>
static void embedding(const EmbeddingArgs& args, const Executor& executor) {
    Embedding<C, E> e{args, 0, nullptr};
    Carver carver(scratch(ScratchSlot::call, static_cast<size_t>(args.terms * e.b_step()) * sizeof(C)));
    e.b = carver.take<C>(args.terms * e.b_step());
    e.load_b();
    // Fewer tokens than these are done before another thread has started.
    constexpr int64_t kLeast = 16;
    const int64_t share = (args.tokens + executor.threads - 1) / executor.threads;
    e.tokens_a_task = share < kLeast ? kLeast : share;
    const int64_t tasks = (args.tokens + e.tokens_a_task - 1) / e.tokens_a_task;
    const auto task = [](void* arg, int64_t i) { static_cast<const Embedding<C, E>*>(arg)->run(i); };
    if (tasks == 1) return task(&e, 0);
    executor.run(tasks, task, &e);
}

}  // namespace KRON_ISA
}  // namespace kron
