// A tiny factor fused with the transpose of a commuted plan: its product is formed between the shuffles and the store.
#pragma once

#include "cpu/product/stages.h"

namespace kron {
namespace KRON_ISA {

// The tiny factor in the kernels' form: (S, n1, m1), consecutive outputs neighbours.
template <class C>
struct Contraction {
    const C* factor;
    int64_t terms, m1, n1;
};

// x tokens of (cols, Q), Q = n1 -> out[t, i] (cols lanes) at column s * out_term: sum_q factor[s, q, i] x[., q].
template <class C, class E, class O, int Q>
static void split_contract(const E* x, int64_t x_stride, int64_t tokens, int64_t cols, Contraction<C> contract, O* out,
                           int64_t out_step, int64_t out_term) {
    constexpr int W = Simd<C>::W;
    for (int64_t t = 0; t < tokens; ++t) {
        const E* src = x + t * x_stride;
        for (int64_t c = 0; c < cols; c += W) {
            Vec<C> v[Q];
            load_columns<C, E, Q>(src, c, cols, v);
            const C* f = contract.factor;
            for (int64_t s = 0; s < contract.terms; ++s, f += Q * contract.m1) {
                O* dst = out + t * contract.m1 * out_step + s * out_term + c;
                for (int64_t i = 0; i < contract.m1; ++i) {
                    // Two chains: one of Q dependent additions would wait on itself.
                    Vec<C> even = v[0] * f[i], odd{};
#pragma GCC unroll 16
                    for (int q = 1; q < Q; ++q) (q % 2 ? odd : even) += v[q] * f[q * contract.m1 + i];
                    store<C, O>(dst + i * out_step, even + odd);
                }
            }
        }
    }
}

// in[t, k] (cols lanes) at column s * in_term -> y tokens of (cols, Q), Q = m1:
// y[., q] = finish(sum_{s,k} factor[s, k, q] in[t, k] at s).
template <class C, class E, int Q>
static void contract_merge(const C* in, int64_t in_step, int64_t in_term, int64_t tokens, int64_t cols,
                           Contraction<C> contract, E* y, int64_t y_stride, Finish<C, E> finish, int64_t at) {
    constexpr int W = Simd<C>::W;
    for (int64_t t = 0; t < tokens; ++t) {
        E* dst = y + t * y_stride;
        for (int64_t c = 0; c < cols; c += W) {
            Vec<C> v[Q] = {};
            const C* f = contract.factor;
            for (int64_t s = 0; s < contract.terms; ++s)
                for (int64_t k = 0; k < contract.n1; ++k, f += Q) {
                    const Vec<C> z = load<C>(in + (t * contract.n1 + k) * in_step + s * in_term + c);
#pragma GCC unroll 16
                    for (int q = 0; q < Q; ++q) v[q] += z * f[q];
                }
            store_columns<C, E, Q>(v, c, cols, dst, finish, at);
        }
    }
}

template <class C, class E, class O>
using SplitContract = void (*)(const E*, int64_t, int64_t, int64_t, Contraction<C>, O*, int64_t, int64_t);
template <class C, class E>
using ContractMerge = void (*)(const C*, int64_t, int64_t, int64_t, int64_t, Contraction<C>, E*, int64_t, Finish<C, E>,
                               int64_t);

// Null for a width that is not 1, 2, 4, 8 or 16 and for a dtype without shuffles: then the transpose and the product
// are separate passes.
template <class C, class E, class O>
static SplitContract<C, E, O> pick_split_contract(int64_t width) {
    if constexpr (kShuffles<C, E>) {
        switch (width) {
            case 1:
                return split_contract<C, E, O, 1>;
            case 2:
                return split_contract<C, E, O, 2>;
            case 4:
                return split_contract<C, E, O, 4>;
            case 8:
                return split_contract<C, E, O, 8>;
            case 16:
                return split_contract<C, E, O, 16>;
        }
    }
    return nullptr;
}

template <class C, class E>
static ContractMerge<C, E> pick_contract_merge(int64_t width) {
    if constexpr (kShuffles<C, E>) {
        switch (width) {
            case 1:
                return contract_merge<C, E, 1>;
            case 2:
                return contract_merge<C, E, 2>;
            case 4:
                return contract_merge<C, E, 4>;
            case 8:
                return contract_merge<C, E, 8>;
            case 16:
                return contract_merge<C, E, 16>;
        }
    }
    return nullptr;
}

}  // namespace KRON_ISA
}  // namespace kron
