// y = activation((sum_s A_s (x) B_s) x + bias), one tile of tokens and one panel of outputs at a time. See plan.h for the
// two layouts and orders; here everything is already oriented: `left` (m1, n1), `right` (m2, n2).
#pragma once

#include "factors.h"
#include "plan.h"
#include "scratch.h"
#include "stages.h"

namespace kron {
namespace KRON_ISA {

template <class C, class E>
struct Forward {
    Plan plan;
    const E* x;
    int64_t x_stride;
    E* y;
    Activation activation;
    Factor left, right;
    int64_t n1_original, n2_original;

    bool staged_x;    // x copied (converted, transposed or padded) into the tile
    bool direct_y;    // the last product writes y itself
    C* left_compact;  // (S, n1, m1)
    C* panels;        // (S, panels) of (n2, panel width)
    C* bias;          // (m1*m2,) in y's layout, or null

    int64_t width() const { return static_cast<int64_t>(plan.panel_vectors) * Simd<C>::W; }
    int64_t panel_size() const { return plan.n2 * width(); }
    int64_t x_row_step() const { return staged_x ? row_step<C>(plan.n2) : plan.n2; }
    int64_t u_row_step() const { return row_step<C>(plan.terms * padded<C>(plan.n2)); }

    // Scratch of one task, laid out by a Carver (which only counts when its base is null).
    struct Tile {
        C *x, *middle, *out;
    };
    Tile carve(Carver& c) const {
        const int64_t t = plan.tile_tokens;
        Tile tile{};
        if (staged_x) tile.x = c.take<C>(t * plan.n1 * x_row_step());
        tile.middle = plan.right_first ? c.take<C>(t * plan.n1 * width()) : c.take<C>(t * plan.m1 * u_row_step());
        if (!direct_y) tile.out = c.take<C>(t * plan.m1 * width());
        return tile;
    }

    // Rows of the right factor's GEMM for one panel; vectors < plan.panel_vectors in a narrower last panel.
    void right_product(int64_t s, int64_t panel, int vectors, int64_t rows, const C* R, int64_t step, C* out,
                       int64_t out_step, Start<C> start) const {
        const int64_t lane = panel * width();
        if (plan.packed) {
            gemm_rows<C, false>(rows, plan.n2, R, step, panels + (s * plan.panels + panel) * panel_size(),
                                width(), vectors, out, out_step, start);
        } else {
            const int64_t lanes = plan.m2 - lane < width() ? plan.m2 - lane : width();
            const E* F = static_cast<const E*>(right.data) + s * right.stride_term + lane * right.stride_row;
            dot_panel<C, E>(rows, plan.n2, R, step, F, right.stride_row, lanes, vectors * Simd<C>::W, out, out_step, start);
        }
    }

    // out[t] (m1, lanes) = start + left_s in[t] (n1, lanes) for every token of the tile.
    void left_product(int64_t s, int vectors, int64_t tokens, const C* in, int64_t in_step, int64_t in_token, C* out,
                      int64_t out_step, int64_t out_token, Start<C> start) const {
        const C* left_s = left_compact + s * plan.m1 * plan.n1;
        for (int64_t t = 0; t < tokens; ++t)
            gemm_rows<C, true>(plan.m1, plan.n1, left_s, plan.m1, in + t * in_token, in_step, vectors, out + t * out_token,
                               out_step, start);
    }

    void finish(int64_t first, int64_t tokens, int64_t panel, const C* out) const {
        const int64_t lane = panel * width();
        const int64_t lanes = plan.m2 - lane < width() ? plan.m2 - lane : width();
        const int64_t outputs = plan.m1 * plan.m2;
        const Finish<C> how{bias, activation};
        if (plan.commuted)
            finish_transposed<C, E>(out, width(), tokens, lanes, plan.m1, y + first * outputs + lane * plan.m1, outputs, how,
                                    lane * plan.m1);
        else
            finish_rows<C, E>(out, width(), tokens * plan.m1, lanes, y + first * outputs + lane, plan.m2, how, lane, plan.m2,
                              plan.m1);
    }

    const C* stage_x(int64_t first, int64_t tokens, const Tile& tile) const {
        if (!staged_x) return reinterpret_cast<const C*>(x) + first * x_stride;
        const E* from = x + first * x_stride;
        if (plan.commuted) {
            stage_transposed<C, E>(from, x_stride, tokens, n1_original, n2_original, tile.x, x_row_step());
        } else {
            for (int64_t t = 0; t < tokens; ++t)
                stage_rows<C, E>(from + t * x_stride, plan.n2, plan.n1, plan.n2, tile.x + t * plan.n1 * x_row_step(),
                                 x_row_step());
        }
        return tile.x;
    }

    void run(int64_t index) const {
        const int64_t token_tile = index / plan.panel_groups, group = index % plan.panel_groups;
        const int64_t first = token_tile * plan.tile_tokens;
        const int64_t tokens = plan.tokens - first < plan.tile_tokens ? plan.tokens - first : plan.tile_tokens;
        const int64_t from = group * plan.panels / plan.panel_groups, to = (group + 1) * plan.panels / plan.panel_groups;
        Carver count(nullptr);
        carve(count);
        Carver carver(scratch(ScratchSlot::task, count.used()));
        const Tile tile = carve(carver);
        const C* rows = stage_x(first, tokens, tile);
        if (!plan.right_first) {
            const int64_t n2_vectors = (plan.n2 + Simd<C>::W - 1) / Simd<C>::W;
            for (int64_t s = 0; s < plan.terms; ++s)
                for (int64_t v = 0; v < n2_vectors; v += 2)
                    left_product(s, n2_vectors - v < 2 ? 1 : 2, tokens, rows + v * Simd<C>::W, x_row_step(),
                                 plan.n1 * x_row_step(), tile.middle + s * padded<C>(plan.n2) + v * Simd<C>::W,
                                 u_row_step(), plan.m1 * u_row_step(), Start<C>{});
        }
        for (int64_t panel = from; panel < to; ++panel) {
            const int64_t lane = panel * width();
            const int64_t lanes = plan.m2 - lane < width() ? plan.m2 - lane : width();
            const int vectors = static_cast<int>((lanes + Simd<C>::W - 1) / Simd<C>::W);
            C* out = direct_y ? reinterpret_cast<C*>(y) + first * plan.m1 * plan.m2 + lane : tile.out;
            const int64_t out_step = direct_y ? plan.m2 : width();
            Start<C> start;
            if (direct_y && bias) start = Start<C>{bias + lane, plan.m2, plan.m1, false};
            for (int64_t s = 0; s < plan.terms; ++s) {
                if (s > 0) start = Start<C>{nullptr, 0, 1, true};
                if (plan.right_first) {
                    right_product(s, panel, vectors, tokens * plan.n1, rows, x_row_step(), tile.middle, width(), Start<C>{});
                    left_product(s, vectors, tokens, tile.middle, width(), plan.n1 * width(), out, out_step,
                                 plan.m1 * out_step, start);
                } else {
                    right_product(s, panel, vectors, tokens * plan.m1, tile.middle + s * padded<C>(plan.n2), u_row_step(),
                                  out, out_step, start);
                }
            }
            if (!direct_y)
                finish(first, tokens, panel, out);
            else if (activation != Activation::none)
                finish_rows<C, C>(out, out_step, tokens * plan.m1, lanes, out, out_step, Finish<C>{nullptr, activation}, 0,
                                  0, 1);
        }
    }

    void pack(int64_t index) const {
        const int64_t s = index / plan.panels, panel = index % plan.panels, lane = panel * width();
        const int64_t lanes = plan.m2 - lane < width() ? plan.m2 - lane : width();
        const E* M = static_cast<const E*>(right.data) + s * right.stride_term + lane * right.stride_row;
        pack_panel<C, E>(M, right.stride_row, right.stride_col, lanes, plan.n2, plan.panel_vectors,
                         panels + index * panel_size());
    }
};

template <class C, class E>
static void forward(const ForwardArgs& args, const Executor& executor) {
    typedef Forward<C, E> F;
    const Shape& shape = args.shape;
    const Machine machine{Simd<C>::W, kMaxRows[2], executor.threads, args.b.stride_col == 1, args.a.stride_col == 1};
    F f{};
    f.plan = plan_forward(shape, machine);
    f.x = static_cast<const E*>(args.x);
    f.x_stride = args.x_stride;
    f.y = static_cast<E*>(args.y);
    f.activation = args.activation;
    f.left = f.plan.commuted ? args.b : args.a;
    f.right = f.plan.commuted ? args.a : args.b;
    f.n1_original = shape.n1, f.n2_original = shape.n2;
    constexpr bool same = __is_same(C, E);
    const bool whole_rows = f.plan.right_first || f.plan.n2 % Simd<C>::W == 0;
    f.staged_x = !same || f.plan.commuted || !whole_rows || args.x_stride != shape.n1 * shape.n2;
    f.direct_y = same && !f.plan.commuted && f.plan.m2 % Simd<C>::W == 0;

    const int64_t all_panels = shape.terms * f.plan.panels;
    C* left_compact = nullptr;
    C* bias = nullptr;
    const auto carve = [&](Carver& c) {
        left_compact = c.take<C>(shape.terms * f.plan.m1 * f.plan.n1);
        if (args.bias) bias = c.take<C>(shape.m1 * shape.m2);
        if (f.plan.packed) f.panels = c.take<C>(all_panels * f.panel_size());
    };
    Carver count(nullptr), tile_count(nullptr);
    carve(count);
    f.carve(tile_count);
    record_scratch(static_cast<int64_t>(count.used() + tile_count.used() * static_cast<size_t>(executor.threads)));
    Carver carver(scratch(ScratchSlot::call, count.used()));
    carve(carver);
    compact_left<C, E>(f.left, shape.terms, f.plan.m1, f.plan.n1, false, left_compact);
    if (args.bias) stage_rows<C, E>(static_cast<const E*>(args.bias), 0, 1, shape.m1 * shape.m2, bias, 0);
    f.left_compact = left_compact;
    f.bias = bias;

    if (f.plan.packed) {
        const auto pack = [](void* arg, int64_t i) { static_cast<const F*>(arg)->pack(i); };
        // A few kilobytes are packed before another thread would have started.
        if (all_panels * f.panel_size() <= 16384)
            for (int64_t i = 0; i < all_panels; ++i) f.pack(i);
        else
            executor.run(all_panels, pack, &f);
    }
    const int64_t tasks = f.plan.token_tiles * f.plan.panel_groups;
    const auto run = [](void* arg, int64_t i) { static_cast<const F*>(arg)->run(i); };
    if (tasks == 1 || f.plan.multiply_adds * static_cast<double>(shape.tokens) < 400e3)
        for (int64_t i = 0; i < tasks; ++i) f.run(i);
    else
        executor.run(tasks, run, &f);
}

}  // namespace KRON_ISA
}  // namespace kron
