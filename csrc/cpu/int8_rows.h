// A token's results as bytes: symmetric, one scale a token, made while the results are still in cache.
#pragma once

#include "simd.h"

namespace kron {
namespace KRON_ISA {

// What adding it does: the integer nearest to a value (ties to even) lands in the low bits of the sum.
template <class C>
constexpr C kRounder = __is_same(C, float) ? C(12582912) : C(6755399441055744);  // 1.5 * 2^23, 1.5 * 2^52

// The low byte of each lane. In one step GCC 12 would take the lanes one by one.
KRON_INLINE Simd<float>::B low_bytes(Simd<float>::I v) {
#if defined(__AVX512F__)
    return (Simd<float>::B)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
    return __builtin_convertvector(__builtin_convertvector(v, Simd<float>::S), Simd<float>::B);
#endif
}
KRON_INLINE Simd<double>::B low_bytes(Simd<double>::I v) {
    typedef Simd<double> D;
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, D::L), D::S), D::B);
}

// scale[t] = max |y[t]| / 127, q[t] = y[t] / scale[t] rounded to nearest even. A token of zeros has scale 0 and bytes
// 0; one with a NaN or an infinity, or whose scale float32 does not hold, has that scale (NaN, infinity, 0) and bytes
// 0.
template <class C>
struct Int8Rows {
    int8_t* q;  // (tokens, size); null: results are not wanted as bytes
    float* scale;

    typedef typename Simd<C>::I I;
    typedef typename Simd<C>::B Bytes;
    static constexpr int W = Simd<C>::W;

    // y: the results of `tokens` tokens from `first` on.
    void apply(const C* y, int64_t first, int64_t tokens, int64_t size) const {
        for (int64_t t = 0; t < tokens; ++t) row(y + t * size, size, q + (first + t) * size, scale + first + t);
    }

  private:
    // Of magnitudes the bits order as the values do, with infinity and then NaN at the top: neither is lost.
    static KRON_INLINE I larger(I one, Vec<C> v) {
        const I bits = (I)v & ~(I)splat<C>(C(-0.0));
        return bits > one ? bits : one;
    }

    static C largest(const C* y, int64_t size) {
        I most[2] = {};
        int64_t c = 0;
        for (; c + 2 * W <= size; c += 2 * W) {
            most[0] = larger(most[0], load<C>(y + c));
            most[1] = larger(most[1], load<C>(y + c + W));
        }
        for (; c < size; c += W)
            most[0] = larger(most[0], c + W <= size ? load<C>(y + c) : load_part<C, C>(y + c, size - c));
        const I both = larger(most[0], (Vec<C>)most[1]);
        auto top = both[0];
        for (int i = 1; i < W; ++i) top = both[i] > top ? both[i] : top;
        C value;
        memcpy(&value, &top, sizeof value);
        return value;
    }

    static KRON_INLINE Bytes quantise(Vec<C> y, Vec<C> scale) {
        Vec<C> v = y / scale;
        // A scale below the normal numbers is itself rounded: its largest value may come out above 127.
        const Vec<C> most = splat<C>(127), least = splat<C>(-127);
        v = v > most ? most : v;
        v = v < least ? least : v;
        return low_bytes((I)(v + splat<C>(kRounder<C>)));
    }

    static void row(const C* y, int64_t size, int8_t* to, float* scale_to) {
        const float scale = static_cast<float>(largest(y, size) / 127);
        *scale_to = scale;
        if (!(scale > 0 && scale <= __FLT_MAX__)) {
            memset(to, 0, static_cast<size_t>(size));
            return;
        }
        const Vec<C> step = splat<C>(static_cast<C>(scale));
        int64_t c = 0;
        for (; c + W <= size; c += W) *reinterpret_cast<Bytes*>(to + c) = quantise(load<C>(y + c), step);
        if (c == size) return;
        const Bytes rest = quantise(load_part<C, C>(y + c, size - c), step);
        for (int i = 0; c + i < size; ++i) to[c + i] = rest[i];
    }
};

}  // namespace KRON_ISA
}  // namespace kron
