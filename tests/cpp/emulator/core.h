// csrc/cuda/common/core.h on the emulated machine.
#pragma once

#include "emulator/machine.h"

namespace kron {
namespace cuda {
namespace device {

inline int thread_index() {
    return emulator::thread_index();
}
inline int threads_of_block() {
    return emulator::threads_of_block();
}
inline int block_x() {
    return emulator::block_index().x;
}
inline int block_y() {
    return emulator::block_index().y;
}
inline int block_z() {
    return emulator::block_index().z;
}
inline int blocks_x() {
    return emulator::grid_size().x;
}
inline int blocks_y() {
    return emulator::grid_size().y;
}
inline char* shared_memory() {
    return emulator::shared_memory();
}

inline void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!emulator::skipped("sync_threads", file, line)) emulator::barrier(0, 0, "sync_threads");
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulator::skipped("sync_warp", file, line)) return;
    int nothing = 0;
    emulator::together<int>("sync_warp", nothing, [](int* const*) {});
}

template <class T>
struct Shuffle {
    T in, out;
    int from;
};
template <class T>
inline T shuffle_from(T value, int from) {
    Shuffle<T> mine{value, value, from};
    emulator::together<Shuffle<T>>("shuffle", mine, [](Shuffle<T>* const* lanes) {
        for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[lanes[i]->from & 31]->in;
    });
    return mine.out;
}
inline float shuffle(float value, int lane) {
    return shuffle_from(value, lane);
}
inline uint32_t shuffle(uint32_t value, int lane) {
    return shuffle_from(value, lane);
}
inline float shuffle_xor(float value, int mask) {
    return shuffle_from(value, emulator::lane() ^ mask);
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
    return shuffle_from(value, emulator::lane() ^ mask);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
