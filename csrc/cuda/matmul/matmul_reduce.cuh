// The tiny factor's gradient in the epilogue of a product: sums over tokens and columns of an accumulated row times a
// part of another tensor of tokens,
//   sum[m][r] = sum_t sum_n acc_r[t, n] other_m[t, n]
#pragma once

#include "cuda/matmul/matmul_rows.cuh"

namespace kron {
namespace cuda {

// The slots are floats in shared memory, Slot[warp][half][m] of rows g. A warp alone adds to its own.
template <class T, int G>
struct TinyReducer {
    Tokens<T> other;  // parts m; halves of it are those of the rows
    Weights<G>* slots;

    KRON_DEVICE void clear() const {
        KRON_NO_UNROLL for (int i = thread_index(); i < 4 * values(); i += threads_of_block()) floats()[i] = 0;
    }
    // The sums of the warps, [m][row], a row being a half and a g.
    KRON_DEVICE void finish(float* out) const {
        KRON_NO_UNROLL for (int i = thread_index(); i < values(); i += threads_of_block()) {
            const int g = i % G, half = i / G % other.halves, m = i / G / other.halves;
            const int slot = (half * other.parts + m) * G + g;
            float sum = 0;
            for (int warp = 0; warp < 4; ++warp) sum += floats()[warp * values() + slot];
            out[i] = sum;
        }
    }

    template <class Acc>
    KRON_DEVICE void add(Acc& acc, int64_t first_token, int column) const {
        if (other.right && other.vector) {
            // The sums of all parts in registers, if they are few.
            if (other.parts == 2) return add_interleaved<2>(acc, first_token, column);
            if (other.parts == 4) return add_interleaved<4>(acc, first_token, column);
            if constexpr (G <= 4)
                if (other.parts == 8) return add_interleaved<8>(acc, first_token, column);
            if constexpr (G <= 2)
                if (other.parts == 16) return add_interleaved<16>(acc, first_token, column);
        }
        KRON_NO_UNROLL for (int m = 0; m < other.parts; ++m) {
            float sums[G] = {};
            KRON_UNROLL for (int i = 0; i < 8 / G; ++i) {
                float v[8];
                load_part(first_token + i * 8, m, column, v);
                KRON_UNROLL for (int g = 0; g < G; ++g) {
                    KRON_UNROLL for (int e = 0; e < 8; ++e) sums[g] += acc.at(i * G + g, e) * v[e];
                }
            }
            add_to_slot(sums, m);
        }
    }

  private:
    KRON_DEVICE int values() const { return other.halves * other.parts * G; }
    KRON_DEVICE float* floats() const { return reinterpret_cast<float*>(slots); }
    KRON_DEVICE const T* row_of_token(int64_t token) const {
        return other.data + (other.halves == 2 ? token >> 1 : token) * other.stride;
    }

    // Eight columns of part m; zeros where there are none.
    KRON_DEVICE void load_part(int64_t token, int m, int column, float (&v)[8]) const {
        KRON_UNROLL for (int e = 0; e < 8; ++e) v[e] = 0;
        if (token >= other.count) return;
        const T* row = row_of_token(token);
        if (!other.right && other.vector && column + 8 <= other.width) {
            KRON_UNROLL for (int e = 0; e < 8; e += kVector<T>) {
                unpack_vector<T>(load_global(row + int64_t(m) * other.width + column + e), v, e);
            }
            return;
        }
        KRON_UNROLL for (int e = 0; e < 8; ++e) {
            if (column + e < other.width)
                v[e] = to_float(
                    row[other.right ? int64_t(column + e) * other.parts + m : int64_t(m) * other.width + column + e]);
        }
    }

    template <int kParts, class Acc>
    KRON_DEVICE void add_interleaved(Acc& acc, int64_t first_token, int column) const {
        float sums[kParts][G] = {};
        KRON_NO_UNROLL for (int i = 0; i < 8 / G; ++i) {
            const int64_t token = first_token + i * 8;
            const int there = token < other.count ? (other.width - column) * kParts : 0;
            const T* from = row_of_token(token) + int64_t(column) * kParts;
            KRON_UNROLL for (int at = 0; at < 8 * kParts; at += kVector<T>) {
                if (at >= there) continue;
                float v[kVector<T>];
                unpack_vector<T>(load_global(from + at), v, 0);
                KRON_UNROLL for (int j = 0; j < kVector<T>; ++j) {
                    const int e = (at + j) / kParts, m = (at + j) % kParts;
                    KRON_UNROLL for (int g = 0; g < G; ++g) sums[m][g] += acc.at(g, e) * v[j];
                }
            }
            rotate(acc);
        }
        KRON_UNROLL for (int m = 0; m < kParts; ++m) add_to_slot(sums[m], m);
    }
    // The rows of the next token come to the front; after 8 / G times each is where it was.
    template <class Acc>
    KRON_DEVICE static void rotate(Acc& acc) {
        KRON_UNROLL for (int e = 0; e < 8; ++e) {
            float first[G];
            KRON_UNROLL for (int g = 0; g < G; ++g) first[g] = acc.at(g, e);
            KRON_UNROLL for (int r = 0; r + G < 8; ++r) acc.at(r, e) = acc.at(r + G, e);
            KRON_UNROLL for (int g = 0; g < G; ++g) acc.at(8 - G + g, e) = first[g];
        }
    }

    // Over the lanes of a warp; with halves, every other lane / 4 has the other half.
    KRON_DEVICE void add_to_slot(const float (&sums)[G], int m) const {
        const int lane = thread_index() % 32, warp = thread_index() / 32;
        const int half = other.halves == 2 ? lane / 4 % 2 : 0;
        KRON_UNROLL for (int g = 0; g < G; ++g) {
            float sum = sums[g];
            KRON_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
                const float more = shuffle_xor(sum, mask);
                if (mask != 4 || other.halves == 1) sum += more;
            }
            if (lane == half * 4) slots[(warp * other.halves + half) * other.parts + m].of[g] += sum;
        }
    }
};

}  // namespace cuda
}  // namespace kron
