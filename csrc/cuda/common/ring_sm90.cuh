// How a block of the Hopper kernels is fed: one thread of the first warpgroup loads, two warpgroups compute. Their
// tiles of factors go round in a ring of stages; the tile of x has a place of its own. The two take turns in issuing
// products, so that the tensor cores work for one while the other is busy with its results.
#pragma once

#include "cuda/common/tensor_map.h"

namespace kron {
namespace cuda {
namespace sm90 {

using namespace device;

constexpr int kThreads = 384;
constexpr int kRegistersToLoad = 24, kRegistersToCompute = 240;
constexpr int kTokens = 64;  // of a tile: two rows each, 32 tokens for a warpgroup
constexpr int kMostStages = 16;
constexpr int kSlab = 64;  // values in a row of 128 bytes

struct RingBarriers {
    Barrier x_full, x_empty;
    Barrier turn[2];
    Barrier full[kMostStages], empty[kMostStages];
};

// By one thread, before a barrier of the block.
KRON_DEVICE void init_ring(RingBarriers& b, int stages) {
    constexpr int kWarps = 8;  // that compute
    barrier_init(&b.x_full, 1);
    barrier_init(&b.x_empty, kWarps);
    for (int i = 0; i < 2; ++i) barrier_init(&b.turn[i], kWarps / 2);
    for (int i = 0; i < stages; ++i) barrier_init(&b.full[i], 1), barrier_init(&b.empty[i], kWarps);
    fence_barrier_init();
}

// A stage and the parity of its phase.
struct Place {
    int stage = 0, parity = 0;
    KRON_DEVICE void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

struct Ring {
    RingBarriers& b;
    char* memory;
    int stages;
};

// The thread that loads.
template <int kStageBytes>
struct Loader {
    Ring ring;
    Place place;
    int x_parity = 1;

    KRON_DEVICE explicit Loader(const Ring& ring) : ring(ring) {}
    KRON_DEVICE void wait_for_x_place(int bytes) {
        barrier_wait(&ring.b.x_empty, x_parity);
        barrier_arrive_expect(&ring.b.x_full, bytes);
        x_parity ^= 1;
    }
    // load(memory of the next stage, its barrier) has to load all of its bytes.
    template <class F>
    KRON_DEVICE void next_stage(F load) {
        barrier_wait(&ring.b.empty[place.stage], place.parity ^ 1);
        barrier_arrive_expect(&ring.b.full[place.stage], kStageBytes);
        load(ring.memory + place.stage * kStageBytes, &ring.b.full[place.stage]);
        place.next(ring.stages);
    }
};

// A thread that computes, of warpgroup `group`.
template <int kStageBytes>
struct Computer {
    Ring ring;
    int group;
    Place place;
    int before = -1;  // the stage whose products may still run
    int x_parity = 0, turn_parity;

    KRON_DEVICE Computer(const Ring& ring, int group) : ring(ring), group(group), turn_parity(group ^ 1) {}
    KRON_DEVICE static void arrive(Barrier* barrier) {
        if (thread_index() % 32 == 0) barrier_arrive(barrier);
    }
    KRON_DEVICE void wait_for_x() {
        barrier_wait(&ring.b.x_full, x_parity);
        x_parity ^= 1;
    }
    KRON_DEVICE void release_x() { arrive(&ring.b.x_empty); }
    KRON_DEVICE void take_turn() {
        wait_turn(&ring.b.turn[group], turn_parity);
        turn_parity ^= 1;
    }
    KRON_DEVICE void end_turn() { arrive(&ring.b.turn[group ^ 1]); }
    // Issues products(memory of the next stage). The stage before is given back when its products are over.
    template <class F>
    KRON_DEVICE void on_stage(F products) {
        barrier_wait(&ring.b.full[place.stage], place.parity);
        wgmma_fence();
        products(ring.memory + place.stage * kStageBytes);
        wgmma_commit();
        if (before >= 0) {
            wgmma_wait<1>();
            arrive(&ring.b.empty[before]);
        }
        before = place.stage;
        place.next(ring.stages);
    }
    KRON_DEVICE void finish() {
        wgmma_wait<0>();
        arrive(&ring.b.empty[before]);
        before = -1;
    }
};

// One thread does load(), each of the others that are of a warpgroup that computes compute(0 or 1).
template <class Load, class Compute>
KRON_DEVICE void run_roles(Load load, Compute compute) {
    if (thread_index() < 128) {
        give_registers<kRegistersToLoad>();
        if (thread_index() == 0) load();
    } else {
        take_registers<kRegistersToCompute>();
        compute(int(shuffle(uint32_t(thread_index() / 128), 0)) - 1);
    }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
