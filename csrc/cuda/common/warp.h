// What the lanes of a warp do together beyond shuffles.
#pragma once

#include "cuda/common/core.h"

namespace kron {
namespace cuda {
namespace device {

#ifdef __CUDACC__
KRON_DEVICE bool all_of_warp(bool value) {
    return __all_sync(0xffffffffu, value);
}
#else
inline bool all_of_warp(bool value) {
    struct Vote {
        bool mine, all;
    } vote{value, true};
    emulator::together<Vote>("all_of_warp", vote, [](Vote* const* lanes) {
        bool all = true;
        for (int i = 0; i < 32; ++i) all = all && lanes[i]->mine;
        for (int i = 0; i < 32; ++i) lanes[i]->all = all;
    });
    return vote.all;
}
#endif

// The values of a warp's lanes put together by a commutative function.
template <class F>
KRON_DEVICE float over_warp(float value, F combine) {
    KRON_UNROLL
    for (int mask = 16; mask; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    return value;
}

// Of four neighbouring lanes, lane `t` among them: word i of lane t becomes word t of lane i.
KRON_DEVICE void transpose_quad(uint32_t (&word)[4], int t) {
    KRON_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) KRON_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i & mask) continue;
        const bool upper = t & mask;
        const uint32_t other = shuffle_xor(upper ? word[i] : word[i | mask], mask);
        (upper ? word[i] : word[i | mask]) = other;
    }
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
