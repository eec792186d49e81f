// The end of a product: bias or base, activation, and the store of results held in registers.
#pragma once

#include "cuda/common/activation.h"
#include "cuda/matmul/matmul_rows.cuh"

namespace kron {
namespace cuda {

template <class T>
struct Results {
    const T *bias, *base;  // null: none
    T* y;
    Activation activation;
    bool vector;  // words of 16 bytes at multiples of 8 values
};

template <class T>
KRON_DEVICE void add_vector(const T* from, float (&v)[8]) {
    KRON_UNROLL for (int i = 0; i < 8; i += kVector<T>) {
        float more[8];
        // Not by load_global: base may be y, which the kernel writes.
        unpack_vector<T>(*reinterpret_cast<const Words4*>(from + i), more, i);
        KRON_UNROLL for (int j = 0; j < kVector<T>; ++j) v[i + j] += more[i + j];
    }
}

// Value i goes to y[row + column + i * step], for i < count.
template <class T>
KRON_DEVICE void store_results(const Results<T>& to, float (&v)[8], int64_t row, int64_t column, int step, int count) {
    if (count <= 0) return;
    const bool whole = to.vector && step == 1 && count >= 8;
    T* y = to.y + row + column;
    if (whole) {
        if (to.bias) add_vector(to.bias + column, v);
        if (to.base) add_vector(to.base + row + column, v);
    } else {
        KRON_UNROLL for (int i = 0; i < 8; ++i) {
            if (i >= count) continue;
            if (to.bias) v[i] += to_float(to.bias[column + int64_t(i) * step]);
            if (to.base) v[i] += to_float(to.base[row + column + int64_t(i) * step]);
        }
    }
    if (to.activation != Activation::none) KRON_UNROLL for (int i = 0; i < 8; ++i) v[i] = activate(to.activation, v[i]);
    if (!whole) {
        KRON_UNROLL for (int i = 0; i < 8; ++i) if (i < count) y[int64_t(i) * step] = from_float<T>(v[i]);
        return;
    }
    KRON_UNROLL for (int i = 0; i < 8; i += kVector<T>) {
        Words4 words;
        KRON_UNROLL for (int j = 0; j < 4; ++j) {
            if constexpr (sizeof(T) == 4)
                words.w[j] = float_to_bits(v[i + j]);
            else
                words.w[j] = pack<T>(v[i + 2 * j], v[i + 2 * j + 1]);
        }
        store_global(y + i, words);
    }
}

}  // namespace cuda
}  // namespace kron
