// The right factor of an oriented problem, the one of the GEMM over all rows: its panels, packed or read in place.
#pragma once

#include "cpu/gemm/factors.h"
#include "cpu/gemm/packed.h"
#include "cpu/product/plan.h"
#include "cpu/product/stages.h"

namespace kron {
namespace KRON_ISA {

// G: how the GEMM is done (VectorGemm, AmxGemm) and in which type it reads its rows.
template <class C, class E, class G>
struct RightFactor {
    typedef typename G::Row Row;
    Factor source;
    int64_t terms, outputs, depth;  // (outputs, depth) a term
    int vectors;                    // of a panel
    const Row* panels;              // (terms, count) of (depth, width), or null: read in place, or packed by each task

    static constexpr int W = Simd<C>::W;

    RightFactor() = default;
    RightFactor(const Factor& source, int64_t terms, int64_t outputs, int64_t depth, int vectors)
        : source(source), terms(terms), outputs(outputs), depth(depth), vectors(vectors), panels(nullptr) {}

    int64_t width() const { return static_cast<int64_t>(vectors) * W; }
    int64_t count() const { return (outputs + width() - 1) / width(); }
    int64_t outputs_padded() const { return count() * width(); }  // a GEMM may write all lanes of its last panel
    int64_t panel_size() const { return G::panel_size(depth, vectors); }
    int64_t jobs() const { return terms * count(); }
    int64_t size() const { return jobs() * panel_size(); }
    bool small() const { return terms * outputs * depth <= kSerialPack; }
    int64_t lanes(int64_t panel) const {
        const int64_t left_over = outputs - panel * width();
        return left_over < width() ? left_over : width();
    }
    const E* data(int64_t s, int64_t panel) const {
        return static_cast<const E*>(source.data) + s * source.stride_term + panel * width() * source.stride_row;
    }
    void pack(int64_t s, int64_t panel, Row* out) const {
        G::pack(data(s, panel), source.stride_row, source.stride_col, lanes(panel), depth, vectors, out);
    }
    // All panels into `out`, which they are then read from.
    void pack_all(Row* out, const Executor& executor) {
        struct Job {
            const RightFactor* factor;
            Row* out;
        } job{this, out};
        const auto pack_one = [](void* arg, int64_t i) {
            const Job& j = *static_cast<const Job*>(arg);
            j.factor->pack(i / j.factor->count(), i % j.factor->count(), j.out + i * j.factor->panel_size());
        };
        if (small())
            for (int64_t i = 0; i < jobs(); ++i) pack_one(&job, i);
        else
            executor.run(jobs(), pack_one, &job);
        panels = out;
    }

    int64_t bytes() const { return size() * static_cast<int64_t>(sizeof(Row)); }
    PanelLayout layout(bool commuted) const {
        return {sizeof(Row), static_cast<uint8_t>(W), static_cast<uint8_t>(vectors), commuted};
    }
    // The panels that the caller has packed, or null. Throws where its bytes are of something else.
    const Row* packed_by(const Projection& projection, const Shape& shape, bool commuted) const {
        return static_cast<const Row*>(packed_panels(projection, shape, layout(commuted), bytes()));
    }

    // out (rows, lanes of the panel) = R (rows, depth) factor_s^T + start. A task that packs for itself gives the
    // memory for it.
    void multiply(int64_t s, int64_t panel, int64_t rows, const Row* R, int64_t step, Row* own_panel, C* out,
                  int64_t out_step, Start<C> start, Ahead* ahead) const {
        const int64_t lanes_here = lanes(panel);
        const int vectors_here = static_cast<int>((lanes_here + W - 1) / W);
        if (!panels && !own_panel) {
            dot_panel<C, E, Row>(rows, depth, R, step, data(s, panel), source.stride_row, lanes_here, vectors_here * W,
                                 out, out_step, start);
            return;
        }
        const Row* packed = own_panel ? own_panel : panels + (s * count() + panel) * panel_size();
        if (own_panel) pack(s, panel, own_panel);
        G::multiply(rows, depth, R, step, packed, width(), vectors_here, out, out_step, start, ahead);
    }
};

// Rows that a GEMM of whole blocks touches, and values of a row of `n` that it or whole vectors do.
template <class G>
static int64_t row_blocks(int64_t rows) {
    return (rows + G::kRowBlock - 1) / G::kRowBlock * G::kRowBlock;
}
template <class C, class G>
static int64_t row_values(int64_t n) {
    const int64_t whole = padded<C>(n), read = G::depth(n);
    return whole > read ? whole : read;
}

// A GEMM may read its rows in whole blocks of k: what lies between the `n` values of a row and the end of its last
// block becomes zero. (Whatever staging put there: times the panel's zeros, a NaN would still be one.)
template <class C, class G, class Row>
static void clear_row_tails(Row* rows, int64_t count, int64_t n, int64_t step) {
    const int64_t to = G::depth(n);
    if (n == to) return;
    for (int64_t r = 0; r < count; ++r) memset(rows + r * step + n, 0, static_cast<size_t>(to - n) * sizeof(Row));
}

}  // namespace KRON_ISA
}  // namespace kron
