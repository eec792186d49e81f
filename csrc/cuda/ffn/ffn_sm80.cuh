// y = W2 act(W1 x + bias1) + bias2 in one kernel, for pairs with tiny left factors, as attention is computed: a tile of
// columns of the wide middle at a time,
//
//   h (rows, tile) = x B1^T              GEMM, accumulators
//   u_m = act(sum_c A1[m,c] h_c + bias1) expand, bias, activation  } on each column by itself,
//   z_i = sum_m A2[i,m] u_m              contract                  } in registers
//   acc += z B2^T                        GEMM, z as it lies in registers, B2's columns of this tile
//
// so that the middle exists only in registers. x stays in shared memory, the tiles of B1 and B2 come by cp.async, one
// ahead of the one in use. Where the tokens alone do not fill the device, the blocks share out the tiles too; their
// sums meet in a second kernel.
#pragma once

#include "cuda/ffn/ffn_tiles.cuh"

namespace kron {
namespace cuda {
namespace ffn {

struct ForwardParams {
    const void* x;  // (T, rows * k), rows of a token contiguous
    int64_t x_stride;
    LeftFactors left;
    const void *b1, *b2;  // (middle, k), (n, middle): columns contiguous, rows multiples of 16 bytes apart
    int64_t b1_row, b2_row;
    const void *bias1, *bias2;  // or null
    void* y;                    // (T, rows * n)
    const void* residual;       // with it the norm
    int64_t residual_stride;
    const void *norm_weight, *norm_bias;
    float eps;
    int64_t tokens;
    int k, middle, n;
    Activation activation;
    int tiles;       // of a block, the middle shared out among blocks_z
    float* partial;  // their sums (blocks_z, T, rows * n), or null
};

// Shared memory of a block: small factors, bias1 as floats, x, two stages of a tile of B1 and one of B2.
struct ForwardLayout {
    int bias, x, stages, b2, stage_bytes, bytes;  // b2: within a stage
};
KRON_BOTH ForwardLayout forward_layout(int warps, int size, int columns, int k, int middle, int wide) {
    ForwardLayout at;
    at.bias = kMostWide * int(sizeof(Contraction));
    at.x = at.bias + middle * wide * 4;
    at.stages = at.x + warps * kWarpRows * row_bytes(k, size);
    at.b2 = (size == 2 ? 16 : 8) * row_bytes(k, size);
    at.stage_bytes = at.b2 + columns * 32;
    at.bytes = at.stages + 2 * at.stage_bytes;
    return at;
}

// A row of B2's tile is 32 bytes. The two halves of every other four rows are exchanged: eight rows' halves lie in
// different banks.
KRON_DEVICE int b2_offset(int row, int half) {
    return row * 32 + (half ^ (row / 4 % 2)) * 16;
}

template <class T>
KRON_DEVICE void load_tile(char* stage, const ForwardParams& p, int b2_at, int first, int column, int columns) {
    constexpr int kChunk = 16 / sizeof(T);
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int bytes = row_bytes(p.k, sizeof(T));
    for (int row = warp; row < kTileColumns<T>; row += threads_of_block() / 32) {
        const T* from = static_cast<const T*>(p.b1) + (first + row) * p.b1_row;
        for (int c = lane; c < p.k / kChunk; c += 32)
            cp_async<16>(stage + row * bytes + c * 16, from + c * kChunk, true);
    }
    for (int i = thread_index(); i < 2 * columns; i += threads_of_block()) {
        const int row = i / 2, half = i % 2;
        const bool valid = column + row < p.n;
        const T* from = static_cast<const T*>(p.b2) + (valid ? column + row : 0) * p.b2_row + first + half * kChunk;
        cp_async<16>(stage + b2_at + b2_offset(row, half), from, valid);
    }
}

// z = the narrow results of the wide middle over h's columns; bias: of this thread's first column.
template <class T, int kRows, Activation kAct>
KRON_DEVICE void contract_through(float (&z)[kTiles<T>][4], const float (&h)[kTiles<T>][4],
                                  const Contraction* small_factors, const float* bias, int lane, int wide, int middle) {
    KRON_UNROLL
    for (int i = 0; i < 4 * kTiles<T>; ++i) z[i / 4][i % 4] = 0;
    KRON_UNROLL_BY_2
    for (int m = 0; m < wide; ++m, bias += middle) {
        const Contraction contract = small_factors[m];
        KRON_UNROLL
        for (int i = 0; i < 2 * kTiles<T>; ++i) {
            const int j = i / 2, e = i % 2;
            const float b = bias[column_of<T>(lane, j, e)];
            if constexpr (kRows == 2) {
                const float u =
                    activate<kAct>(multiply_add(contract.a1[0], h[j][e], multiply_add(contract.a1[1], h[j][2 + e], b)));
                z[j][e] = multiply_add(contract.a2[0], u, z[j][e]);
                z[j][2 + e] = multiply_add(contract.a2[1], u, z[j][2 + e]);
            } else {
                KRON_UNROLL
                for (int r = e; r < 4; r += 2)
                    z[j][r] =
                        multiply_add(contract.a2[0], activate<kAct>(multiply_add(contract.a1[0], h[j][r], b)), z[j][r]);
            }
        }
    }
}

template <class T, int kRows>
KRON_DEVICE void contract_through(float (&z)[kTiles<T>][4], const float (&h)[kTiles<T>][4],
                                  const Contraction* small_factors, const float* bias, int lane,
                                  const ForwardParams& p) {
    const int wide = p.left.wide;
    switch (p.activation) {
        case Activation::none:
            return contract_through<T, kRows, Activation::none>(z, h, small_factors, bias, lane, wide, p.middle);
        case Activation::gelu:
            return contract_through<T, kRows, Activation::gelu>(z, h, small_factors, bias, lane, wide, p.middle);
        case Activation::gelu_tanh:
            return contract_through<T, kRows, Activation::gelu_tanh>(z, h, small_factors, bias, lane, wide, p.middle);
        case Activation::relu:
            return contract_through<T, kRows, Activation::relu>(z, h, small_factors, bias, lane, wide, p.middle);
        case Activation::silu:
            return contract_through<T, kRows, Activation::silu>(z, h, small_factors, bias, lane, wide, p.middle);
    }
}

// The sum over the four lanes that hold a row.
KRON_DEVICE float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// A warp's results to memory. In a thread elements 0, 1 and 2, 3 of acc[j] are two columns of two rows: of one token,
// or with one-row pairs of two.
template <class T, int kRows, int kColumns>
KRON_DEVICE void store_results(float (&acc)[kColumns / 8][4], const ForwardParams& p, int64_t first_token, int column) {
    constexpr int kGroups = 3 - kRows, kEach = 2 * kRows;  // tokens of this thread and their elements of acc[j]
    const int lane = thread_index() % 32, first = lane % 4 * 2;
    const int width = kRows * p.n;
    KRON_UNROLL
    for (int group = 0; group < kGroups; ++group) {
        const int64_t token = first_token + lane / 4 + 8 * group;
        const bool valid = token < p.tokens;
        const T* const bias = static_cast<const T*>(p.bias2) + column + first;
        if (p.bias2) {
            KRON_UNROLL
            for (int j = 0; j < kColumns / 8; ++j) {
                if (column + first + 8 * j >= p.n) break;
                KRON_UNROLL
                for (int i = 0; i < kEach; ++i) acc[j][2 * group + i] += to_float(bias[8 * j + i % 2 + i / 2 * p.n]);
            }
        }
        if (p.residual) {  // of all columns in this block
            const T* const residual =
                static_cast<const T*>(p.residual) + (valid ? token * p.residual_stride : 0) + first;
            float sum = 0;
            KRON_UNROLL
            for (int j = 0; j < kColumns / 8; ++j) {
                if (first + 8 * j >= p.n) break;
                KRON_UNROLL
                for (int i = 0; i < kEach; ++i) {
                    float& value = acc[j][2 * group + i];
                    value += to_float(residual[8 * j + i % 2 + i / 2 * p.n]);
                    sum += value;
                }
            }
            const float mean = sum_of_row(sum) / float(width);
            float squares = 0;
            KRON_UNROLL
            for (int j = 0; j < kColumns / 8; ++j) {
                if (first + 8 * j >= p.n) break;
                KRON_UNROLL
                for (int i = 0; i < kEach; ++i) {
                    const float off = acc[j][2 * group + i] - mean;
                    squares = multiply_add(off, off, squares);
                }
            }
            const float scale = reciprocal_root(sum_of_row(squares) / float(width) + p.eps);
            const T *const weight = static_cast<const T*>(p.norm_weight) + first, *const shift = static_cast<const T*>(
                                                                                                     p.norm_bias) +
                                                                                                 first;
            KRON_UNROLL
            for (int j = 0; j < kColumns / 8; ++j) {
                if (first + 8 * j >= p.n) break;
                KRON_UNROLL
                for (int i = 0; i < kEach; ++i) {
                    float& value = acc[j][2 * group + i];
                    const int at = 8 * j + i % 2 + i / 2 * p.n;
                    value = multiply_add((value - mean) * scale, to_float(weight[at]), to_float(shift[at]));
                }
            }
        }
        if (!valid) continue;
        T* const y = static_cast<T*>(p.y) + token * width + column + first;
        KRON_UNROLL
        for (int j = 0; j < kColumns / 8; ++j) {
            if (column + first + 8 * j >= p.n) break;
            KRON_UNROLL
            for (int i = 0; i < kRows; ++i)
                store_pair(y + 8 * j + i * p.n, acc[j][2 * (group + i)], acc[j][2 * (group + i) + 1]);
        }
    }
}

// The same, of a part of the middle, as floats.
template <int kRows, int kColumns>
KRON_DEVICE void store_partial(const float (&acc)[kColumns / 8][4], const ForwardParams& p, int64_t first_token,
                               int column) {
    const int lane = thread_index() % 32, first = lane % 4 * 2;
    KRON_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int64_t token = first_token + lane / 4 + (kRows == 1 ? 8 * half : 0);
        if (token >= p.tokens) continue;
        float* const to = p.partial + ((block_z() * p.tokens + token) * kRows + (kRows == 2 ? half : 0)) * p.n + column;
        KRON_UNROLL
        for (int j = 0; j < kColumns / 8; ++j) {
            if (column + first + 8 * j >= p.n) break;
            store_pair(to + first + 8 * j, acc[j][2 * half], acc[j][2 * half + 1]);
        }
    }
}

template <class T, int kRows, int kColumns>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(256, 1) forward_kernel(ForwardParams p) {
    constexpr int kTokens = kWarpRows / kRows;  // of a warp
    const int warp = thread_index() / 32, lane = thread_index() % 32, warps = threads_of_block() / 32;
    char* const shared = shared_memory();
    const ForwardLayout at = forward_layout(warps, sizeof(T), kColumns, p.k, p.middle, p.left.wide);
    Contraction* const small_factors = reinterpret_cast<Contraction*>(shared);
    float* const bias = reinterpret_cast<float*>(shared + at.bias);
    const int64_t first_token = (int64_t(block_x()) * warps + warp) * kTokens;
    const int column = block_y() * kColumns;
    const int begin = block_z() * p.tiles * kTileColumns<T>;
    const int end = p.middle < begin + p.tiles * kTileColumns<T> ? p.middle : begin + p.tiles * kTileColumns<T>;

    load_tile<T>(shared + at.stages, p, at.b2, begin, column, kColumns);
    const int bytes = row_bytes(p.k, sizeof(T));
    char* const x = shared + at.x + warp * kWarpRows * bytes;
    for (int row = 0; row < kWarpRows; ++row) {
        const int64_t token = first_token + row % kTokens;
        const bool valid = token < p.tokens;
        const T* from = static_cast<const T*>(p.x) + (valid ? token * p.x_stride + int64_t(row / kTokens) * p.k : 0);
        constexpr int kChunk = 16 / sizeof(T);
        for (int c = lane; c < p.k / kChunk; c += 32)
            cp_async<16>(x + row * bytes + c * 16, from + (valid ? c * kChunk : 0), valid);
    }
    cp_async_commit();
    load_small_factors<T, kRows>(small_factors, p.left);
    for (int i = thread_index(); i < p.left.wide * p.middle; i += threads_of_block())
        bias[i] = p.bias1 ? to_float(static_cast<const T*>(p.bias1)[i]) : 0.0f;

    float acc[kColumns / 8][4];
    KRON_UNROLL
    for (int i = 0; i < kColumns / 2; ++i) acc[i / 4][i % 4] = 0;

    const char* const left = x + left_offset(lane, bytes);
    const int b1_lane = right_offset<T>(lane, bytes),
              b2_lane = at.b2 + b2_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    KRON_NO_UNROLL
    for (int tile = 0, first = begin; first < end; ++tile, first += kTileColumns<T>) {
        cp_async_wait<0>();
        sync_threads();  // this tile is there, and all are done with the last one's stage
        const char* const stage = shared + at.stages + tile % 2 * at.stage_bytes;
        if (first + kTileColumns<T> < end)
            load_tile<T>(shared + at.stages + (tile + 1) % 2 * at.stage_bytes, p, at.b2, first + kTileColumns<T>,
                         column, kColumns);
        cp_async_commit();

        uint32_t a[4];
        {
            float h[kTiles<T>][4], z[kTiles<T>][4];
            multiply<T>(h, left, stage + b1_lane, p.k);
            contract_through<T, kRows>(z, h, small_factors, bias + first, lane, p);
            to_fragment<T>(a, z);
        }
        KRON_UNROLL
        for (int j = 0; j < kColumns / 16; ++j) {
            uint32_t b[4];
            ldmatrix(b, stage + b2_lane + j * 512);
            round_words<T>(b);
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_sync<T>(acc[2 * j], a, low);
            mma_sync<T>(acc[2 * j + 1], a, high);
        }
    }
    if (p.partial)
        store_partial<kRows, kColumns>(acc, p, (int64_t(block_x()) * warps + warp) * kTokens, block_y() * kColumns);
    else
        store_results<T, kRows, kColumns>(acc, p, (int64_t(block_x()) * warps + warp) * kTokens, block_y() * kColumns);
}

struct FinishParams {
    ForwardParams forward;
    int parts, width;  // rows * n
};

// A token a warp: the sum of the parts, always in the same order, bias, norm. Each lane keeps its elements in shared
// memory.
template <class T>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(128, 1) finish_kernel(FinishParams params) {
    const ForwardParams& p = params.forward;
    const int width = params.width;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int64_t token = int64_t(block_x()) * (threads_of_block() / 32) + warp;
    if (token >= p.tokens) return;
    float* const row = reinterpret_cast<float*>(shared_memory()) + warp * width;
    T* const y = static_cast<T*>(p.y) + token * width;
    const T* const residual = static_cast<const T*>(p.residual) + (p.residual ? token * p.residual_stride : 0);
    float sum = 0;
    for (int i = lane; i < width; i += 32) {
        float value = p.bias2 ? to_float(static_cast<const T*>(p.bias2)[i]) : 0.0f;
        for (int part = 0; part < params.parts; ++part) value += p.partial[(part * p.tokens + token) * width + i];
        if (!p.residual) {
            y[i] = from_float<T>(value);
            continue;
        }
        row[i] = value += to_float(residual[i]);
        sum += value;
    }
    if (!p.residual) return;
    const float mean = sum_of_warp(sum) / float(width);
    float squares = 0;
    for (int i = lane; i < width; i += 32) squares = multiply_add(row[i] - mean, row[i] - mean, squares);
    const float scale = reciprocal_root(sum_of_warp(squares) / float(width) + p.eps);
    for (int i = lane; i < width; i += 32)
        y[i] = from_float<T>(multiply_add((row[i] - mean) * scale, to_float(static_cast<const T*>(p.norm_weight)[i]),
                                          to_float(static_cast<const T*>(p.norm_bias)[i])));
}

}  // namespace ffn
}  // namespace cuda
}  // namespace kron
