#include "emulator/machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kLanes = 32;

enum class Mode { ready, waiting, at_barrier, with_warp, done };

struct Fiber {
    ucontext_t context;
    Mode mode;
    const char* waits_for;
    const std::function<bool()>* until;
    void* states[kStates];
};

struct Warp {
    int arrived;
    const char* what;
    void* operands[kLanes];
};

struct Barrier {
    int arrived = 0;
};

struct Deleter {
    void (*destroy)(void*) = nullptr;
};

struct Machine {
    Settings settings;
    std::vector<Site> sites;

    std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<int> order;  // of the warps: who goes on first
    std::map<int, Barrier> barriers;
    Deleter deleters[kStates];
    ucontext_t outside;  // of the threads: run_block
    int running = 0, threads = 0;
    Dim3 grid{}, block{};
    char* shared = nullptr;
    int64_t shared_bytes = 0;
    const std::function<void()>* thread = nullptr;
    std::string error;
    uint64_t random_state = 1;

    uint64_t random() {  // splitmix64
        uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    Fiber& current() { return *fibers[size_t(running)]; }
    // Lets others run: returns when this thread is chosen again.
    void yield();
    void draw_priorities() {
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    }
    // A thread that may run: of the warp that comes first, unless chance wants another one. -1: none.
    int choose();
    void describe_deadlock();
    void run_block();
};

Machine& machine() {
    static Machine m;
    return m;
}

void enter() {
    Machine& m = machine();
    (*m.thread)();
    m.current().mode = Mode::done;
    m.yield();
}

void Machine::yield() {
    ucontext_t& here = current().context;
    const int next = error.empty() ? choose() : -1;
    if (next < 0) {
        swapcontext(&here, &outside);
        return;
    }
    running = next;
    current().mode = Mode::ready;
    if (&current().context != &here) swapcontext(&here, &current().context);
}

int Machine::choose() {
    const size_t warp_count = warps.size();
    const size_t turn = random() % 64 ? 0 : random() % warp_count;
    // A thread waiting for something in memory is asked now and then, and when nobody else can run.
    for (const bool ask : {random() % 16 == 0, true})
        for (size_t n = 0; n < warp_count; ++n) {
            const int w = order[(n + turn) % warp_count];
            const int first = int(random() % kLanes);
            for (int i = 0; i < kLanes; ++i) {
                const int index = w * kLanes + (first + i) % kLanes;
                Fiber& fiber = *fibers[size_t(index)];
                if (fiber.mode == Mode::ready) return index;
                if (ask && fiber.mode == Mode::waiting && (*fiber.until)()) return index;
            }
        }
    return -1;
}

void Machine::describe_deadlock() {
    std::map<std::string, std::vector<int>> waiting;
    for (int i = 0; i < threads; ++i) {
        const Fiber& fiber = *fibers[size_t(i)];
        waiting[fiber.mode == Mode::done ? "nothing: it has ended" : fiber.waits_for].push_back(i);
    }
    error = "deadlock:";
    for (const auto& [what, who] : waiting)
        error += " " + std::to_string(who.size()) + " threads (the first is " + std::to_string(who[0]) + ") wait for " +
                 what + ";";
    error.back() = '.';
}

void Machine::run_block() {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, size_t(std::max<int64_t>(shared_bytes, 1)))) std::abort();
    shared = static_cast<char*>(memory);
    std::memset(shared, 0xff, size_t(shared_bytes));  // NaNs
    warps.assign(size_t(threads / kLanes), Warp{});
    barriers.clear();
    order.clear();
    for (int w = 0; w < threads / kLanes; ++w) order.push_back(w);
    draw_priorities();
    while (int(fibers.size()) < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        stacks.push_back(std::unique_ptr<char[]>(new char[kStackBytes]));
    }
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[size_t(i)];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[size_t(i)].get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        fiber.mode = Mode::ready;
        makecontext(&fiber.context, enter, 0);
    }
    running = choose();
    swapcontext(&outside, &current().context);
    const auto ended = [](const std::unique_ptr<Fiber>& f) { return f->mode == Mode::done; };
    if (error.empty() && !std::all_of(fibers.begin(), fibers.begin() + threads, ended)) describe_deadlock();
    for (int i = 0; i < threads; ++i)
        for (int s = 0; s < kStates; ++s) {
            void*& slot = fibers[size_t(i)]->states[s];
            if (slot) deleters[s].destroy(slot);
            slot = nullptr;
        }
    std::free(memory);
}

}  // namespace

Settings& settings() {
    return machine().settings;
}
const std::vector<Site>& sites() {
    return machine().sites;
}
void forget_sites() {
    machine().sites.clear();
}

bool skipped(const char* what, const char* file, int line) {
    Machine& m = machine();
    size_t i = 0;
    while (i < m.sites.size() &&
           !(m.sites[i].line == line && !std::strcmp(m.sites[i].what, what) && !std::strcmp(m.sites[i].file, file)))
        ++i;
    if (i == m.sites.size()) m.sites.push_back(Site{what, file, line, 0});
    ++m.sites[i].calls;
    return int(i) == m.settings.skipped_site;
}

std::string run(Dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
    Machine& m = machine();
    if (threads <= 0 || threads > 1024 || threads % kLanes)
        return "a block of " + std::to_string(threads) + " threads, expected a multiple of 32 up to 1024";
    if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0 || grid.y > 65535 || grid.z > 65535)
        return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
               " blocks, expected 1 and more, and at most 65535 along y and z";
    m.grid = grid;
    m.threads = threads;
    m.shared_bytes = shared_bytes;
    m.thread = &thread;
    m.error.clear();
    m.random_state = m.settings.seed;
    std::vector<Dim3> blocks;
    for (int z = 0; z < grid.z; ++z)
        for (int y = 0; y < grid.y; ++y)
            for (int x = 0; x < grid.x; ++x) blocks.push_back(Dim3{x, y, z});
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[m.random() % i]);
    for (const Dim3& block : blocks) {
        m.block = block;
        m.run_block();
        if (!m.error.empty())
            return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                   std::to_string(block.z) + "): " + m.error;
    }
    return {};
}

int thread_index() {
    return machine().running;
}
int threads_of_block() {
    return machine().threads;
}
Dim3 block_index() {
    return machine().block;
}
Dim3 grid_size() {
    return machine().grid;
}
int lane() {
    return machine().running % kLanes;
}
char* shared_memory() {
    return machine().shared;
}
int64_t shared_bytes() {
    return machine().shared_bytes;
}

void fail(const std::string& what) {
    Machine& m = machine();
    m.error = "thread " + std::to_string(m.running) + ": " + what;
    for (;;) m.yield();
}

bool in_shared(const void* p, int64_t bytes) {
    const char* c = static_cast<const char*>(p);
    return c >= shared_memory() && c + bytes <= shared_memory() + shared_bytes();
}

void require_aligned(const void* p, int64_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes))
        fail(std::string(what) + " of an address that is no multiple of " + std::to_string(bytes));
}

void wait_until(const std::function<bool()>& ready, const char* what) {
    Machine& m = machine();
    Fiber& fiber = m.current();
    fiber.mode = Mode::waiting;
    fiber.until = &ready;
    fiber.waits_for = what;
    m.yield();
}

void barrier(int id, int count, const char* what) {
    Machine& m = machine();
    Barrier& barrier = m.barriers[id];
    Fiber& fiber = m.current();
    fiber.mode = Mode::at_barrier;
    fiber.waits_for = what;
    // Which barrier a fiber waits at is told by its operand: the barrier itself.
    fiber.until = reinterpret_cast<const std::function<bool()>*>(&barrier);
    if (++barrier.arrived == (count ? count : m.threads)) {
        barrier.arrived = 0;
        for (int i = 0; i < m.threads; ++i) {
            Fiber& other = *m.fibers[size_t(i)];
            if (other.mode == Mode::at_barrier && other.until == fiber.until) other.mode = Mode::ready;
        }
        m.draw_priorities();
    }
    m.yield();
}

void together(const char* what, void* operands, void (*work)(void* const* operands)) {
    Machine& m = machine();
    const int first = m.running / kLanes * kLanes;
    Warp& warp = m.warps[size_t(m.running / kLanes)];
    if (warp.arrived && std::strcmp(warp.what, what))
        fail(std::string("a lane of a warp came to ") + what + " while others wait at " + warp.what);
    warp.what = what;
    warp.operands[m.running - first] = operands;
    m.current().mode = Mode::with_warp;
    m.current().waits_for = what;
    if (++warp.arrived < kLanes) return m.yield();
    warp.arrived = 0;
    work(warp.operands);
    for (int i = first; i < first + kLanes; ++i) m.fibers[size_t(i)]->mode = Mode::ready;
}

void*& state_slot(State which, void (*destroy)(void*)) {
    machine().deleters[which].destroy = destroy;
    return machine().current().states[which];
}

}  // namespace emulator
