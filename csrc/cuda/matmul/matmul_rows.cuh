// Rows of a GEMM made of a tensor of tokens: its parts x_c as they are, or contracted with a tiny factor, in shared
// memory.
#pragma once

#include "cuda/common/memory.h"
#include "cuda/common/values.h"

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
// `term_inner` values, of which the first x.width are there; zeros elsewhere. `contract` has Weights[term][half][part].
template <class T, int G, bool kContract, bool kFragmentOrder>
class RowFiller {
  public:
    KRON_DEVICE RowFiller(const Tokens<T>& x, const Weights<G>* contract, int terms, int term_inner, char* tile,
                          int pitch)
        : x(x), contract(contract), terms(terms), term_inner(term_inner), tile(tile), pitch(pitch) {}

    KRON_DEVICE void fill(int64_t first, int tokens, int from, int length) const {
        if (!x.vector) return fill_scattered(first, tokens, from, length);
        if (!x.right || x.parts == 1) {
            if constexpr (kContract)
                contract_runs(first, tokens, from, length);
            else
                copy_runs(first, tokens, from, length);
            return;
        }
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
    // Some values of a token: where they come from, and where in the tile they go.
    struct Place {
        const T* token;
        int contract, k, first_part;  // contract: of the Weights; first_part: of a half's rows, where they are parts
        int row, column;
        bool there;  // or zeros
    };
    KRON_DEVICE Place place(int64_t first, int row, int from, int column) const {
        int64_t token = first + row;
        int term = 0, k = from + column;
        KRON_NO_UNROLL while (k >= term_inner) k -= term_inner, ++term;
        const bool there = token < x.count && term < terms && k < x.width;
        if (!there) term = k = 0, token = 0;
        const int half = int(token & (x.halves - 1));
        const T* data = x.data + (x.halves == 2 ? token >> 1 : token) * x.stride;
        return Place{data, (term * x.halves + half) * x.parts, k, half * 8, row, column, there};
    }

    // The items of a tile, `values` values of a token each, that a thread takes one after another.
    struct Items {
        KRON_DEVICE Items(int tokens, int length, int values)
            : tokens(tokens),
              steps(length / values),
              row(thread_index() / steps),
              step(thread_index() % steps),
              row_jump(threads_of_block() / steps),
              step_jump(threads_of_block() % steps) {}
        KRON_DEVICE bool left() const { return row < tokens; }
        KRON_DEVICE void next() {
            row += row_jump, step += step_jump;
            if (step >= steps) step -= steps, ++row;
        }
        int tokens, steps, row, step, row_jump, step_jump;
    };
    KRON_DEVICE char* row(int token, int g, int column) const {
        return tile + row_of<G, kFragmentOrder>(token, g) * pitch + column * int(sizeof(T));
    }

    // The next kItems of a thread's items.
    template <int kItems>
    KRON_DEVICE void take(Items& items, Place (&p)[kItems], int64_t first, int from, int values) const {
        KRON_UNROLL for (int i = 0; i < kItems; ++i) {
            p[i] = place(first, items.row, from, items.step * values);
            p[i].there = p[i].there && items.left();
            items.next();
        }
    }

    // x_c lie one after another: each is read in words of 16 bytes, four of them at a time.
    KRON_DEVICE void contract_runs(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T>, kItems = G <= 4 ? 2 : 1, kParts = 4 / kItems;
        Items items(tokens, length, N);
        KRON_NO_UNROLL while (items.left()) {
            Place p[kItems];
            take(items, p, first, from, N);
            float z[kItems][G][N] = {};
            KRON_NO_UNROLL for (int c = 0; c < x.parts; c += kParts) {
                Words4 words[kItems][kParts];
                KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                    KRON_UNROLL for (int u = 0; u < kParts; ++u) {
                        words[i][u] = load_global_if(p[i].token + int64_t(c + u) * x.width + p[i].k,
                                                     p[i].there && c + u < x.parts);
                    }
                }
                KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                    KRON_UNROLL for (int u = 0; u < kParts; ++u) {
                        if (c + u < x.parts) add_contracted(z[i], contract[p[i].contract + c + u], words[i][u]);
                    }
                }
            }
            KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                if (p[i].row >= tokens) continue;
                KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(p[i].row, g, p[i].column), z[i][g]);
            }
        }
    }
    // The same of rows that are parts: words as they are, eight at a time.
    KRON_DEVICE void copy_runs(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T>, kItems = 8 / G;
        Items items(tokens, length, N);
        KRON_NO_UNROLL while (items.left()) {
            Place p[kItems];
            Words4 words[kItems][G];
            take(items, p, first, from, N);
            KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                KRON_UNROLL for (int g = 0; g < G; ++g) {
                    const int part = p[i].first_part + g;
                    words[i][g] =
                        load_global_if(p[i].token + int64_t(part) * x.width + p[i].k, p[i].there && part < x.parts);
                }
            }
            KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                if (p[i].row >= tokens) continue;
                KRON_UNROLL for (int g = 0; g < G; ++g) {
                    if constexpr (sizeof(T) == 4) {
                        KRON_UNROLL for (uint32_t& w : words[i][g].w) w = to_tf32(bits_to_float(w));
                    }
                    store_shared(row(p[i].row, g, p[i].column), words[i][g]);
                }
            }
        }
    }
    KRON_DEVICE static void add_contracted(float (&z)[G][kVector<T>], const Weights<G>& w, const Words4& words) {
        float v[kVector<T>];
        unpack_vector<T>(words, v, 0);
        KRON_UNROLL for (int g = 0; g < G; ++g) {
            KRON_UNROLL for (int i = 0; i < kVector<T>; ++i) z[g][i] += w.of[g] * v[i];
        }
    }

    // x_c lie value by value beside each other: whole words are read, of as many values k as make one, two at least;
    // four words at a time.
    template <int kParts>
    KRON_DEVICE void fill_interleaved(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T> / kParts > 2 ? kVector<T> / kParts : 2, kValues = N * kParts;
        constexpr int kWords = kValues / kVector<T>, kItems = kWords >= 4 ? 1 : 4 / kWords;
        Items items(tokens, length, N);
        KRON_NO_UNROLL while (items.left()) {
            Place p[kItems];
            Words4 words[kItems][kWords];
            take(items, p, first, from, N);
            KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                KRON_UNROLL for (int u = 0; u < kWords; ++u) {
                    words[i][u] = load_global_if(p[i].token + int64_t(p[i].k) * kParts + u * kVector<T>, p[i].there);
                }
            }
            KRON_UNROLL for (int i = 0; i < kItems; ++i) {
                if (p[i].row >= tokens) continue;
                float v[kValues], z[G][N] = {};
                KRON_UNROLL for (int u = 0; u < kWords; ++u) unpack_vector<T>(words[i][u], v, u * kVector<T>);
                KRON_UNROLL for (int c = 0; c < kParts; ++c) {
                    if constexpr (kContract) {
                        const Weights<G> w = contract[p[i].contract + c];
                        KRON_UNROLL for (int g = 0; g < G; ++g) {
                            KRON_UNROLL for (int e = 0; e < N; ++e) z[g][e] += w.of[g] * v[e * kParts + c];
                        }
                    } else {
                        const int g = c % 8;  // first_part is 0, or 8 with G = 8
                        if (G == 8 ? p[i].first_part == c - g : c < G) {
                            KRON_UNROLL for (int e = 0; e < N; ++e) z[g % G][e] = v[e * kParts + c];
                        }
                    }
                }
                KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(p[i].row, g, p[i].column), z[g]);
            }
        }
    }

    // Any sizes, strides and alignment, value by value.
    KRON_DEVICE void fill_scattered(int64_t first, int tokens, int from, int length) const {
        constexpr int N = kVector<T>;
        const int64_t step_part = x.right ? 1 : x.width, step_k = x.right ? x.parts : 1;
        KRON_NO_UNROLL for (Items items(tokens, length, N); items.left(); items.next()) {
            const Place p = place(first, items.row, from, items.step * N);
            float z[G][N] = {};
            const int parts = p.there ? x.parts : 0;
            KRON_NO_UNROLL for (int c = 0; c < parts; ++c) {
                KRON_UNROLL for (int i = 0; i < N; ++i) {
                    if (p.k + i >= x.width) continue;
                    const float v = to_float(p.token[c * step_part + (p.k + i) * step_k]);
                    KRON_UNROLL for (int g = 0; g < G; ++g) {
                        if constexpr (kContract)
                            z[g][i] += contract[p.contract + c].of[g] * v;
                        else if (p.first_part + g == c)
                            z[g][i] = v;
                    }
                }
            }
            KRON_UNROLL for (int g = 0; g < G; ++g) store_row<T>(row(p.row, g, p.column), z[g]);
        }
    }

    const Tokens<T>& x;
    const Weights<G>* contract;
    int terms, term_inner;
    char* tile;
    int pitch;
};

}  // namespace cuda
}  // namespace kron
