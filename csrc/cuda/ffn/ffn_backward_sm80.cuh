// The middle of the feed-forward block's backward. Of a token's narrow grids x and dY it recomputes
//
//   h = x B1^T, dz = dY B2                               GEMMs, accumulators of the same rows and columns
//   pre_m = sum_c A1[m,c] h_c + bias1, u_m = act(pre_m)
//   dpre_m = act'(pre_m) sum_i A2[i,m] dz_i
//   z_i = sum_m A2[i,m] u_m, dh_c = sum_m A1[m,c] dpre_m
//
// and writes z and dh, as narrow as x: what dX, dB1 and dB2 are plain GEMMs of. The sums over tokens of dpre (dbias1),
// dpre h (dA1) and dz u (dA2) are kept by every warp and written by every block; a second kernel adds them up.
//
// A block has kBlockColumns columns of the middle; their rows of B1 and B2^T stay in shared memory. Each of its warps
// walks over groups of 16 rows by itself, x and dY coming in chunks by cp.async, two ahead of the one in use.
#pragma once

#include "cuda/ffn/ffn_tiles.cuh"

namespace kron {
namespace cuda {
namespace ffn {

constexpr int kBackwardWarps = 4, kStages = 3;
constexpr int kColumnTiles = 2;  // of a warp
template <class T>
constexpr int kBlockColumns = kColumnTiles * kTileColumns<T>;
// Values of a row that arrive together, and the bytes between rows: an odd number of 16-byte chunks.
template <class T>
constexpr int kChunk = sizeof(T) == 2 ? 48 : 32;
template <class T>
constexpr int kChunkPitch = kChunk<T> * int(sizeof(T)) + 16;

struct BackwardParams {
    const void *x, *grad;  // (T, rows * k), (T, rows * n)
    int64_t x_stride, grad_stride;
    LeftFactors left;
    const void *b1, *b2;  // (middle, k), B2^T (middle, n): columns contiguous, rows multiples of 16 bytes apart
    int64_t b1_row, b2_row;
    const void* bias1;  // or null
    void *z, *dh;       // (T, rows * middle) each, or null
    void* identity;     // (rows, rows) is written there, the trivial left factor of the GEMMs behind this kernel
    float* bias_sums;   // (blocks_x, wide, middle)
    float* left_sums;   // (blocks_x, blocks_y, wide, 4): dA1[m, 0], dA1[m, 1], dA2[0, m], dA2[1, m]
    int64_t tokens;
    int k, middle, n;
    Activation activation;
};

// Shared memory of a block: small factors, bias1 as floats, sums of each warp, B1, B2^T, stages of each warp.
struct BackwardLayout {
    int bias, sums, b1, b2, stages, bytes;
};
template <class T>
KRON_BOTH BackwardLayout backward_layout(int k, int n, int wide) {
    BackwardLayout at;
    at.bias = kMostWide * int(sizeof(Contraction));
    at.sums = at.bias + wide * kBlockColumns<T> * 4;
    at.b1 = at.sums + kBackwardWarps * wide * 2 * 32 * 4;
    at.b2 = at.b1 + kBlockColumns<T> * row_bytes(k, sizeof(T));
    at.stages = at.b2 + kBlockColumns<T> * row_bytes(n, sizeof(T));
    at.bytes = at.stages + kBackwardWarps * kStages * kWarpRows * kChunkPitch<T>;
    return at;
}

// Sums of kCount values over the lanes of `masks`, spread among them: value i ends in v[0] of the lanes whose bits of
// the highest masks spell i.
template <int kCount, int kMask, int kLast>
KRON_DEVICE void reduce_and_spread(float (&v)[kCount], int lane) {
    if constexpr (kMask >= kLast) {
        constexpr int kHalf = kCount / 2;
        if constexpr (kHalf == 0) {
            v[0] += shuffle_xor(v[0], kMask);
            reduce_and_spread<1, kMask / 2, kLast>(v, lane);
        } else {
            const bool upper = lane & kMask;
            float kept[kHalf];
            KRON_UNROLL
            for (int i = 0; i < kHalf; ++i)
                kept[i] = (upper ? v[kHalf + i] : v[i]) + shuffle_xor(upper ? v[i] : v[kHalf + i], kMask);
            reduce_and_spread<kHalf, kMask / 2, kLast>(kept, lane);
            v[0] = kept[0];
        }
    }
}

// Where a warp's walk over its groups and their chunks is: those of x first, then those of dY.
struct Cursor {
    int64_t group;
    int chunk;
};

template <class T, int kRows>
KRON_DEVICE void load_chunk(char* stage, const BackwardParams& p, Cursor at, int64_t groups, int x_chunks) {
    constexpr int kWord = 16 / int(sizeof(T)), kWords = kChunk<T> / kWord, kTokens = kWarpRows / kRows;
    if (at.group < groups) {
        const bool second = at.chunk >= x_chunks;
        const int count = second ? p.n : p.k, first = (at.chunk - (second ? x_chunks : 0)) * kChunk<T>;
        const T* const from = static_cast<const T*>(second ? p.grad : p.x);
        const int64_t stride = second ? p.grad_stride : p.x_stride;
        for (int i = thread_index() % 32; i < kWarpRows * kWords; i += 32) {
            const int row = i / kWords, word = i % kWords, value = first + word * kWord;
            const int64_t token = at.group * kTokens + row % kTokens;
            const bool valid = token < p.tokens && value < count;
            cp_async<16>(stage + row * kChunkPitch<T> + word * 16,
                         from + (valid ? token * stride + int64_t(row / kTokens) * count + value : 0), valid);
        }
    }
    cp_async_commit();
}

// From h and dz of a thread's rows and columns to z and dh; sums: this lane's of m = 0, 64 floats a m.
template <class T, int kRows, Activation kAct>
KRON_DEVICE void contract_backward(float (&z)[kColumnTiles * kTiles<T>][4], float (&dh)[kColumnTiles * kTiles<T>][4],
                                   const float (&h)[kColumnTiles * kTiles<T>][4],
                                   const float (&dz)[kColumnTiles * kTiles<T>][4], const Contraction* small_factors,
                                   const float* bias, float* sums, int wide) {
    constexpr int kCount = kColumnTiles * kTiles<T>;
    const int lane = thread_index() % 32;
    KRON_UNROLL
    for (int i = 0; i < 4 * kCount; ++i) z[i / 4][i % 4] = dh[i / 4][i % 4] = 0;
    KRON_NO_UNROLL
    for (int m = 0; m < wide; ++m, bias += kBlockColumns<T>, sums += 64) {
        const Contraction contract = small_factors[m];
        float of_left[4] = {}, of_bias[2 * kCount] = {};
        KRON_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) {
            const int j = i / 2, e = i % 2;
            const float b = bias[j / kTiles<T> * kTileColumns<T> + column_of<T>(lane, j % kTiles<T>, e)];
            if constexpr (kRows == 2) {
                float dpre = multiply_add(contract.a2[0], dz[j][e], contract.a2[1] * dz[j][2 + e]);
                const float u = activate_backward<kAct>(
                    multiply_add(contract.a1[0], h[j][e], multiply_add(contract.a1[1], h[j][2 + e], b)), dpre);
                of_bias[i] = dpre;
                KRON_UNROLL
                for (int c = 0; c < 2; ++c) {
                    z[j][2 * c + e] = multiply_add(contract.a2[c], u, z[j][2 * c + e]);
                    dh[j][2 * c + e] = multiply_add(contract.a1[c], dpre, dh[j][2 * c + e]);
                    of_left[c] = multiply_add(dpre, h[j][2 * c + e], of_left[c]);
                    of_left[2 + c] = multiply_add(dz[j][2 * c + e], u, of_left[2 + c]);
                }
            } else {
                KRON_UNROLL
                for (int r = e; r < 4; r += 2) {
                    float dpre = contract.a2[0] * dz[j][r];
                    const float u = activate_backward<kAct>(multiply_add(contract.a1[0], h[j][r], b), dpre);
                    of_bias[i] += dpre;
                    z[j][r] = multiply_add(contract.a2[0], u, z[j][r]);
                    dh[j][r] = multiply_add(contract.a1[0], dpre, dh[j][r]);
                    of_left[0] = multiply_add(dpre, h[j][r], of_left[0]);
                    of_left[2] = multiply_add(dz[j][r], u, of_left[2]);
                }
            }
        }
        // A column's values are in the lanes of equal lane % 4.
        reduce_and_spread<2 * kCount, 16, 4>(of_bias, lane);
        reduce_and_spread<4, 2, 1>(of_left, lane);
        sums[0] += of_bias[0];
        sums[32] += of_left[0];
    }
}

template <class T, int kRows>
KRON_DEVICE void contract_backward(float (&z)[kColumnTiles * kTiles<T>][4], float (&dh)[kColumnTiles * kTiles<T>][4],
                                   const float (&h)[kColumnTiles * kTiles<T>][4],
                                   const float (&dz)[kColumnTiles * kTiles<T>][4], const Contraction* small_factors,
                                   const float* bias, float* sums, const BackwardParams& p) {
    const int wide = p.left.wide;
    switch (p.activation) {
        case Activation::none:
            return contract_backward<T, kRows, Activation::none>(z, dh, h, dz, small_factors, bias, sums, wide);
        case Activation::gelu:
            return contract_backward<T, kRows, Activation::gelu>(z, dh, h, dz, small_factors, bias, sums, wide);
        case Activation::gelu_tanh:
            return contract_backward<T, kRows, Activation::gelu_tanh>(z, dh, h, dz, small_factors, bias, sums, wide);
        case Activation::relu:
            return contract_backward<T, kRows, Activation::relu>(z, dh, h, dz, small_factors, bias, sums, wide);
        case Activation::silu:
            return contract_backward<T, kRows, Activation::silu>(z, dh, h, dz, small_factors, bias, sums, wide);
    }
}

// A warp's rows of z or dh to memory (T, rows * middle).
template <class T, int kRows>
KRON_DEVICE void store_narrow(void* out, const float (&v)[kColumnTiles * kTiles<T>][4], const BackwardParams& p,
                              int64_t group, int column) {
    const int lane = thread_index() % 32;
    KRON_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int64_t token = group * (kWarpRows / kRows) + lane / 4 + (kRows == 1 ? 8 * half : 0);
        if (token >= p.tokens) continue;
        T* const to = static_cast<T*>(out) + (token * kRows + (kRows == 2 ? half : 0)) * p.middle + column;
        KRON_UNROLL
        for (int j = 0; j < kColumnTiles * kTiles<T>; ++j) {
            const int tile = j / kTiles<T> * kTileColumns<T>;
            if (column + tile >= p.middle) break;
            T* const pair = to + tile + column_of<T>(lane, j % kTiles<T>, 0);
            if constexpr (sizeof(T) == 2)
                store_pair(pair, v[j][2 * half], v[j][2 * half + 1]);
            else
                pair[0] = v[j][2 * half], pair[4] = v[j][2 * half + 1];
        }
    }
}

template <class T>
KRON_DEVICE void load_rows(char* to, const void* from, int64_t stride, int first, int middle, int count) {
    constexpr int kWord = 16 / int(sizeof(T));
    for (int row = thread_index() / 32; row < kBlockColumns<T>; row += kBackwardWarps) {
        const bool valid = first + row < middle;
        const T* const source = static_cast<const T*>(from) + (valid ? (first + row) * stride : 0);
        for (int c = thread_index() % 32; c < count / kWord; c += 32)
            cp_async<16>(to + row * row_bytes(count, sizeof(T)) + c * 16, source + c * kWord, valid);
    }
}

// The block's sums: of its warps, in their order.
template <class T>
KRON_DEVICE void store_sums(const float* sums, const BackwardParams& p, int column) {
    constexpr int kCount = 2 * kColumnTiles * kTiles<T>;  // values that reduce_and_spread spread among eight lanes
    const int wide = p.left.wide;
    const auto over_warps = [&](int at) {
        float sum = 0;
        for (int warp = 0; warp < kBackwardWarps; ++warp) sum += sums[warp * wide * 64 + at];
        return sum;
    };
    for (int i = thread_index(); i < wide * 32; i += kBackwardWarps * 32) {
        const int m = i / 32, lane = i % 32;
        if (lane / 4 % (8 / kCount)) continue;  // the same value again
        const int value = lane / 4 / (8 / kCount), j = value / 2;
        const int at = column + j / kTiles<T> * kTileColumns<T> + column_of<T>(lane, j % kTiles<T>, value % 2);
        if (at < p.middle) p.bias_sums[(int64_t(block_x()) * wide + m) * p.middle + at] = over_warps(m * 64 + lane);
    }
    for (int i = thread_index(); i < wide * 4; i += kBackwardWarps * 32) {
        float sum = 0;
        for (int lane = i % 4; lane < 32; lane += 4) sum += over_warps(i / 4 * 64 + 32 + lane);
        p.left_sums[(int64_t(block_x()) * blocks_y() + block_y()) * wide * 4 + i] = sum;
    }
}

template <class T, int kRows>
KRON_GLOBAL void KRON_LAUNCH_BOUNDS(32 * kBackwardWarps, 2) backward_kernel(BackwardParams p) {
    constexpr int kTokens = kWarpRows / kRows, kCount = kColumnTiles * kTiles<T>;
    const int warp = thread_index() / 32, lane = thread_index() % 32, column = block_y() * kBlockColumns<T>;
    char* const shared = shared_memory();
    const BackwardLayout at = backward_layout<T>(p.k, p.n, p.left.wide);
    Contraction* const small_factors = reinterpret_cast<Contraction*>(shared);
    float* const bias = reinterpret_cast<float*>(shared + at.bias);
    float* const sums = reinterpret_cast<float*>(shared + at.sums);
    const int64_t groups = (p.tokens + kTokens - 1) / kTokens, step = int64_t(blocks_x()) * kBackwardWarps;
    const int x_chunks = (p.k + kChunk<T> - 1) / kChunk<T>, chunks = x_chunks + (p.n + kChunk<T> - 1) / kChunk<T>;

    load_rows<T>(shared + at.b1, p.b1, p.b1_row, column, p.middle, p.k);
    load_rows<T>(shared + at.b2, p.b2, p.b2_row, column, p.middle, p.n);
    cp_async_commit();
    load_small_factors<T, kRows>(small_factors, p.left);
    for (int i = thread_index(); i < p.left.wide * kBlockColumns<T>; i += 32 * kBackwardWarps) {
        const int m = i / kBlockColumns<T>, from = column + i % kBlockColumns<T>;
        bias[i] = p.bias1 && from < p.middle ? to_float(static_cast<const T*>(p.bias1)[m * p.middle + from]) : 0.0f;
    }
    for (int i = thread_index(); i < kBackwardWarps * p.left.wide * 64; i += 32 * kBackwardWarps) sums[i] = 0;
    if (block_x() == 0 && block_y() == 0 && thread_index() < kRows * kRows)
        static_cast<T*>(p.identity)[thread_index()] = from_float<T>(thread_index() % (kRows + 1) == 0 ? 1.0f : 0.0f);
    cp_async_wait<0>();
    sync_threads();

    char* const stages = shared + at.stages + warp * kStages * kWarpRows * kChunkPitch<T>;
    const int left = left_offset(lane, kChunkPitch<T>);
    Cursor ahead{int64_t(block_x()) * kBackwardWarps + warp, 0};
    int64_t group = ahead.group;
    int stage = 0;
    const auto load_ahead = [&](int into) {
        load_chunk<T, kRows>(stages + into * kWarpRows * kChunkPitch<T>, p, ahead, groups, x_chunks);
        if (++ahead.chunk == chunks) ahead = Cursor{ahead.group + step, 0};
    };
    load_ahead(0);
    load_ahead(1);
    KRON_NO_UNROLL
    for (; group < groups; group += step) {
        float h[kCount][4] = {}, dz[kCount][4] = {};
        // sum += chunks from `first` on, of rows of `count` values
        const auto multiply_chunks = [&](float (&sum)[kCount][4], int rows_at, int count) {
            const int pitch = row_bytes(count, sizeof(T));
            const char* const right = shared + rows_at + right_offset<T>(lane, pitch);
            KRON_NO_UNROLL
            for (int first = 0; first < count; first += kChunk<T>) {
                cp_async_wait<1>();
                sync_warp();  // the chunk is there, and all lanes are done with the last one's stage
                load_ahead(stage == 0 ? 2 : stage - 1);
                const char* const rows = stages + stage * kWarpRows * kChunkPitch<T> + left;
                stage = stage == 2 ? 0 : stage + 1;
                const auto step = [&](int s) {
                    Fragments<T, kColumnTiles> fragments;
                    fragments.load(rows + s * int(sizeof(T)), right + (first + s) * int(sizeof(T)),
                                   kTileColumns<T> * pitch);
                    fragments.multiply(sum);
                };
                if (first + kChunk<T> <= count) {
                    KRON_UNROLL
                    for (int s = 0; s < kChunk<T>; s += 16) step(s);
                } else {
                    KRON_NO_UNROLL
                    for (int s = 0; first + s < count; s += 16) step(s);
                }
            }
        };
        multiply_chunks(h, at.b1, p.k);
        multiply_chunks(dz, at.b2, p.n);
        float z[kCount][4], dh[kCount][4];
        contract_backward<T, kRows>(z, dh, h, dz, small_factors, bias, sums + warp * p.left.wide * 64 + lane, p);
        if (p.z) store_narrow<T, kRows>(p.z, z, p, group, column);
        if (p.dh) store_narrow<T, kRows>(p.dh, dh, p, group, column);
    }
    sync_threads();
    store_sums<T>(sums, p, column);
}

}  // namespace ffn
}  // namespace cuda
}  // namespace kron
