// Rows of a GEMM made of a tensor of tokens: its parts x_c as they are, or mixed by a tiny factor, in shared memory.
#pragma once

#include "device/memory.h"
#include "device/values.h"

namespace kron {
namespace cuda {

using namespace device;

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // values in a word of 16 bytes

// Of the tiny factor for one part c: a number for each of the G rows.
template <int G>
struct alignas(G >= 4 ? 16 : 4 * G) Weights {
    float of[G];
};

template <class T>
struct Tokens {
    const T* data;
    int64_t stride, count;  // count: in halves, if a token has two
    int halves, parts, width;
    bool right, vector;
};

// Which of the tile's rows is row g of a token. Fragment order: the rows of a token end up in one thread's
// accumulators, where thread lane / 4 = token % 8 has rows lane / 4 + 8 j, j = token / 8 * G + g.
template <int G, bool kFragmentOrder>
KRON_DEVICE int row_of(int token, int g) {
    return kFragmentOrder ? token / 8 * 8 * G + 8 * g + token % 8 : token * G + g;
}

template <class T, int N>
KRON_DEVICE void unpack_vector(const Words4& words, float (&v)[N], int at) {
    if constexpr (sizeof(T) == 4) {
        KRON_UNROLL for (int i = 0; i < 4; ++i) v[at + i] = bits_to_float(words.w[i]);
    } else {
        KRON_UNROLL for (int i = 0; i < 4; ++i) unpack<T>(words.w[i], v[at + 2 * i], v[at + 2 * i + 1]);
    }
}

// N neighbouring values of a row, 4 to 16 bytes, rounded for the tensor cores.
template <class T, int N>
KRON_DEVICE void store_row(char* to, const float (&z)[N]) {
    constexpr int kWords = N * int(sizeof(T)) / 4;
    uint32_t word[kWords];
    KRON_UNROLL for (int i = 0; i < kWords; ++i) {
        if constexpr (sizeof(T) == 4)
            word[i] = to_tf32(z[i]);
        else
            word[i] = pack<T>(z[2 * i], z[2 * i + 1]);
    }
    if constexpr (kWords == 4)
        store_shared(to, Words4{{word[0], word[1], word[2], word[3]}});
    else if constexpr (kWords == 2)
        *reinterpret_cast<Words2*>(to) = Words2{{word[0], word[1]}};
    else
        *reinterpret_cast<uint32_t*>(to) = word[0];
}

// Fills the rows of `tokens` tokens from `first` on with [from, from + length) of the inner dimension: `terms` times
// `term_inner` values, of which the first x.width are there; zeros elsewhere. `mix` has Weights[term][half][part].
template <class T, int G, bool kMix, bool kFragmentOrder>
class RowFiller {
  public:
    KRON_DEVICE RowFiller(const Tokens<T>& x, const Weights<G>* mix, int terms, int term_inner, char* tile, int pitch)
        : x(x), mix(mix), terms(terms), term_inner(term_inner), tile(tile), pitch(pitch) {}

    KRON_DEVICE void fill(int64_t first, int tokens, int from, int length) const {
        if (!x.vector) return fill_scattered(first, tokens, from, length);
        if (!x.right || x.parts == 1) return fill_runs(first, tokens, from, length);
        switch (x.parts) {  // others are not x.vector
            case 2:
                return fill_interleaved<2>(first, tokens, from, length);
            case 4:
                return fill_interleaved<4>(first, tokens, from, length);
            case 8:
                return fill_interleaved<8>(first, tokens, from, length);
            case 16:
                return fill_interleaved<16>(first, tokens, from, length);
        }
    }

  private:
    struct Place {
        const T* token;
        const Weights<G>* mix;
        int k, first_part;  // of a half's rows, where they are parts
        bool there;
    };
    KRON_DEVICE Place place(int64_t token, int inner) const {
        int term = 0, k = inner;
        if (k >= term_inner) term = k / term_inner, k -= term * term_inner;
        const bool there = token < x.count && term < terms && k < x.width;
        const int half = int(token & (x.halves - 1));
        const int64_t row = x.halves == 2 ? token >> 1 : token;
        return Place{x.data + row * x.stride, mix + (term * x.halves + half) * x.parts, k, half * 8, there};
    }
    KRON_DEVICE char* row(int token, int g, int column) const {
        return tile + row_of<G, kFragmentOrder>(token, g) * pitch + column * int(sizeof(T));
    }

    // x_c lie one after another: each is read in words of 16 bytes.
    KRON_DEVICE void fill_runs(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T>;
        const int steps = length / N;
        for (int item = thread_index(); item < tokens * steps; item += threads_of_block()) {
            const int token = item / steps, column = item % steps * N;
            const Place p = place(first + token, from + column);
            float z[G][N] = {};
            if (p.there) {
                if constexpr (kMix) {
                    KRON_UNROLL_BY_4 for (int c = 0; c < x.parts; ++c) {
                        float v[N];
                        unpack_vector<T>(load_global(p.token + int64_t(c) * x.width + p.k), v, 0);
                        const Weights<G> w = p.mix[c];
                        KRON_UNROLL for (int g = 0; g < G; ++g) {
                            KRON_UNROLL for (int i = 0; i < N; ++i) z[g][i] += w.of[g] * v[i];
                        }
                    }
                } else {
                    KRON_UNROLL for (int g = 0; g < G; ++g) {
                        const int c = p.first_part + g;
                        if (c < x.parts) unpack_vector<T>(load_global(p.token + int64_t(c) * x.width + p.k), z[g], 0);
                    }
                }
            }
            KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(token, g, column), z[g]);
        }
    }

    // x_c lie value by value beside each other: whole words are read, of as many values k as make one, two at least.
    template <int kParts>
    KRON_DEVICE void fill_interleaved(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T> / kParts > 2 ? kVector<T> / kParts : 2, kValues = N * kParts;
        const int steps = length / N;
        for (int item = thread_index(); item < tokens * steps; item += threads_of_block()) {
            const int token = item / steps, column = item % steps * N;
            const Place p = place(first + token, from + column);
            float z[G][N] = {};
            if (p.there) {
                float v[kValues];
                KRON_UNROLL for (int i = 0; i < kValues; i += kVector<T>)
                    unpack_vector<T>(load_global(p.token + int64_t(p.k) * kParts + i), v, i);
                KRON_UNROLL for (int c = 0; c < kParts; ++c) {
                    if constexpr (kMix) {
                        const Weights<G> w = p.mix[c];
                        KRON_UNROLL for (int g = 0; g < G; ++g) {
                            KRON_UNROLL for (int i = 0; i < N; ++i) z[g][i] += w.of[g] * v[i * kParts + c];
                        }
                    } else {
                        const int g = c % 8;  // first_part is 0 or 8
                        if (g < G && p.first_part == c - g)
                            KRON_UNROLL for (int i = 0; i < N; ++i) z[g % G][i] = v[i * kParts + c];
                    }
                }
            }
            KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(token, g, column), z[g]);
        }
    }

    // Any sizes, strides and alignment, value by value.
    KRON_DEVICE void fill_scattered(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T>;
        const int steps = length / N;
        const int64_t step_part = x.right ? 1 : x.width, step_k = x.right ? x.parts : 1;
        KRON_NO_UNROLL for (int item = thread_index(); item < tokens * steps; item += threads_of_block()) {
            const int token = item / steps, column = item % steps * N;
            const Place p = place(first + token, from + column);
            float z[G][N] = {};
            const int parts = p.there ? x.parts : 0;
            KRON_NO_UNROLL for (int c = 0; c < parts; ++c) {
                KRON_UNROLL for (int i = 0; i < N; ++i) {
                    if (p.k + i >= x.width) continue;
                    const float v = to_float(p.token[c * step_part + (p.k + i) * step_k]);
                    KRON_UNROLL for (int g = 0; g < G; ++g) {
                        if constexpr (kMix)
                            z[g][i] += p.mix[c].of[g] * v;
                        else if (p.first_part + g == c)
                            z[g][i] = v;
                    }
                }
            }
            KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(token, g, column), z[g]);
        }
    }

    const Tokens<T>& x;
    const Weights<G>* mix;
    int terms, term_inner;
    char* tile;
    int pitch;
};

}  // namespace cuda
}  // namespace kron
