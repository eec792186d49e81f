#include "cpu/isa/scratch.h"

#include <cstdlib>
#include <new>

#include "kron/problem.h"

namespace kron {
namespace {

struct Slot {
    void* memory = nullptr;
    size_t size = 0;
    ~Slot() { std::free(memory); }
    void* reserve(size_t bytes) {
        if (bytes > size) {
            const size_t rounded = (bytes + 4095) / 4096 * 4096;
            std::free(memory);
            size = 0;
            memory = std::aligned_alloc(64, rounded);
            if (!memory) throw std::bad_alloc();
            size = rounded;
        }
        return memory;
    }
};

thread_local Slot slots[3];
thread_local int64_t recorded = 0;

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
    return slots[static_cast<int>(slot)].reserve(bytes ? bytes : 64);
}

void record_scratch(int64_t bytes) {
    recorded = bytes;
}

int64_t last_scratch_bytes() {
    return recorded;
}

}  // namespace kron
