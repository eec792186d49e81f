// The right factor's GEMM on AMX: rows and panels in bf16, sums in fp32. Same interface as VectorGemm (factors.h).
#pragma once

#include "cpu/ffn/amx_contract.h"
#include "cpu/gemm/amx_tiles.h"
#include "cpu/gemm/gemm.h"

namespace kron {
namespace KRON_ISA {

struct AmxGemm {
    typedef bf16 Row;
    static constexpr bool kTileContract = true;
    static constexpr int64_t kRowBlock = 16;  // results and rows come in whole tiles of this many rows
    static constexpr int64_t kLanes = 32;     // two tiles side by side
    static constexpr int kPanelVectors = static_cast<int>(kLanes / Simd<float>::W);
    static int64_t depth(int64_t n) { return (n + 31) / 32 * 32; }
    static int64_t panel_size(int64_t n, int) { return depth(n) * kLanes; }
    static void begin() { tiles_begin(); }
    static void end() { tiles_end(); }

    // M (lanes, depth) with strides -> out[k / 2][lane][k % 2], zeros beyond the lanes and the depth.
    template <class E>
    static void pack(const E* M, int64_t lane_step, int64_t k_step, int64_t lanes, int64_t n, int, bf16* out) {
        typedef float Pairs __attribute__((vector_size(KRON_VEC_BYTES), aligned(2), may_alias));
        constexpr int W = Simd<float>::W;
        const int64_t padded_depth = depth(n);
        for (int64_t first = 0; first < kLanes; first += W) {
            int64_t k = 0;
            if (k_step == 1 && first + W <= lanes)
                // A transpose of pairs: W lanes of 2W consecutive elements.
                for (; k + 2 * W <= n; k += 2 * W) {
                    Vec<float> block[W];
#pragma GCC unroll 16
                    for (int l = 0; l < W; ++l)
                        block[l] = *reinterpret_cast<const Pairs*>(M + (first + l) * lane_step + k);
                    interleave<float, W>(block);
#pragma GCC unroll 16
                    for (int p = 0; p < W; ++p)
                        *reinterpret_cast<Pairs*>(out + ((k / 2 + p) * kLanes + first) * 2) = block[p];
                }
            for (; k < padded_depth; ++k)
                for (int64_t l = first; l < first + W; ++l)
                    out[(k / 2 * kLanes + l) * 2 + k % 2] =
                        k < n && l < lanes ? M[l * lane_step + k * k_step] : bf16{0};
        }
    }

    static ContractActContract<float, bf16> pick_contract(const FfnPlan& p, Activation activation) {
        return pick_contract_on_tiles(p, activation);
    }
    static void contract_lefts(const Middle<float>& middle, bf16* left1, bf16* left2) {
        tile_lefts(middle, left1, left2);
    }

    // out (rows rounded up to kRowBlock, 32) = [out +] R (same rows, depth) panel.
    static void multiply(int64_t rows, int64_t n, const bf16* R, int64_t step, const bf16* panel, int64_t, int,
                         float* out, int64_t out_step, Start<float> start, Ahead*) {
        for (int64_t r = 0; r < rows; r += 32) {
            const bf16* R0 = R + r * step;
            float* to = out + r * out_step;
            if (r + kRowBlock < rows)
                block<true>(depth(n), R0, step, panel, to, out_step, start.accumulate);
            else
                block<false>(depth(n), R0, step, panel, to, out_step, start.accumulate);
        }
    }

    // Tiles 0-3: sums (2 x 2), 4-5: rows, 6-7: panel.
    template <bool kTwo>
    static void block(int64_t padded_depth, const bf16* R, int64_t step, const bf16* panel, float* out,
                      int64_t out_step, bool accumulate) {
        const int64_t out_bytes = out_step * 4, row_bytes = step * 2, panel_bytes = kLanes * 4;
        if (accumulate) {
            tile_load<0>(out, out_bytes);
            tile_load<1>(out + 16, out_bytes);
            if constexpr (kTwo) tile_load<2>(out + 16 * out_step, out_bytes);
            if constexpr (kTwo) tile_load<3>(out + 16 * out_step + 16, out_bytes);
        } else {
            tile_zero<0>(), tile_zero<1>();
            if constexpr (kTwo) tile_zero<2>(), tile_zero<3>();
        }
        for (int64_t k = 0; k < padded_depth; k += 32) {
            tile_load<4>(R + k, row_bytes);
            tile_load<6>(panel + k * kLanes, panel_bytes);
            tile_load<7>(panel + k * kLanes + 32, panel_bytes);
            tile_dot<0, 4, 6>();
            tile_dot<1, 4, 7>();
            if constexpr (kTwo) {
                tile_load<5>(R + 16 * step + k, row_bytes);
                tile_dot<2, 5, 6>();
                tile_dot<3, 5, 7>();
            }
        }
        tile_store<0>(out, out_bytes);
        tile_store<1>(out + 16, out_bytes);
        if constexpr (kTwo) tile_store<2>(out + 16 * out_step, out_bytes);
        if constexpr (kTwo) tile_store<3>(out + 16 * out_step + 16, out_bytes);
    }
};

}  // namespace KRON_ISA
}  // namespace kron
