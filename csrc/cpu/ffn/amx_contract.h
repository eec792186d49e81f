// The middle of a feed-forward block whose left factors are too large for registers, on AMX tiles: both contractions
// are products of small matrices, (m1, n1) and (p1, m1), with a token's rows, 16 columns at a time.
#pragma once

#include "cpu/ffn/ffn_contract.h"
#include "cpu/gemm/amx_tiles.h"

namespace kron {
namespace KRON_ISA {

// Row pair k of a panel: lane l holds the bf16 of low[l], then that of high[l].
KRON_INLINE Vi bf16_pairs(Vf low, Vf high) {
#if defined(__AVX512BF16__)
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Whole __attribute__((vector_size(64)));
    const Whole lows = __builtin_convertvector((Half)_mm512_cvtneps_pbh((__m512)low), Whole);
    const Whole highs = __builtin_convertvector((Half)_mm512_cvtneps_pbh((__m512)high), Whole);
    return (Vi)(lows | highs << 16);
#else
    Vi pairs;
    for (int l = 0; l < Simd<float>::W; ++l)
        pairs[l] = static_cast<int32_t>(to_bf16(low[l]).bits | static_cast<uint32_t>(to_bf16(high[l]).bits) << 16);
    return pairs;
#endif
}

// left1 (m1, n1) -> (m1, 32), left2 (m1, p1) -> its transpose (16, m1), both bf16 and zero padded.
static void tile_lefts(const Middle<float>& mid, bf16* left1, bf16* left2) {
    for (int64_t i = 0; i < mid.m1; ++i) {
        for (int64_t j = 0; j < kTileContractInputs; ++j)
            left1[i * kTileContractInputs + j] = j < mid.n1 ? to_bf16(mid.left1[i * mid.n1 + j]) : bf16{0};
        for (int64_t k = 0; k < kTileContractOutputs; ++k)
            left2[k * mid.m1 + i] = k < mid.p1 ? to_bf16(mid.left2[i * mid.p1 + k]) : bf16{0};
    }
}

// Activates the rows h (m1, 16) and pairs them up: (m1 / 2, 16, 2). Returns whether an input was beyond the table.
template <Activation kKind, bool kExact>
static bool activate_pairs(const Act& act, int64_t m1, const float* h, int32_t* pairs) {
    constexpr int W = Simd<float>::W;
    constexpr bool kTable = !kExact && kHasTable<kKind> && kKind != Activation::silu;
    Reach reach;
    for (int64_t i = 0; i < m1; i += 2)
        for (int64_t c = 0; c < 16; c += W) {
            const Vf low = load<float>(h + i * 16 + c), high = load<float>(h + (i + 1) * 16 + c);
            Vi pair;
            if constexpr (kTable) {
                reach.meet(*act.rough, low);
                reach.meet(*act.rough, high);
                pair = bf16_pairs(fitted(*act.rough, low), fitted(*act.rough, high));
            } else {
                pair = bf16_pairs(activate<kKind>(act, low), activate<kKind>(act, high));
            }
            memcpy(pairs + i / 2 * 16 + c, &pair, sizeof pair);
        }
    if constexpr (kTable) return reach.beyond(*act.rough);
    return false;
}

// A few blocks of 16 columns go through each step together: a step alone would wait for its own stores.
constexpr int kContractBlocks = 3;
struct ContractBlock {
    alignas(64) int32_t in[kTileContractInputs / 2 * 16];
    float h[kTileContractHidden * 16];
    int32_t pairs[kTileContractHidden / 2 * 16];
    float out[kTileContractOutputs * 16];
};

// See ContractActContract (ffn_contract.h). Tiles 0, 1: sums; 4, 5: rows of a left factor; 6: columns.
template <Activation kKind>
static void contract_on_tiles(const Middle<float>& mid, int64_t tokens, const float* z, int64_t z_step, int64_t lane,
                              int64_t lanes, bf16* m, int64_t m_step) {
    constexpr int W = Simd<float>::W;
    ContractBlock blocks[kContractBlocks];
    for (ContractBlock& block : blocks) memset(block.in, 0, sizeof block.in);
    const bf16 *left1 = static_cast<const bf16*>(mid.tile_left1), *left2 = static_cast<const bf16*>(mid.tile_left2);
    const int64_t bias_bytes = mid.bias_step * 4, left2_bytes = mid.m1 * 2;
    const int64_t across = (lanes + 15) / 16, all = tokens * across;
    for (int64_t from = 0; from < all; from += kContractBlocks) {
        const int here = static_cast<int>(all - from < kContractBlocks ? all - from : kContractBlocks);
        for (int u = 0; u < here; ++u) {
            const float* rows = z + (from + u) / across * mid.n1 * z_step + (from + u) % across * 16;
            for (int64_t j = 0; j < mid.n1; j += 2)
                for (int64_t l = 0; l < 16; l += W) {
                    const Vf low = load<float>(rows + j * z_step + l);
                    const Vi pair = bf16_pairs(low, j + 1 < mid.n1 ? load<float>(rows + (j + 1) * z_step + l) : Vf{});
                    memcpy(blocks[u].in + j / 2 * 16 + l, &pair, sizeof pair);
                }
        }
        for (int64_t i = 0; i < mid.m1; i += 32) {
            tile_load<4>(left1 + i * kTileContractInputs, kTileContractInputs * 2);
            tile_load<5>(left1 + (i + 16) * kTileContractInputs, kTileContractInputs * 2);
            for (int u = 0; u < here; ++u) {
                const float* bias = mid.bias + i * mid.bias_step + lane + (from + u) % across * 16;
                tile_load<6>(blocks[u].in, 64);
                tile_load<0>(bias, bias_bytes);
                tile_load<1>(bias + 16 * mid.bias_step, bias_bytes);
                tile_dot<0, 4, 6>();
                tile_dot<1, 5, 6>();
                tile_store<0>(blocks[u].h + i * 16, 64);
                tile_store<1>(blocks[u].h + (i + 16) * 16, 64);
            }
        }
        for (int u = 0; u < here; ++u)
            if (activate_pairs<kKind, false>(mid.act, mid.m1, blocks[u].h, blocks[u].pairs))
                activate_pairs<kKind, true>(mid.act, mid.m1, blocks[u].h, blocks[u].pairs);
        for (int u = 0; u < here; ++u) {
            tile_zero<0>();
            for (int64_t i = 0; i < mid.m1; i += 32) {
                tile_load<4>(left2 + i, left2_bytes);
                tile_load<6>(blocks[u].pairs + i / 2 * 16, 64);
                tile_dot<0, 4, 6>();
            }
            tile_store<0>(blocks[u].out, 64);
        }
        for (int u = 0; u < here; ++u) {
            bf16* to = m + (from + u) / across * mid.p1 * m_step + (from + u) % across * 16;
            for (int64_t k = 0; k < mid.p1; ++k)
                for (int64_t l = 0; l < 16; l += W)
                    store<float, bf16>(to + k * m_step + l, load<float>(blocks[u].out + k * 16 + l));
        }
    }
}

// Null where the left factors do not fit, or are too small to be worth it.
static ContractActContract<float, bf16> pick_contract_on_tiles(const FfnPlan& p, Activation activation) {
    if (p.terms1 != 1 || p.terms2 != 1 || p.n1 < 4 || p.n1 > kTileContractInputs || p.p1 > kTileContractOutputs ||
        p.m1 > kTileContractHidden || p.m1 % 32 != 0)
        return nullptr;
    switch (activation) {
        case Activation::gelu:
            return contract_on_tiles<Activation::gelu>;
        case Activation::gelu_tanh:
            return contract_on_tiles<Activation::gelu_tanh>;
        case Activation::relu:
            return contract_on_tiles<Activation::relu>;
        case Activation::silu:
            return contract_on_tiles<Activation::silu>;
        case Activation::none:
            break;
    }
    return nullptr;
}

}  // namespace KRON_ISA
}  // namespace kron
