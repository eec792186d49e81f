#include "cpu/gemm/packed.h"

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kron {
namespace {

constexpr uint64_t kMagic = 0x324b434150524bull;  // "KRPACK2"

std::string describe(const PackedHead& h) {
    const char* const dtypes[] = {"float32", "float64", "bfloat16", "float16"};
    std::ostringstream text;
    text << "a (" << h.terms << ", " << h.m1 << ", " << h.n1 << "), b (" << h.terms << ", " << h.m2 << ", " << h.n2
         << ") in " << (h.dtype >= 0 && h.dtype < 4 ? dtypes[h.dtype] : "an unknown dtype");
    return text.str();
}

bool same_factors(const PackedHead& one, const PackedHead& other) {
    return one.terms == other.terms && one.m1 == other.m1 && one.n1 == other.n1 && one.m2 == other.m2 &&
           one.n2 == other.n2 && one.dtype == other.dtype;
}

[[noreturn]] void fail(const PackedHead& wanted, const std::string& got) {
    throw std::invalid_argument("kron_kernels: packed: expected what kron_pack made of factors " + describe(wanted) +
                                " at instruction-set level " + isa_name(active_isa()) + " on this machine, got " + got +
                                "; make it again with optimize_for_inference");
}

}  // namespace

bool kron_packs_a(const void* packed) {
    PackedHead head;
    std::memcpy(&head, packed, sizeof head);
    return head.layout.packs_a != 0;
}

PackedHead packed_head(const Shape& s, PanelLayout layout) {
    PackedHead head{};
    head.magic = kMagic;
    head.terms = s.terms, head.m1 = s.m1, head.n1 = s.n1, head.m2 = s.m2, head.n2 = s.n2;
    head.dtype = static_cast<int32_t>(s.dtype);
    head.layout = layout;
    return head;
}

const void* packed_panels(const Projection& projection, const Shape& shape, PanelLayout layout, int64_t panel_bytes) {
    if (!projection.packed) return nullptr;
    const PackedHead wanted = packed_head(shape, layout);
    const int64_t bytes = static_cast<int64_t>(sizeof(PackedHead)) + panel_bytes;
    PackedHead found{};
    if (projection.packed_bytes >= static_cast<int64_t>(sizeof found))
        std::memcpy(&found, projection.packed, sizeof found);
    if (found.magic != kMagic) fail(wanted, "bytes of another origin");
    if (!same_factors(found, wanted)) fail(wanted, "those of " + describe(found));
    if (std::memcmp(&found, &wanted, sizeof found) != 0) fail(wanted, "the layout of another level");
    if (projection.packed_bytes != bytes)
        fail(wanted, std::to_string(projection.packed_bytes) + " bytes, not " + std::to_string(bytes));
    if (reinterpret_cast<uintptr_t>(projection.packed) % alignof(PackedHead) != 0)
        fail(wanted, "bytes that do not begin at a multiple of 64");
    return static_cast<const char*>(projection.packed) + sizeof(PackedHead);
}

}  // namespace kron
