// The large factor's gradient: a GEMM over the tokens' rows of two tensors of tokens, one of them as it is and the
// other contracted with the tiny factor while it is loaded,
//   sums[i][j] = sum_t sum_r plain_r[t, i] (sum_c C[r, c] contracted_c[t, j])
// split over the tokens. A block of four warps has 128 x 64 of the result and goes through its tokens 64 rows at a time
// (32 of floats), in two buffers: some warps fill the next while others still multiply the one before.
#pragma once

#include "cuda/common/mma.h"
#include "cuda/matmul/matmul_params.h"
#include "cuda/matmul/matmul_rows.cuh"

namespace kron {
namespace cuda {

constexpr int kGradPlain = kLargeGradPlain, kGradContracted = kLargeGradContracted, kGradThreads = 128;
template <class T>
constexpr int kGradRows = large_grad_rows(sizeof(T));

// Eight rows of 16 bytes, or four rows of eight floats, lie in different banks.
template <class T>
constexpr int kGradPad = sizeof(T) == 4 ? 32 : 16;
template <class T>
constexpr int kPlainPitch = kGradPlain * int(sizeof(T)) + kGradPad<T>;
template <class T>
constexpr int kContractedPitch = kGradContracted * int(sizeof(T)) + kGradPad<T>;
template <class T>
constexpr int kGradBuffer = kGradRows<T> * (kPlainPitch<T> + kContractedPitch<T>);

KRON_BOTH int grad_weight_bytes(const LargeGradParams& p, int group) {
    return (p.halves * p.parts * group * 4 + 15) / 16 * 16;
}

// Operands whose inner dimension, the rows, runs down the tile: a 16 columns of it, b 8 columns.
template <class T>
KRON_DEVICE void load_down(uint32_t (&a)[4][4], uint32_t (&b)[4][2], const char* plain, const char* contracted) {
    const int lane = thread_index() % 32;
    if constexpr (sizeof(T) == 4) {
        const char* a_row = plain + lane % 4 * kPlainPitch<T> + lane / 4 * 4;
        const char* b_row = contracted + lane % 4 * kContractedPitch<T> + lane / 4 * 4;
        KRON_UNROLL for (int i = 0; i < 4; ++i) {
            KRON_UNROLL for (int r = 0; r < 4; ++r) {
                a[i][r] =
                    *reinterpret_cast<const uint32_t*>(a_row + r / 2 * 4 * kPlainPitch<T> + (i * 16 + r % 2 * 8) * 4);
                if (r < 2)
                    b[i][r] = *reinterpret_cast<const uint32_t*>(b_row + r * 4 * kContractedPitch<T> + i * 8 * 4);
            }
        }
    } else {
        const char* a_row = plain + (lane / 16 * 8 + lane % 8) * kPlainPitch<T> + lane / 8 % 2 * 16;
        const char* b_row = contracted + (lane / 8 % 2 * 8 + lane % 8) * kContractedPitch<T> + lane / 16 * 16;
        KRON_UNROLL for (int i = 0; i < 4; ++i) ldmatrix_transposed(a[i], a_row + i * 32);
        KRON_UNROLL for (int j = 0; j < 4; j += 2) {
            uint32_t pair[4];
            ldmatrix_transposed(pair, b_row + j * 16);
            KRON_UNROLL for (int r = 0; r < 4; ++r) b[j + r / 2][r % 2] = pair[r];
        }
    }
}

template <class T, int G>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(kGradThreads, G >= 4 ? 2 : 3) matmul_large_grad(const LargeGradParams p) {
    const int tile = block_x() % (p.plain_tiles * p.contracted_tiles),
              term = block_x() / (p.plain_tiles * p.contracted_tiles);
    const int first_plain = tile / p.contracted_tiles * kGradPlain,
              first_contracted = tile % p.contracted_tiles * kGradContracted;
    float* weights = reinterpret_cast<float*>(shared_memory());
    char* buffers = shared_memory() + grad_weight_bytes(p, G);
    KRON_NO_UNROLL for (int i = thread_index(); i < p.halves * p.parts * G; i += kGradThreads) {
        const int row = i / G / p.parts * 8 + i % G, part = i / G % p.parts;
        const T* tiny = static_cast<const T*>(p.tiny) + term * p.tiny_term;
        weights[i] = row < p.rows ? to_float(tiny[row * p.tiny_row + part * p.tiny_col]) : 0.0f;
    }
    sync_threads();

    const int64_t count = p.tokens * p.halves, first = block_y() * p.split_tokens;
    const int64_t last = first + p.split_tokens < count ? first + p.split_tokens : count;
    const Tokens<T> plain{
        static_cast<const T*>(p.plain), p.plain_stride, last, p.halves, p.rows, p.plain_width, p.right, p.plain_vector};
    const Tokens<T> contracted{static_cast<const T*>(p.contracted),
                               p.contracted_stride,
                               last,
                               p.halves,
                               p.parts,
                               p.contracted_width,
                               p.right,
                               p.contracted_vector};
    const Weights<G>* contract = reinterpret_cast<const Weights<G>*>(weights);
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int warp_plain = warp / 2 * 64, warp_contracted = warp % 2 * 32;
    constexpr int kTokens = kGradRows<T> / G, kStepRows = 32 / int(sizeof(T)), kAll = 1 << 30;

    float acc[4][4][4] = {};
    int buffer = 0;
    KRON_NO_UNROLL for (int64_t token = first; token < last; token += kTokens) {
        char* plain_rows = buffers + buffer * kGradBuffer<T>;
        char* contracted_rows = plain_rows + kGradRows<T> * kPlainPitch<T>;
        const RowFiller<T, G, false, false> fill_plain(plain, contract, 1, kAll, plain_rows, kPlainPitch<T>);
        const RowFiller<T, G, true, false> fill_contracted(contracted, contract, 1, kAll, contracted_rows,
                                                           kContractedPitch<T>);
        fill_plain.fill(token, kTokens, first_plain, kGradPlain);
        fill_contracted.fill(token, kTokens, first_contracted, kGradContracted);
        sync_threads();  // also: the other buffer, filled next, is no longer read
        KRON_UNROLL for (int row = 0; row < kGradRows<T>; row += kStepRows) {
            uint32_t a[4][4], b[4][2];
            load_down<T>(a, b, plain_rows + row * kPlainPitch<T> + warp_plain * int(sizeof(T)),
                         contracted_rows + row * kContractedPitch<T> + warp_contracted * int(sizeof(T)));
            KRON_UNROLL for (int i = 0; i < 4; ++i) {
                KRON_UNROLL for (int j = 0; j < 4; ++j) mma_sync<T>(acc[i][j], a[i], b[j]);
            }
        }
        buffer ^= 1;
    }

    float* sums = p.sums + (int64_t(block_y()) * p.terms + term) * p.plain_width * p.contracted_width;
    KRON_UNROLL for (int i = 0; i < 4; ++i) {
        KRON_UNROLL for (int e = 0; e < 4; ++e) {
            const int row = first_plain + warp_plain + i * 16 + e / 2 * 8 + lane / 4;
            KRON_UNROLL for (int j = 0; j < 4; ++j) {
                const int column = first_contracted + warp_contracted + j * 8 + lane % 4 * 2 + e % 2;
                if (row < p.plain_width && column < p.contracted_width)
                    sums[int64_t(row) * p.contracted_width + column] = acc[i][j][e];
            }
        }
    }
}

}  // namespace cuda
}  // namespace kron
