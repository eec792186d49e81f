// csrc/cuda/common/sm90.h on the emulated machine.
//
// What runs beside the threads is done at one of two moments, by chance: when it is issued, or when a thread waits for
// it; the places it writes hold NaNs until it is known to be over. A load too early for its target, or a read too early
// of its data or of an accumulator, thus goes wrong under one schedule or another.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator/machine.h"
#include "kron/cuda.h"

namespace emulator {

struct TensorMap {
    const char* data;
    int rank;
    int64_t size[3], stride[3];
    int box[3];
};

inline kron::cuda::Status make_tensor_map(TensorMap& map, const void* data, int rank, const int64_t* size,
                                          const int64_t* stride, const int* box) {
    const auto unsupported = [](const char* what) { return kron::cuda::Status{1, what}; };
    if (reinterpret_cast<uintptr_t>(data) % 16)
        return unsupported("a tensor map of an address that is no multiple of 16");
    if (box[0] != 64 && box[0] != 32) return unsupported("a tensor map of a box that is not 64 or 32 wide");
    map = TensorMap{static_cast<const char*>(data), rank, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}};
    for (int i = 0; i < rank; ++i) {
        if (size[i] < 1 || box[i] < 1 || box[i] > 256) return unsupported("a tensor map of a bad size");
        if (i > 0 && stride[i] % 8) return unsupported("a tensor map of a stride that is no multiple of 16 bytes");
        map.size[i] = size[i], map.stride[i] = stride[i], map.box[i] = box[i];
    }
    return kron::cuda::Status{0, ""};
}

// Whether what is issued now is done at once.
inline bool at_once() {
    static uint64_t count = 0;
    uint64_t z = (settings().seed * 0x9e3779b97f4a7c15ull) ^ (++count * 0xbf58476d1ce4e5b9ull);
    z = (z ^ (z >> 29)) * 0x94d049bb133111ebull;
    return z >> 62 & 1;
}

// Bits 4 and up of an address in a tile of rows of 128 bytes, or 64, after the swizzle.
inline int64_t swizzled(int64_t address, int row_bytes) {
    return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

}  // namespace emulator

namespace kron {
namespace cuda {

typedef emulator::TensorMap TensorMap;

namespace device {

typedef uint64_t Barrier;

// In the 8 bytes of a barrier.
struct BarrierState {
    uint16_t magic;
    uint8_t parity;
    uint8_t arrivals, missing;
    int32_t bytes;  // expected and not yet here, in units of 16
};
constexpr uint16_t kInitialised = 0x6b62;
inline BarrierState peek(const Barrier* barrier) {
    BarrierState s;
    uint8_t raw[8];
    std::memcpy(raw, barrier, 8);
    std::memcpy(&s.magic, raw, 2);
    s.parity = raw[2] & 1, s.missing = raw[2] >> 1, s.arrivals = raw[3];
    std::memcpy(&s.bytes, raw + 4, 4);
    return s;
}
// Only in a thread: `fail` does not return to whoever asks what a thread waits for.
inline BarrierState read_barrier(const Barrier* barrier, const char* what) {
    if (!emulator::in_shared(barrier, 8)) emulator::fail(std::string(what) + " outside the block's shared memory");
    const BarrierState s = peek(barrier);
    if (s.magic != kInitialised) emulator::fail(std::string(what) + " of a barrier without barrier_init");
    return s;
}
inline void write_barrier(Barrier* barrier, BarrierState s) {
    if (s.missing == 0 && s.bytes == 0) s.parity ^= 1, s.missing = s.arrivals;
    uint8_t raw[8];
    std::memcpy(raw, &s.magic, 2);
    raw[2] = uint8_t(s.parity | s.missing << 1), raw[3] = s.arrivals;
    std::memcpy(raw + 4, &s.bytes, 4);
    std::memcpy(barrier, raw, 8);
}

struct Load {
    char* to;
    TensorMap map;  // a copy: the thread that asked for the load may have returned, and its parameters with it
    Barrier* barrier;
    int64_t at[3];
};
// Issued and not done. Blocks run one after another.
inline std::deque<Load>& loads() {
    static std::deque<Load> list;
    return list;
}

inline void barrier_init(Barrier* barrier, int arrivals) {
    loads().clear();  // of a block that ended in an error
    const BarrierState s{kInitialised, 0, uint8_t(arrivals), uint8_t(arrivals), 0};
    write_barrier(barrier, s);
}
inline void fence_barrier_init() {}
inline void arrive(Barrier* barrier, int bytes, const char* what) {
    BarrierState s = read_barrier(barrier, what);
    if (s.missing == 0) emulator::fail(std::string(what) + " of more threads than the barrier counts");
    --s.missing, s.bytes += bytes;
    write_barrier(barrier, s);
}
inline void barrier_arrive(Barrier* barrier) {
    arrive(barrier, 0, "barrier_arrive");
}
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
    arrive(barrier, bytes, "barrier_arrive_expect");
}

inline void do_load(const Load& load) {
    const TensorMap& m = load.map;
    const int row_bytes = m.box[0] * 2;
    int64_t offset = load.to - emulator::shared_memory(), bytes = 0;
    for (int64_t k = 0; k < m.box[2]; ++k)
        for (int64_t j = 0; j < m.box[1]; ++j)
            for (int64_t i = 0; i < m.box[0]; i += 8, offset += 16, bytes += 16) {
                const int64_t c[3] = {load.at[0] + i, load.at[1] + j, load.at[2] + k};
                char* to = emulator::shared_memory() + emulator::swizzled(offset, row_bytes);
                std::memset(to, 0, 16);
                if (c[1] < 0 || c[1] >= m.size[1] || c[2] < 0 || c[2] >= m.size[2]) continue;
                for (int e = 0; e < 8; ++e)
                    if (c[0] + e >= 0 && c[0] + e < m.size[0])
                        std::memcpy(to + 2 * e, m.data + 2 * (c[0] + e + c[1] * m.stride[1] + c[2] * m.stride[2]), 2);
            }
    BarrierState s = peek(load.barrier);
    s.bytes -= int32_t(bytes);
    write_barrier(load.barrier, s);
}
inline void tma_load(void* to, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2 = 0) {
    const int64_t bytes = int64_t(map.box[0]) * 2 * map.box[1] * map.box[2];
    if (!emulator::in_shared(to, bytes)) emulator::fail("tma_load to an address outside the block's shared memory");
    if ((static_cast<char*>(to) - emulator::shared_memory()) % 1024)
        emulator::fail("tma_load to an address that is no multiple of 1024");
    read_barrier(barrier, "tma_load");
    const Load load{static_cast<char*>(to), map, barrier, {c0, c1, c2}};
    if (emulator::at_once()) return do_load(load);
    std::memset(to, 0xff, size_t(bytes));
    loads().push_back(load);
}
inline void tma_prefetch(const TensorMap&) {}

inline bool phase_over(Barrier* barrier, int parity) {
    if (peek(barrier).parity != parity) return true;
    for (size_t i = 0; i < loads().size();)
        if (loads()[i].barrier == barrier) {
            do_load(loads()[i]);
            loads().erase(loads().begin() + int64_t(i));
        } else {
            ++i;
        }
    return peek(barrier).parity != parity;
}
inline void wait_turn(Barrier* barrier, int parity) {
    read_barrier(barrier, "wait_turn");
    const std::function<bool()> over = [=] { return phase_over(barrier, parity); };
    emulator::wait_until(over, "a turn");
}
inline void barrier_wait(Barrier* barrier, int parity, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
    if (emulator::skipped("barrier_wait", file, line)) return;
    read_barrier(barrier, "barrier_wait");
    const std::string what = "barrier " + std::to_string(reinterpret_cast<char*>(barrier) - emulator::shared_memory());
    const std::function<bool()> over = [=] { return phase_over(barrier, parity); };
    emulator::wait_until(over, what.c_str());
}

template <int kCount>
inline void take_registers() {}
template <int kCount>
inline void give_registers() {}

inline int thread_index_again() {
    return emulator::thread_index();
}

// ---- Operands. What store_operand writes is for the tensor cores once fence_operands has been called.
struct OperandStore {
    void* to;
    Words4 words;
};
struct Product {
    float* d;
    int columns;
    uint64_t a, b;
    uint32_t words[4];
    bool a_in_registers, bf16;
    int64_t group;
};
// Of a thread.
struct Products {
    std::vector<OperandStore> stores;
    std::deque<Product> list;                      // not done
    std::map<float*, std::vector<float>> results;  // of accumulators under way
    std::map<float*, int64_t> last_group;          // of theirs
    int64_t committed = 0;
    bool fenced = false;
};
inline Products& products() {
    return emulator::state<Products>(emulator::products_in_flight);
}

inline void store_operand(void* p, const Words4& v) {
    require_shared(p);
    emulator::require_aligned(p, 16, "store_operand");
    std::memset(p, 0xff, 16);
    products().stores.push_back(OperandStore{p, v});
}
inline void fence_operands(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulator::skipped("fence_operands", file, line)) return;
    for (const OperandStore& store : products().stores) store_words(store.to, store.words);
    products().stores.clear();
}
template <int kRowBytes>
inline uint64_t operand(const void* tile) {
    const int64_t start = static_cast<const char*>(tile) - emulator::shared_memory();
    if (start % 1024) emulator::fail("an operand at an address that is no multiple of 1024");
    return uint64_t(kRowBytes == 128 ? 1 : 2) << 62 | uint64_t(kRowBytes * 8 / 16) << 32 | uint64_t(start) >> 4;
}
inline uint64_t part_of(uint64_t operand, int offset) {
    return operand + uint64_t(offset / 16);
}

// Row `row` of 16 values of what a descriptor describes.
inline void read_row(uint64_t descriptor, int row, bool bf16, float* values) {
    const int row_bytes = descriptor >> 62 == 1 ? 128 : 64;
    const int64_t eight_rows = int64_t(descriptor >> 32 & 0x3fff) * 16;
    const int64_t start = int64_t(descriptor & 0x3fff) * 16 + row / 8 * eight_rows + row % 8 * row_bytes;
    for (int chunk = 0; chunk < 2; ++chunk) {
        const char* p = emulator::shared_memory() + emulator::swizzled(start + chunk * 16, row_bytes);
        if (!emulator::in_shared(p, 16)) emulator::fail("wgmma of an operand outside the block's shared memory");
        uint32_t words[4];
        std::memcpy(words, p, 16);
        for (int i = 0; i < 4; ++i) {
            float* to = values + chunk * 8 + 2 * i;
            bf16 ? unpack<Bf16>(words[i], to[0], to[1]) : unpack<F16>(words[i], to[0], to[1]);
        }
    }
}

// The oldest product of each lane of a warp, which has 16 of the 64 rows.
inline void multiply_oldest(Products* const* lanes) {
    const Product first = lanes[0]->list.front();
    float a[16][16], b[16];
    const int warp = emulator::thread_index() / 32 % 4;
    for (int r = 0; r < 16 && !first.a_in_registers; ++r) read_row(first.a, warp * 16 + r, first.bf16, a[r]);
    float* d[32];
    for (int i = 0; i < 32; ++i) {
        const Product& mine = lanes[i]->list.front();
        if (mine.a != first.a || mine.b != first.b || mine.columns != first.columns || mine.bf16 != first.bf16)
            emulator::fail("lanes of a warp with different products");
        for (int w = 0; w < 4 && first.a_in_registers; ++w) {
            float* to = &a[i / 4 + w % 2 * 8][i % 4 * 2 + w / 2 * 8];
            first.bf16 ? unpack<Bf16>(mine.words[w], to[0], to[1]) : unpack<F16>(mine.words[w], to[0], to[1]);
        }
        d[i] = lanes[i]->results[mine.d].data();
        lanes[i]->list.pop_front();
    }
    for (int n = 0; n < first.columns; ++n) {
        read_row(first.b, n, first.bf16, b);
        for (int r = 0; r < 16; ++r) {
            float& sum = d[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
            for (int k = 0; k < 16; ++k) sum += a[r][k] * b[k];
        }
    }
}

template <class T>
inline void multiply_later(Product product) {
    Products& mine = products();
    if (!mine.results.count(product.d)) {
        if (!mine.fenced) emulator::fail("wgmma on registers without wgmma_fence");
        mine.results[product.d].assign(product.d, product.d + product.columns / 2);
        std::memset(product.d, 0xff, size_t(product.columns) * 2);
    }
    product.bf16 = std::is_same_v<T, Bf16>;
    product.group = mine.last_group[product.d] = mine.committed;
    mine.list.push_back(product);
    emulator::together<Products>("wgmma", mine, [](Products* const* lanes) {
        if (emulator::at_once())
            while (!lanes[0]->list.empty()) multiply_oldest(lanes);
    });
}
template <class T, int kCount>
inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b) {
    multiply_later<T>(Product{d, 2 * kCount, a, b, {}, false, false, 0});
}
template <class T, int kCount>
inline void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
    multiply_later<T>(Product{d, 2 * kCount, 0, b, {a[0], a[1], a[2], a[3]}, true, false, 0});
}

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!emulator::skipped("wgmma_fence", file, line)) products().fenced = true;
}
inline void wgmma_commit() {
    ++products().committed;
}
template <int kPending>
inline void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulator::skipped("wgmma_wait", file, line)) return;
    Products& mine = products();
    emulator::together<Products>("wgmma_wait", mine, [](Products* const* lanes) {
        while (!lanes[0]->list.empty() && lanes[0]->list.front().group < lanes[0]->committed - kPending)
            multiply_oldest(lanes);
    });
    mine.fenced = false;
    for (auto it = mine.results.begin(); it != mine.results.end();)
        if (mine.last_group[it->first] < mine.committed - kPending) {
            std::memcpy(it->first, it->second.data(), it->second.size() * 4);
            it = mine.results.erase(it);
        } else {
            ++it;
        }
}
template <int kCount>
inline void hold(float (&)[kCount]) {}

}  // namespace device
}  // namespace cuda
}  // namespace kron
