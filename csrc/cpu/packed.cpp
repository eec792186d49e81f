#include "packed.h"

#include <cstring>

namespace kron {
namespace {

constexpr uint64_t kMagic = 0x314b434150524bull;  // "KRPACK1"
constexpr int64_t kSamples = 64;

// 64 elements spread over a factor, or all of a small one. Reading more would cost as much as packing.
uint64_t sample(const Factor& factor, int64_t terms, int64_t rows, int64_t cols, DType dtype, uint64_t hash) {
    const int64_t size = size_of(dtype);
    const int64_t count = terms * rows * cols, samples = count < kSamples ? count : kSamples;
    const char* data = static_cast<const char*>(factor.data);
    for (int64_t i = 0; i < samples; ++i) {
        // Spread over rows and columns alike: i-th of equal shares, moved on by a little more each time.
        const int64_t at = samples == count ? i : (i * (count / samples) + i * 7) % count;
        const int64_t s = at / (rows * cols), r = at / cols % rows, c = at % cols;
        uint64_t bits = 0;
        std::memcpy(&bits, data + size * (s * factor.stride_term + r * factor.stride_row + c * factor.stride_col),
                    static_cast<size_t>(size));
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull;
        hash ^= hash >> 32;
    }
    return hash;
}

}  // namespace

PackedHead packed_head(const Shape& s, const Factor& a, const Factor& b, int32_t layout) {
    PackedHead head{};
    head.magic = kMagic;
    head.terms = s.terms, head.m1 = s.m1, head.n1 = s.n1, head.m2 = s.m2, head.n2 = s.n2;
    head.dtype = static_cast<int32_t>(s.dtype);
    head.layout = layout;
    head.values = sample(b, s.terms, s.m2, s.n2, s.dtype, sample(a, s.terms, s.m1, s.n1, s.dtype, kMagic));
    return head;
}

const void* packed_panels(const Projection& projection, const Shape& shape, int32_t layout, int64_t panel_bytes) {
    if (!projection.packed || projection.packed_bytes != static_cast<int64_t>(sizeof(PackedHead)) + panel_bytes ||
        reinterpret_cast<uintptr_t>(projection.packed) % 64 != 0)
        return nullptr;
    PackedHead found;
    std::memcpy(&found, projection.packed, sizeof found);
    const PackedHead wanted = packed_head(shape, projection.a, projection.b, layout);
    if (std::memcmp(&found, &wanted, sizeof found) != 0) return nullptr;
    return static_cast<const char*>(projection.packed) + sizeof(PackedHead);
}

}  // namespace kron
