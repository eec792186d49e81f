// Scratch memory that a thread keeps between calls: a fresh allocation of a few hundred kilobytes would cost more in
// page faults than the products themselves. Compiled once, without instruction-set flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kron {

// block: what a block of several calls keeps between them. call: shared by all tasks of one call, owned by the calling
// thread. task: private to one worker. They are slots of their own because the calling thread is a worker too.
enum class ScratchSlot { call = 0, task = 1, block = 2 };

// 64-byte aligned, contents undefined, valid until the next request for the same slot by the same thread.
void* scratch(ScratchSlot slot, size_t bytes);

// Accounting for last_scratch_bytes(): the slots' sizes of one call, workers included.
void record_scratch(int64_t bytes);

// Hands out consecutive 64-byte aligned pieces of one block; construct it with null to only count.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
    template <class T>
    T* take(int64_t count) {
        char* piece = base_ ? base_ + used_ : nullptr;
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(piece);
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace kron
