// What the kernels of the feed-forward block share: its pieces in registers and the tiles they are read from.
//
// A warp works on 16 rows of the first GEMM: of one-row pairs 16 tokens, of two-row pairs 8 tokens, row r of the first
// eight being token r's first and row r + 8 its second. Both lie in the accumulators of the same thread, so the
// contractions need no exchange between threads.
#pragma once

#include "cuda/common/activation.h"
#include "cuda/common/memory.h"
#include "cuda/common/mma.h"

namespace kron {
namespace cuda {
namespace ffn {

using namespace device;

constexpr int kWarpRows = 16;
constexpr int kMostWide = 16;

// A tile of the middle is as many columns as one step of the second GEMM takes (32 bytes).
template <class T>
constexpr int kTiles = sizeof(T) == 2 ? 2 : 1;  // of 8 columns
template <class T>
constexpr int kTileColumns = 8 * kTiles<T>;
// Steps of a GEMM over 16 values of its inner dimension.
template <class T>
constexpr int kSteps = sizeof(T) == 2 ? 1 : 2;

// Bytes between the rows of a tile with `count` values each (a multiple of 16): an odd number of 16-byte chunks, so
// that the eight rows of a matrix lie in different banks.
KRON_BOTH int row_bytes(int count, int size) {
    return count * size + 16;
}

// Which column of a tile is element e (0 or 1) of a thread's accumulators of 8 columns. For TF32 the columns of the
// first GEMM are permuted, by the order in which its second operand's rows are read, so that the accumulators are a
// fragment of the second GEMM as they lie.
template <class T>
KRON_DEVICE int column_of(int lane, int tile, int e) {
    return sizeof(T) == 2 ? 8 * tile + 2 * (lane % 4) + e : lane % 4 + 4 * e;
}

// Where a lane's address for ldmatrix is in 16 rows of the first operand...
KRON_DEVICE int left_offset(int lane, int bytes_of_row) {
    return lane % 16 * bytes_of_row + lane / 16 * 16;
}
// ...and in the kTileColumns rows of the second.
template <class T>
KRON_DEVICE int right_offset(int lane, int bytes_of_row) {
    if constexpr (sizeof(T) == 2) return (lane % 8 + lane / 16 * 8) * bytes_of_row + lane / 8 % 2 * 16;
    return (lane % 8 / 2 + lane % 2 * 4) * bytes_of_row + lane / 8 * 16;
}

// The words of a fragment as the tensor cores take them.
template <class T, int kCount>
KRON_DEVICE void round_words(uint32_t (&words)[kCount]) {
    if constexpr (sizeof(T) == 4) {
        KRON_UNROLL
        for (int i = 0; i < kCount; ++i) words[i] = to_tf32(bits_to_float(words[i]));
    }
}

// Operands of a step: 16 rows, and kBlocks times kTileColumns of the other operand's rows, over 16 values of the inner
// dimension.
template <class T, int kBlocks>
struct Fragments {
    uint32_t a[kSteps<T>][4], b[kBlocks][4];

    // The other operand's blocks lie block_bytes apart.
    KRON_DEVICE void load(const char* left, const char* right, int block_bytes) {
        KRON_UNROLL
        for (int s = 0; s < kSteps<T>; ++s) ldmatrix(a[s], left + 32 * s);
        KRON_UNROLL
        for (int block = 0; block < kBlocks; ++block) ldmatrix(b[block], right + block * block_bytes);
    }
    // out += left right^T
    KRON_DEVICE void multiply(float (&out)[kBlocks * kTiles<T>][4]) {
        KRON_UNROLL
        for (int s = 0; s < kSteps<T>; ++s) round_words<T>(a[s]);
        KRON_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            round_words<T>(b[block]);
            // One of kSteps and kTiles is 1.
            KRON_UNROLL
            for (int i = 0; i < kSteps<T> * kTiles<T>; ++i) {
                const uint32_t pair[2] = {b[block][2 * i], b[block][2 * i + 1]};
                mma_sync<T>(out[block * kTiles<T> + i % kTiles<T>], a[i % kSteps<T>], pair);
            }
        }
    }
};

// out = left right^T over `count` values, a multiple of 16. The fragments of a step are loaded before the step ahead of
// it is multiplied, and two sums take turns, so that no product waits for the last one.
template <class T>
KRON_DEVICE void multiply(float (&out)[kTiles<T>][4], const char* left, const char* right, int count) {
    constexpr int kBytes = 16 * int(sizeof(T));
    float odd[kTiles<T>][4] = {};
    KRON_UNROLL
    for (int i = 0; i < 4 * kTiles<T>; ++i) out[i / 4][i % 4] = 0;
    Fragments<T, 1> first, second;
    first.load(left, right, 0);
    int k = 0;
    KRON_UNROLL_BY_2
    for (; k + 32 <= count; k += 32) {
        second.load(left + kBytes, right + kBytes, 0);
        first.multiply(out);
        // The last time there may be no further step: these are read again and not used.
        const int next = k + 32 < count ? 2 * kBytes : 0;
        left += next;
        right += next;
        first.load(left, right, 0);
        second.multiply(odd);
    }
    if (k < count) first.multiply(out);
    KRON_UNROLL
    for (int i = 0; i < 4 * kTiles<T>; ++i) out[i / 4][i % 4] += odd[i / 4][i % 4];
}

// The same fragment of the second GEMM's first operand as its accumulators z.
template <class T>
KRON_DEVICE void to_fragment(uint32_t (&a)[4], const float (&z)[kTiles<T>][4]) {
    if constexpr (sizeof(T) == 2) {
        KRON_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = pack<T>(z[i / 2][i % 2 * 2], z[i / 2][i % 2 * 2 + 1]);
    } else {
        a[0] = to_tf32(z[0][0]);
        a[1] = to_tf32(z[0][2]);
        a[2] = to_tf32(z[0][1]);
        a[3] = to_tf32(z[0][3]);
    }
}

// Two neighbours to memory, aligned to both.
template <class T>
KRON_DEVICE void store_pair(T* to, float first, float second) {
    if constexpr (sizeof(T) == 2)
        *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
    else
        store_global8(to, Words2{{float_to_bits(first), float_to_bits(second)}});
}

KRON_DEVICE float sum_of_warp(float value) {
    KRON_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Column m of the tiny left factors: a1[c] = A1[m, c] and a2[i] = A2[i, m].
struct alignas(16) Contraction {
    float a1[2], a2[2];
};

struct LeftFactors {
    const void *a1, *a2;
    int64_t a1_row, a1_col, a2_row, a2_col;
    int wide;  // m
};
inline LeftFactors left_factors(const Factor& a1, const Factor& a2, int64_t wide) {
    return {a1.data, a2.data, a1.stride_row, a1.stride_col, a2.stride_row, a2.stride_col, int(wide)};
}

template <class T, int kRows>
KRON_DEVICE void load_small_factors(Contraction* to, const LeftFactors& left) {
    for (int m = thread_index(); m < left.wide; m += threads_of_block()) {
        const T* a1 = static_cast<const T*>(left.a1) + m * left.a1_row;
        const T* a2 = static_cast<const T*>(left.a2) + m * left.a2_col;
        Contraction contract = {};
        for (int c = 0; c < kRows; ++c) {
            contract.a1[c] = to_float(a1[c * left.a1_col]);
            contract.a2[c] = to_float(a2[c * left.a2_row]);
        }
        to[m] = contract;
    }
}

}  // namespace ffn
}  // namespace cuda
}  // namespace kron
