// The middle of a feed-forward block on one panel: left1, bias, activation and left2 on each column by itself.
#pragma once

#include "cpu/product/output.h"
#include "cpu/product/plan.h"

namespace kron {
namespace KRON_ISA {

// The largest left factors of a middle on tiles: (m1, n1) and (p1, m1).
constexpr int64_t kTileContractInputs = 32, kTileContractHidden = 128, kTileContractOutputs = 16;

template <class C>
struct Middle {
    int64_t m1, n1, p1;
    const C* left1;  // (m1, n1) for the kernels below; (S, n1, m1) otherwise
    const C* left2;  // (S, m1, p1)
    const C* bias;   // (m1, bias_step), zero padded
    int64_t bias_step;
    Act act;
    const void *tile_left1, *tile_left2;  // both left factors in the layout of a GEMM on tiles, or null
};

// z rows (t, n1), m rows (t, p1), `lanes` a whole number of vectors; bias from lane `lane` on.
template <class C, class Row>
using ContractActContract = void (*)(const Middle<C>&, int64_t tokens, const C* z, int64_t z_step, int64_t lane,
                                     int64_t lanes, Row* m, int64_t m_step);

// sums[k] += sum_i left2[i, k] act(bias[i] + sum_j left1[i, j] in[j]) for one vector of columns.
template <int N, class Apply>
KRON_INLINE void contract_column(const Middle<float>& mid, const float* bias, const Vf (&in)[N], Vf (&sums)[N],
                                 const Apply& apply) {
    const float *left1 = mid.left1, *left2 = mid.left2;
#pragma GCC unroll 2
    for (int64_t i = 0; i < mid.m1; ++i) {
        Vf h = load<float>(bias + i * mid.bias_step);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) h += in[j] * left1[i * N + j];
        const Vf active = apply(h);
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) sums[k] += active * left2[i * N + k];
    }
}

// The table an activation is computed from: by what its results are rounded to.
template <Activation kKind, class Row>
constexpr bool kRough = __is_same(Row, bf16) && kKind != Activation::silu;

// m[t, k] = sum_i left2[i, k] act(bias[i] + sum_j left1[i, j] z[t, j]) with N = n1 = p1 values each side of the
// activation: a column of 16 lanes goes through in registers. The inputs of its activations are watched together:
// should one be beyond the table, the column is computed again the exact way.
template <Activation kKind, class Row, int N>
static void contract_act_contract(const Middle<float>& mid, int64_t tokens, const float* z, int64_t z_step,
                                  int64_t lane, int64_t lanes, Row* m, int64_t m_step) {
    constexpr int W = Simd<float>::W;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < lanes; c += W) {
            Vf in[N], sums[N] = {};
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) in[j] = load<float>(z + (t * N + j) * z_step + c);
            const float* bias = mid.bias + lane + c;
            const auto exact = [](Vf h) __attribute__((always_inline)) { return activate_exactly<kKind>(h); };
            if constexpr (kHasTable<kKind>) {
                const auto& table = [&]() -> const auto& {
                    if constexpr (kRough<kKind, Row>)
                        return *mid.act.rough;
                    else
                        return *mid.act.tail;
                }();
                Reach reach;
                contract_column(mid, bias, in, sums, [&](Vf h) __attribute__((always_inline)) {
                    reach.meet(table, h);
                    return fitted(table, h);
                });
                if (__builtin_expect(reach.beyond(table), false)) {
#pragma GCC unroll 4
                    for (int k = 0; k < N; ++k) sums[k] = Vf{};
                    contract_column(mid, bias, in, sums, exact);
                }
            } else {
                contract_column(mid, bias, in, sums, exact);
            }
#pragma GCC unroll 4
            for (int k = 0; k < N; ++k) store<float, Row>(m + (t * N + k) * m_step + c, sums[k]);
        }
}

template <class Row, int N>
static ContractActContract<float, Row> pick_contract_act_contract(Activation activation) {
    switch (activation) {
        case Activation::gelu:
            return contract_act_contract<Activation::gelu, Row, N>;
        case Activation::gelu_tanh:
            return contract_act_contract<Activation::gelu_tanh, Row, N>;
        case Activation::relu:
            return contract_act_contract<Activation::relu, Row, N>;
        case Activation::silu:
            return contract_act_contract<Activation::silu, Row, N>;
        case Activation::none:
            break;
    }
    return nullptr;
}

// Null where the middle does not fit the registers: several terms, left factors of unequal or large inner sizes, fp64.
template <class C, class Row>
static ContractActContract<C, Row> pick_contract_act_contract(const FfnPlan& p, Activation activation) {
    if constexpr (__is_same(C, float)) {
        if (p.terms1 != 1 || p.terms2 != 1 || p.n1 != p.p1) return nullptr;
        if (p.n1 == 1) return pick_contract_act_contract<Row, 1>(activation);
        if (p.n1 == 2) return pick_contract_act_contract<Row, 2>(activation);
        if (p.n1 == 4) return pick_contract_act_contract<Row, 4>(activation);
    }
    return nullptr;
}

// bias (m1*m2,) in the caller's layout, or null -> out (m1, step) of the oriented problem, zero padded.
template <class C, class E>
static void oriented_bias(const E* bias, bool commuted, int64_t m1, int64_t m2, C* out, int64_t step) {
    for (int64_t i = 0; i < m1; ++i)
        for (int64_t c = 0; c < step; ++c)
            out[i * step + c] = bias && c < m2 ? get<C, E>(bias + (commuted ? c * m1 + i : i * m2 + c)) : C{};
}

}  // namespace KRON_ISA
}  // namespace kron
