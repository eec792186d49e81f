// csrc/cuda/common/memory.h on the emulated machine. What cp_async copies arrives at the wait and not before, and what
// was at the place is gone from the start: NaNs are there meanwhile.
#pragma once

#include <cstring>
#include <deque>

#include "emulator/machine.h"

namespace kron {
namespace cuda {
namespace device {

struct Copy {
    void* to;
    int bytes;
    int64_t group;
    char data[16];
};
struct Copies {
    std::deque<Copy> list;
    int64_t committed = 0;  // groups
};

template <int kBytes>
inline void cp_async(void* to, const void* from, bool valid) {
    static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "cp.async copies 16, 8 or 4 bytes");
    if (!emulator::in_shared(to, kBytes)) emulator::fail("cp_async to an address outside the block's shared memory");
    emulator::require_aligned(to, kBytes, "cp_async");
    emulator::require_aligned(from, kBytes, "cp_async");
    Copies& copies = emulator::state<Copies>(emulator::copies_in_flight);
    Copy copy{to, kBytes, copies.committed, {}};
    if (valid) std::memcpy(copy.data, from, kBytes);
    std::memset(to, 0xff, kBytes);
    copies.list.push_back(copy);
}
inline void cp_async_commit() {
    ++emulator::state<Copies>(emulator::copies_in_flight).committed;
}
template <int kPending>
inline void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulator::skipped("cp_async_wait", file, line)) return;
    Copies& copies = emulator::state<Copies>(emulator::copies_in_flight);
    while (!copies.list.empty() && copies.list.front().group < copies.committed - kPending) {
        const Copy& copy = copies.list.front();
        std::memcpy(copy.to, copy.data, size_t(copy.bytes));
        copies.list.pop_front();
    }
}

template <class Words>
inline Words load_words(const void* p) {
    emulator::require_aligned(p, sizeof(Words), "a load");
    Words v;
    std::memcpy(&v, p, sizeof(Words));
    return v;
}
template <class Words>
inline void store_words(void* p, const Words& v) {
    emulator::require_aligned(p, sizeof(Words), "a store");
    std::memcpy(p, &v, sizeof(Words));
}
inline void require_shared(const void* p) {
    if (!emulator::in_shared(p, 16)) emulator::fail("an access of an address outside the block's shared memory");
}
inline Words4 load_global(const void* p) {
    return load_words<Words4>(p);
}
inline Words4 load_global_if(const void* p, bool there) {
    return there ? load_words<Words4>(p) : Words4{};
}
inline Words2 load_global8(const void* p) {
    return load_words<Words2>(p);
}
inline void store_global(void* p, const Words4& v) {
    store_words(p, v);
}
inline void store_global8(void* p, const Words2& v) {
    store_words(p, v);
}
inline Words4 load_shared(const void* p) {
    require_shared(p);
    return load_words<Words4>(p);
}
inline uint32_t load_word(const void* p) {
    return load_words<uint32_t>(p);
}
inline Words2 load_shared8(const void* p) {
    require_shared(p);
    return load_words<Words2>(p);
}
inline void store_shared(void* p, const Words4& v) {
    require_shared(p);
    store_words(p, v);
}

}  // namespace device
}  // namespace cuda
}  // namespace kron
