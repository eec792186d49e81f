// csrc/cuda/common/mma.h on the emulated machine.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulator/machine.h"

namespace kron {
namespace cuda {
namespace device {

// A lane reads the row it gives the address of when it comes: what another lane writes later it does not see without a
// barrier between them.
struct LoadMatrix {
    uint32_t (*r)[4];
    char row[16];
};
template <bool kTransposed>
inline void load_matrices(LoadMatrix* const* lanes) {
    uint16_t matrix[4][8][8];
    for (int i = 0; i < 32; ++i) std::memcpy(matrix[i / 8][i % 8], lanes[i]->row, 16);
    for (int i = 0; i < 32; ++i)
        for (int m = 0; m < 4; ++m) {
            const int g = i / 4, t = 2 * (i % 4);
            const uint32_t low = kTransposed ? matrix[m][t][g] : matrix[m][g][t];
            const uint32_t high = kTransposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1];
            (*lanes[i]->r)[m] = low | high << 16;
        }
}
inline LoadMatrix read_row(uint32_t (&r)[4], const void* row) {
    if (!emulator::in_shared(row, 16)) emulator::fail("ldmatrix of an address outside the block's shared memory");
    emulator::require_aligned(row, 16, "ldmatrix");
    LoadMatrix mine{&r, {}};
    std::memcpy(mine.row, row, 16);
    return mine;
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
    LoadMatrix mine = read_row(r, row);
    emulator::together<LoadMatrix>("ldmatrix", mine, load_matrices<false>);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
    LoadMatrix mine = read_row(r, row);
    emulator::together<LoadMatrix>("ldmatrix_transposed", mine, load_matrices<true>);
}

struct Multiply {
    float* d;
    const uint32_t *a, *b;
};
// Value k of the inner dimension in a word of a fragment: two of 16 bits, or one of TF32.
template <class T>
inline float value_of(uint32_t word, int k) {
    if constexpr (std::is_same_v<T, float>) {
        if (word & 0x1fffu && (word & 0x7f800000u) != 0x7f800000u) emulator::fail("mma_sync of a float not in TF32");
        return bits_to_float(word);
    } else {
        float pair[2];
        unpack<T>(word, pair[0], pair[1]);
        return pair[k];
    }
}
template <class T>
inline void multiply(Multiply* const* lanes) {
    constexpr int kPerWord = std::is_same_v<T, float> ? 1 : 2, kInner = 8 * kPerWord;
    float a[16][kInner], b[8][kInner];
    for (int i = 0; i < 32; ++i)
        for (int r = 0; r < 4; ++r)
            for (int k = 0; k < kPerWord; ++k) {
                const int g = i / 4, word = i % 4 + r / 2 * 4;
                a[g + r % 2 * 8][word * kPerWord + k] = value_of<T>(lanes[i]->a[r], k);
                if (r < 2) b[g][(i % 4 + r * 4) * kPerWord + k] = value_of<T>(lanes[i]->b[r], k);
            }
    for (int i = 0; i < 32; ++i)
        for (int e = 0; e < 4; ++e) {
            const float *row = a[i / 4 + e / 2 * 8], *column = b[i % 4 * 2 + e % 2];
            float sum = lanes[i]->d[e];
            for (int k = 0; k < kInner; ++k) sum += row[k] * column[k];
            lanes[i]->d[e] = sum;
        }
}
template <class T>
inline void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Multiply mine{d, a, b};
    emulator::together<Multiply>("mma_sync", mine, multiply<T>);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
