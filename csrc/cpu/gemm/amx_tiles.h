// Thin wrappers around the eight AMX tile registers, all used at full size (16 rows of 64 bytes). With KRON_AMX_EMULATE
// they are plain C++ instead, so that the kernel built on them is tested on machines without AMX.
#pragma once

#include "cpu/isa/simd.h"

namespace kron {
namespace KRON_ISA {

#if defined(KRON_AMX_EMULATE)

struct EmulatedTile {
    unsigned char bytes[16][64];
};
static thread_local EmulatedTile emulated_tiles[8];

static void tiles_begin() {
    memset(emulated_tiles, 0xff, sizeof emulated_tiles);
}
static void tiles_end() {}

template <int kTile>
static void tile_zero() {
    memset(&emulated_tiles[kTile], 0, sizeof(EmulatedTile));
}
template <int kTile>
static void tile_load(const void* from, int64_t step_bytes) {
    for (int r = 0; r < 16; ++r)
        memcpy(emulated_tiles[kTile].bytes[r], static_cast<const char*>(from) + r * step_bytes, 64);
}
template <int kTile>
static void tile_store(void* to, int64_t step_bytes) {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * step_bytes, emulated_tiles[kTile].bytes[r], 64);
}
// TDPBF16PS: C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1].
template <int kC, int kA, int kB>
static void tile_dot() {
    float c[16][16];
    bf16 a[16][32], b[16][32];
    memcpy(c, &emulated_tiles[kC], sizeof c);
    memcpy(a, &emulated_tiles[kA], sizeof a);
    memcpy(b, &emulated_tiles[kB], sizeof b);
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n)
                c[m][n] += to_float(a[m][2 * k]) * to_float(b[k][2 * n]) +
                           to_float(a[m][2 * k + 1]) * to_float(b[k][2 * n + 1]);
    memcpy(&emulated_tiles[kC], c, sizeof c);
}

#else

static void tiles_begin() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.column_bytes[t] = 64, config.rows[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
}
static void tiles_end() {
    asm volatile("tilerelease");
}

// The compiler's intrinsics take literal register numbers only; these take template arguments.
template <int kTile>
static KRON_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
static KRON_INLINE void tile_load(const void* from, int64_t step_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step_bytes), "i"(kTile) : "memory");
}
template <int kTile>
static KRON_INLINE void tile_store(void* to, int64_t step_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
static KRON_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

}  // namespace KRON_ISA
}  // namespace kron
