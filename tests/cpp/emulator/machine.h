// Runs the threads of a block on the processor, one at a time: each thread is a fiber with a stack of its own, and a
// seeded schedule says which runs until it next has to wait. A warp that may go on usually goes on: it runs as far
// ahead of the others as the barriers let it, so that a missing barrier shows. A block in which nobody can go on is an
// error that says who waits for what.
//
// On top of it stand core.h, memory.h and mma.h, which do on the processor what csrc/cuda/common does on the device.
// What they need of the machine is here: `wait_until` for anything a thread may wait for, `together` for what the 32
// lanes of a warp do as one, `fail` for what the device would not let pass.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Dim3 {
    int x, y, z;
};

// A call of a barrier or a wait in the source of a kernel.
struct Site {
    const char* what;
    const char* file;
    int line;
    int64_t calls;
};

struct Settings {
    uint64_t seed = 1;
    // The site, by its index in `sites()`, that does nothing: a planted mistake. None: -1.
    int skipped_site = -1;
};
// Of the kernels that run next.
Settings& settings();

// The sites met since the last `forget_sites`, in the order of their first call.
const std::vector<Site>& sites();
void forget_sites();
// True when the call at this place is to do nothing.
bool skipped(const char* what, const char* file, int line);

// Runs every block of the grid, in an order that the seed gives. Empty, or what went wrong.
std::string run(Dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& thread);

// ---- Of the thread that runs.
int thread_index();
int threads_of_block();
Dim3 block_index();
Dim3 grid_size();
int lane();
char* shared_memory();
int64_t shared_bytes();
// A number of bytes of state of its own that starts as zeros, one of `kStates` kinds.
enum State { copies_in_flight, products_in_flight, kStates };
template <class T>
T& state(State which);

// Ends the run: what the device would do wrong or leave undefined.
[[noreturn]] void fail(const std::string& what);
// True when [p, p + bytes) lies in the block's shared memory.
bool in_shared(const void* p, int64_t bytes);
// Fails unless p is a multiple of `bytes`.
void require_aligned(const void* p, int64_t bytes, const char* what);

// Lets the others run until `ready()`; `what` names it in the report of a deadlock.
void wait_until(const std::function<bool()>& ready, const char* what);
// Barrier number `id` of `count` threads: returns once so many have come. All threads of a block, count 0.
void barrier(int id, int count, const char* what);

// The 32 lanes of a warp come with their operands; the last one to come does `work(operands of the lanes)` for all.
// It fails when lanes of a warp come with different work.
void together(const char* what, void* operands, void (*work)(void* const* operands));

template <class Operands>
void together(const char* what, Operands& mine, void (*work)(Operands* const* lanes)) {
    struct Call {
        Operands* operands;
        void (*work)(Operands* const*);
    } call{&mine, work};
    together(what, &call, [](void* const* calls) {
        Operands* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Call*>(calls[i])->operands;
        static_cast<Call*>(calls[0])->work(lanes);
    });
}

void*& state_slot(State which, void (*destroy)(void*));
template <class T>
T& state(State which) {
    void*& slot = state_slot(which, [](void* p) { delete static_cast<T*>(p); });
    if (!slot) slot = new T();
    return *static_cast<T*>(slot);
}

}  // namespace emulator
