// Vectors of KRON_VEC_BYTES bytes on compiler vector extensions: one kernel source, compiled once per instruction set.
// Everything lives in the namespace KRON_ISA of the including file, and nothing from std:: is instantiated here, so
// that the linker can never pick a copy compiled for a newer processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kron/problem.h"

#if !defined(KRON_ISA) || !defined(KRON_VEC_BYTES)
#error "define KRON_ISA (a namespace) and KRON_VEC_BYTES before including the kernels"
#endif

#if defined(KRON_NEON)
#include <arm_neon.h>
#endif

#define KRON_INLINE inline __attribute__((always_inline))

namespace kron {
namespace KRON_ISA {

struct bf16 {
    uint16_t bits;
};
typedef Half f16;

template <class C>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(KRON_VEC_BYTES)));
    typedef float U __attribute__((vector_size(KRON_VEC_BYTES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(KRON_VEC_BYTES)));
    typedef uint16_t H __attribute__((vector_size(KRON_VEC_BYTES / 2), aligned(2), may_alias));
    static constexpr int W = KRON_VEC_BYTES / 4;
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(KRON_VEC_BYTES)));
    typedef double U __attribute__((vector_size(KRON_VEC_BYTES), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(KRON_VEC_BYTES)));
    static constexpr int W = KRON_VEC_BYTES / 8;
};

template <class C>
using Vec = typename Simd<C>::V;

template <class C>
KRON_INLINE Vec<C> splat(C value) {
    return value - Vec<C>{};  // x - 0 is x for every x, so this is a plain broadcast; x + 0 is not (-0)
}

// Lanes 0, 1, 2, ... of the index vector, to build shuffle masks.
template <class C>
KRON_INLINE typename Simd<C>::I iota() {
    typename Simd<C>::I r;
    for (int i = 0; i < Simd<C>::W; ++i) r[i] = i;
    return r;
}

KRON_INLINE float to_float(bf16 v) {
    uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
KRON_INLINE bf16 to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{static_cast<uint16_t>(f == f ? rounded : ((u >> 16) | 0x40u))};
}

// One element, storage type E <-> compute type C.
template <class C, class E>
KRON_INLINE C get(const E* p) {
    return static_cast<C>(*p);
}
template <>
KRON_INLINE float get<float, bf16>(const bf16* p) {
    return to_float(*p);
}
template <class C, class E>
KRON_INLINE void put(E* p, C v) {
    *p = static_cast<E>(v);
}
template <>
KRON_INLINE void put<float, bf16>(bf16* p, float v) {
    *p = to_bf16(v);
}

template <class C, class E>
struct Convert;

template <class C>
struct Convert<C, C> {
    static KRON_INLINE Vec<C> load(const C* p) { return *reinterpret_cast<const typename Simd<C>::U*>(p); }
    static KRON_INLINE void store(C* p, Vec<C> v) { *reinterpret_cast<typename Simd<C>::U*>(p) = v; }
};

template <>
struct Convert<float, bf16> {
    typedef Simd<float> S;
    typedef uint32_t U32 __attribute__((vector_size(KRON_VEC_BYTES)));
    static KRON_INLINE S::V load(const bf16* p) {
#if defined(KRON_NEON)  // one load and one widening shift, where GCC 12 would gather the lanes one by one
        return (S::V)vshll_n_u16(vld1_u16(&p->bits), 16);
#else
        const S::H h = *reinterpret_cast<const S::H*>(p);
        return (S::V)(__builtin_convertvector(h, U32) << 16);
#endif
    }
    static KRON_INLINE void store(bf16* p, S::V v) {
#if defined(__AVX512BF16__)
        // The same rounding, but a subnormal becomes zero.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
        const U32 u = (U32)v;
        const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const U32 nan = (u >> 16) | 0x40u;
        const U32 is_nan = (U32)(v != v);
        *reinterpret_cast<S::H*>(p) = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), S::H);
#endif
    }
};

template <>
struct Convert<float, f16> {
    typedef Simd<float> S;
#if defined(KRON_NEON)  // fcvtl and fcvtn
    static KRON_INLINE S::V load(const f16* p) { return vcvt_f32_f16(vld1_f16(p)); }
    static KRON_INLINE void store(f16* p, S::V v) { vst1_f16(p, vcvt_f16_f32(v)); }
#else
    static __attribute__((noinline)) S::V load(const f16* p) {
        S::V v;
        for (int i = 0; i < S::W; ++i) v[i] = static_cast<float>(p[i]);
        return v;
    }
    static __attribute__((noinline)) void store(f16* p, S::V v) {
        for (int i = 0; i < S::W; ++i) p[i] = static_cast<f16>(v[i]);
    }
#endif
};

template <class C, class E = C>
KRON_INLINE Vec<C> load(const E* p) {
    return Convert<C, E>::load(p);
}
template <class C, class E = C>
KRON_INLINE void store(E* p, Vec<C> v) {
    Convert<C, E>::store(p, v);
}

// The first `count` lanes from memory, zero elsewhere; never reads past them.
template <class C, class E>
static __attribute__((noinline)) Vec<C> load_part(const E* p, int64_t count) {
    Vec<C> v{};
    for (int i = 0; i < Simd<C>::W; ++i)
        if (i < count) v[i] = get<C, E>(p + i);
    return v;
}
template <class C, class E>
static __attribute__((noinline)) void store_part(E* p, Vec<C> v, int64_t count) {
    for (int i = 0; i < Simd<C>::W; ++i)
        if (i < count) put<C, E>(p + i, v[i]);
}

KRON_INLINE float square_root(float x) {
    return __builtin_sqrtf(x);
}
KRON_INLINE double square_root(double x) {
    return __builtin_sqrt(x);
}

template <class C>
KRON_INLINE C horizontal_sum(Vec<C> v) {
    // Pairwise halves: log2(W) dependent additions.
    constexpr int W = Simd<C>::W;
    C part[W];
    store<C>(part, v);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// zip: a0 b0 a1 b1 ...; unzip: the even and the odd lanes of the pair (a, b).
template <class C>
KRON_INLINE void zip(Vec<C>& a, Vec<C>& b) {
    constexpr int W = Simd<C>::W;
    const auto lane = iota<C>();
    const auto low = lane / 2 + (lane % 2) * W;
    const Vec<C> lo = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, low + W / 2);
    a = lo;
}
template <class C>
KRON_INLINE void unzip(Vec<C>& a, Vec<C>& b) {
    const auto lane = iota<C>();
    const Vec<C> even = __builtin_shuffle(a, b, lane * 2);
    b = __builtin_shuffle(a, b, lane * 2 + 1);
    a = even;
}

// Q rows of W lanes -> the Q*W values in lane-major order (row 0 lane 0, row 1 lane 0, ...): log2(Q) perfect shuffles.
// With Q == W this is a W x W transpose.
template <class C, int Q>
KRON_INLINE void interleave(Vec<C> (&v)[Q]) {
    static_assert((Q & (Q - 1)) == 0, "a power of two");
#pragma GCC unroll 8
    for (int stage = 1; stage < Q; stage *= 2) {
        Vec<C> next[Q];
#pragma GCC unroll 16
        for (int i = 0; i < Q / 2; ++i) {
            next[2 * i] = v[i];
            next[2 * i + 1] = v[i + Q / 2];
            zip<C>(next[2 * i], next[2 * i + 1]);
        }
#pragma GCC unroll 32
        for (int i = 0; i < Q; ++i) v[i] = next[i];
    }
}

// Sums of the lanes of N vectors, N a multiple of W, gathered in v[0 .. N/W); sum_vectors puts them in order. Perfect
// shuffles again, each folded in half by an addition: three instructions a sum.
template <class C, int N>
KRON_INLINE void sum_lanes(Vec<C> (&v)[N]) {
    constexpr int W = Simd<C>::W;
    static_assert(N % W == 0, "whole vectors of sums");
    constexpr int kOut = N / W;
#pragma GCC unroll 8
    for (int half = N / 2; half >= kOut; half /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            Vec<C> low = v[i], high = v[i + half];
            zip<C>(low, high);
            v[i] = low + high;
        }
}

// sums[n] = sum of the lanes of v[n].
template <class C, int N>
KRON_INLINE void sum_vectors(Vec<C> (&v)[N], C (&sums)[N]) {
    constexpr int W = Simd<C>::W;
    if constexpr (N % W == 0) {
        constexpr int kOut = N / W;
        sum_lanes<C, N>(v);
        C folded[N];
#pragma GCC unroll 4
        for (int p = 0; p < kOut; ++p) store<C>(folded + p * W, v[p]);
        // Vector q * kOut + p has gone into lane q of sum vector p.
        for (int n = 0; n < N; ++n) sums[n] = folded[n % kOut * W + n / kOut];
    } else {
        for (int n = 0; n < N; ++n) sums[n] = horizontal_sum<C>(v[n]);
    }
}

// The inverse of interleave.
template <class C, int Q>
KRON_INLINE void deinterleave(Vec<C> (&v)[Q]) {
    static_assert((Q & (Q - 1)) == 0, "a power of two");
#pragma GCC unroll 8
    for (int stage = 1; stage < Q; stage *= 2) {
        Vec<C> next[Q];
#pragma GCC unroll 16
        for (int i = 0; i < Q / 2; ++i) {
            next[i] = v[2 * i];
            next[i + Q / 2] = v[2 * i + 1];
            unzip<C>(next[i], next[i + Q / 2]);
        }
#pragma GCC unroll 32
        for (int i = 0; i < Q; ++i) v[i] = next[i];
    }
}

}  // namespace KRON_ISA
}  // namespace kron
