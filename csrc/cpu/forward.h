// y = activation((sum_s A_s (x) B_s) x + bias), one tile of tokens at a time. plan.h explains the two layouts and
// orders; here everything is already oriented: `left` (m1, n1), `right` (m2, n2).
//
//              right_first                              left_first
//   load       rows = X                                 middle[t] = left X[t]
//   multiply   middle = rows right^T   (GEMM)           result = middle right^T   (GEMM)
//   store      y[t] = left middle[t]                    y = result
// "load" and "store" convert, pad and (commuted) transpose on the way; where nothing is left to do they vanish, and the
// kernels read x and write y themselves.
#pragma once

#include "factors.h"
#include "mix.h"
#include "plan.h"
#include "scratch.h"

namespace kron {
namespace KRON_ISA {

// G: how the GEMM is done (VectorGemm, AmxGemm) and in which type it reads its rows.
template <class C, class E, class G>
struct Forward {
    typedef typename G::Row Row;
    Plan plan;
    const E* x;
    int64_t x_stride;
    E* y;
    Activation activation;
    Factor left, right;

    bool staged_x;               // x is copied (converted, transposed, padded) into the tile
    bool direct_y;               // the last product writes y itself
    SplitMix<C, E> split_mix_x;  // commuted, left first: load and left product in one pass
    MixMerge<C, E> mix_merge_y;  // commuted, right first: left product and store in one pass
    const C* left_compact;       // (S, n1, m1)
    Row* panels;                 // (S, panels) of (n2, panel width)
    const C* bias;               // (m1*m2,) in y's layout, or null

    static constexpr int W = Simd<C>::W;

    int64_t width() const { return static_cast<int64_t>(plan.panel_vectors) * W; }
    int64_t panel_size() const { return G::panel_size(plan.n2, plan.panel_vectors); }
    int64_t x_step() const { return staged_x ? row_step<C>(plan.n2) : plan.n2; }
    // Whole panels: a GEMM may write all lanes of its last one.
    int64_t outputs_padded() const { return plan.panels * width(); }
    int64_t middle_term() const { return plan.right_first ? outputs_padded() : padded<C>(plan.n2); }
    int64_t middle_step() const { return row_step<C>(plan.terms * middle_term()); }
    int64_t result_step() const { return direct_y ? plan.m2 : row_step<C>(outputs_padded()); }

    // Scratch of one task, laid out by a Carver (which only counts when its base is null).
    struct Tile {
        C *x, *middle, *result;
        Row *rows, *panel;
    };
    static int64_t row_blocks(int64_t rows) { return (rows + G::kRowBlock - 1) / G::kRowBlock * G::kRowBlock; }
    int64_t gemm_rows_a_token() const { return plan.right_first ? plan.n1 : plan.m1; }
    int64_t gemm_step() const { return (plan.right_first ? 1 : plan.terms) * G::depth(plan.n2); }
    Tile carve(Carver& c) const {
        const int64_t t = plan.tile_tokens;
        Tile tile{};
        if (staged_x) tile.x = c.take<C>(t * plan.n1 * x_step());
        const int64_t rows = row_blocks(t * gemm_rows_a_token());
        tile.middle = c.take<C>(rows * middle_step());
        if (!direct_y && !mix_merge_y) tile.result = c.take<C>(row_blocks(t * plan.m1) * result_step());
        if (G::kConvertsRows) tile.rows = c.take<Row>(rows * gemm_step());
        if (plan.pack_in_task) tile.panel = c.take<Row>(panel_size());
        return tile;
    }

    const C* stage_x(int64_t first, int64_t tokens, const Tile& tile) const {
        const E* from = x + first * x_stride;
        if (!staged_x) return reinterpret_cast<const C*>(from);
        stage_tokens<C, E>(plan.commuted, from, x_stride, tokens, plan.n1, plan.n2, plan.n2, tile.x, x_step());
        return tile.x;
    }

    void mix_x(int64_t first, int64_t tokens, const Tile& tile) const {
        if (split_mix_x) {
            split_mix_x(x + first * x_stride, x_stride, tokens, plan.n2, mix(), tile.middle, middle_step(),
                        middle_term());
            return;
        }
        const C* rows = stage_x(first, tokens, tile);
        for (int64_t s = 0; s < plan.terms; ++s)
            mix_tokens<C>(left_compact + s * plan.m1 * plan.n1, plan.m1, plan.n1, tokens, plan.n2, rows, x_step(),
                          tile.middle + s * middle_term(), middle_step(), Start<C>{});
    }

    Mix<C> mix() const { return Mix<C>{left_compact, plan.terms, plan.m1, plan.n1}; }

    // The rows of term s that the GEMM reads: X when the right factor comes first (the same for all terms),
    // else left X.
    struct Rows {
        const C* compute;
        int64_t compute_step;
        const Row* gemm;
        int64_t step;
    };
    Rows gemm_rows_of(int64_t s, const C* x_rows, int64_t tokens, const Tile& tile) const {
        const int64_t rows = tokens * gemm_rows_a_token();
        Rows r{};
        r.compute = plan.right_first ? x_rows : tile.middle + s * middle_term();
        r.compute_step = plan.right_first ? x_step() : middle_step();
        if constexpr (G::kConvertsRows) {
            if (!plan.packed) return r;
            r.step = gemm_step();
            Row* own = tile.rows + (plan.right_first ? 0 : s * G::depth(plan.n2));
            r.gemm = own;
            if (!plan.right_first || s == 0) G::convert(r.compute, r.compute_step, rows, plan.n2, own, r.step);
        } else {
            r.gemm = r.compute;
            r.step = r.compute_step;
        }
        return r;
    }

    int64_t lanes_of(int64_t panel) const {
        const int64_t left_over = plan.m2 - panel * width();
        return left_over < width() ? left_over : width();
    }
    const E* panel_source(int64_t s, int64_t panel) const {
        return static_cast<const E*>(right.data) + s * right.stride_term + panel * width() * right.stride_row;
    }
    void pack_panel_of(int64_t s, int64_t panel, Row* out) const {
        G::pack(panel_source(s, panel), right.stride_row, right.stride_col, lanes_of(panel), plan.n2,
                plan.panel_vectors, out);
    }

    // out (rows, lanes of the panel) = R (rows, n2) right_s^T + start.
    void multiply_panel(int64_t s, int64_t panel, int64_t rows, const Rows& R, Row* own_panel, C* out, int64_t out_step,
                        Start<C> start, Ahead* ahead) const {
        const int64_t lanes = lanes_of(panel);
        const int vectors = static_cast<int>((lanes + W - 1) / W);
        if (!plan.packed) {
            dot_panel<C, E>(rows, plan.n2, R.compute, R.compute_step, panel_source(s, panel), right.stride_row, lanes,
                            vectors * W, out, out_step, start);
            return;
        }
        const Row* packed = own_panel ? own_panel : panels + (s * plan.panels + panel) * panel_size();
        if (own_panel) pack_panel_of(s, panel, own_panel);
        G::multiply(rows, plan.n2, R.gemm, R.step, packed, width(), vectors, out, out_step, start, ahead);
    }

    // Spreads `count` elements over the k steps of this task's GEMM.
    Ahead fetch(const E* from, int64_t count, int64_t rows, int64_t panels_here) const {
        const int64_t block = G::kRowBlock > 1 ? G::kRowBlock : kMaxRows[plan.panel_vectors];
        const int64_t blocks = (rows + block - 1) / block;
        const int64_t steps = blocks * plan.n2 * panels_here * plan.terms;
        const int64_t bytes = count * static_cast<int64_t>(sizeof(E));
        // A small tile is covered by the hardware's own prefetching.
        const int64_t step = bytes < 32768 || steps == 0 ? 0 : bytes / steps;
        return Ahead{step ? reinterpret_cast<const char*>(from) : reinterpret_cast<const char*>(left_compact),
                     step < 64 ? step : 64};
    }

    void run(int64_t index) const {
        const int64_t token_tile = index / plan.panel_groups, group = index % plan.panel_groups;
        const int64_t first = token_tile * plan.tile_tokens;
        const int64_t tokens = plan.tokens - first < plan.tile_tokens ? plan.tokens - first : plan.tile_tokens;
        const int64_t from = group * plan.panels / plan.panel_groups,
                      to = (group + 1) * plan.panels / plan.panel_groups;
        Carver count(nullptr);
        carve(count);
        Carver carver(scratch(ScratchSlot::task, count.used()));
        const Tile tile = carve(carver);
        G::begin();
        if (plan.right_first)
            run_right_first(first, tokens, from, to, tile);
        else
            run_left_first(first, tokens, from, to, tile);
        G::end();
    }

    void run_right_first(int64_t first, int64_t tokens, int64_t from, int64_t to, const Tile& tile) const {
        const C* x_rows = stage_x(first, tokens, tile);
        Ahead ahead = fetch(y + first * plan.m1 * plan.m2, tokens * plan.m1 * plan.m2, tokens * plan.n1, to - from);
        for (int64_t s = 0; s < plan.terms; ++s) {
            const Rows rows = gemm_rows_of(s, x_rows, tokens, tile);
            for (int64_t panel = from; panel < to; ++panel)
                multiply_panel(s, panel, tokens * plan.n1, rows, tile.panel,
                               tile.middle + s * middle_term() + panel * width(), middle_step(), Start<C>{}, &ahead);
        }
        const int64_t lane = from * width();
        const int64_t lanes = (to * width() < plan.m2 ? to * width() : plan.m2) - lane;
        const int64_t outputs = plan.m1 * plan.m2;
        if (mix_merge_y) {
            mix_merge_y(tile.middle + lane, middle_step(), middle_term(), tokens, lanes, mix(),
                        y + first * outputs + lane * plan.m1, outputs, Finish<C>{bias, activation}, lane * plan.m1);
            return;
        }
        C* result = (direct_y ? reinterpret_cast<C*>(y) + first * outputs : tile.result) + lane;
        for (int64_t s = 0; s < plan.terms; ++s) {
            Start<C> start;
            if (s > 0)
                start.accumulate = true;
            else if (direct_y && bias)
                start = Start<C>{bias + lane, plan.m2, plan.m1, false};
            mix_tokens<C>(left_compact + s * plan.m1 * plan.n1, plan.m1, plan.n1, tokens, lanes,
                          tile.middle + s * middle_term() + lane, middle_step(), result, result_step(), start);
        }
        finish(first, tokens, lane, lanes, result);
    }

    void run_left_first(int64_t first, int64_t tokens, int64_t from, int64_t to, const Tile& tile) const {
        mix_x(first, tokens, tile);
        const int64_t next = first + tokens, left = plan.tokens - next < tokens ? plan.tokens - next : tokens;
        Ahead ahead = fetch(x + next * x_stride, left * x_stride, tokens * plan.m1, to - from);
        C* result = direct_y ? reinterpret_cast<C*>(y) + first * plan.m1 * plan.m2 : tile.result;
        for (int64_t s = 0; s < plan.terms; ++s) {
            const Rows rows = gemm_rows_of(s, nullptr, tokens, tile);
            for (int64_t panel = from; panel < to; ++panel) {
                Start<C> start;
                if (s > 0)
                    start.accumulate = true;
                else if (direct_y && bias)
                    start = Start<C>{bias + panel * width(), plan.m2, plan.m1, false};
                multiply_panel(s, panel, tokens * plan.m1, rows, tile.panel, result + panel * width(), result_step(),
                               start, &ahead);
            }
        }
        const int64_t lane = from * width();
        finish(first, tokens, lane, (to * width() < plan.m2 ? to * width() : plan.m2) - lane, result + lane);
    }

    // result (tokens*m1 rows of `lanes`) -> y, at lane `lane` of the right factor's outputs.
    void finish(int64_t first, int64_t tokens, int64_t lane, int64_t lanes, C* result) const {
        const int64_t outputs = plan.m1 * plan.m2;
        if (direct_y) {
            if (activation != Activation::none)
                finish_rows<C, C>(result, result_step(), tokens * plan.m1, lanes, result, result_step(),
                                  Finish<C>{nullptr, activation}, 0, 0, 1);
        } else if (plan.commuted) {
            finish_transposed<C, E>(result, result_step(), tokens, lanes, plan.m1, y + first * outputs + lane * plan.m1,
                                    outputs, Finish<C>{bias, activation}, lane * plan.m1);
        } else {
            finish_rows<C, E>(result, result_step(), tokens * plan.m1, lanes, y + first * outputs + lane, plan.m2,
                              Finish<C>{bias, activation}, lane, plan.m2, plan.m1);
        }
    }

    // Job `index` of packing all panels ahead of the tasks.
    void pack(int64_t index) const {
        pack_panel_of(index / plan.panels, index % plan.panels, panels + index * panel_size());
    }
};

template <class C, class E, class G = VectorGemm<C>>
static void forward(const ForwardArgs& args, const Executor& executor) {
    typedef Forward<C, E, G> F;
    const Shape& shape = args.shape;
    F f{};
    f.plan = plan_forward(shape, Machine{Simd<C>::W, kMaxRows[2], G::kPanelVectors, executor.threads,
                                         args.b.stride_col == 1, args.a.stride_col == 1});
    const Plan& p = f.plan;
    f.x = static_cast<const E*>(args.x);
    f.x_stride = args.x_stride;
    f.y = static_cast<E*>(args.y);
    f.activation = args.activation;
    f.left = p.commuted ? args.b : args.a;
    f.right = p.commuted ? args.a : args.b;
    constexpr bool same = __is_same(C, E);
    if (p.commuted && p.right_first) f.mix_merge_y = pick_mix_merge<C, E>(p.m1);
    if (p.commuted && !p.right_first) f.split_mix_x = pick_split_mix<C, E>(p.n1);
    // The left product reads x in whole vectors; the right one element by element.
    const bool whole_rows = p.right_first || p.n2 % Simd<C>::W == 0;
    f.staged_x = !f.split_mix_x && (!same || p.commuted || !whole_rows || args.x_stride != shape.n1 * shape.n2);
    f.direct_y = same && !p.commuted && p.m2 % Simd<C>::W == 0;

    const int64_t all_panels = shape.terms * p.panels;
    C* left_compact = nullptr;
    C* bias = nullptr;
    const auto carve = [&](Carver& c) {
        left_compact = c.take<C>(shape.terms * p.m1 * p.n1);
        if (args.bias && !same) bias = c.take<C>(shape.m1 * shape.m2);
        if (p.packed && !p.pack_in_task) f.panels = c.take<typename G::Row>(all_panels * f.panel_size());
    };
    Carver count(nullptr), tile_count(nullptr);
    carve(count);
    f.carve(tile_count);
    record_scratch(static_cast<int64_t>(count.used() + tile_count.used() * static_cast<size_t>(executor.threads)));
    Carver carver(scratch(ScratchSlot::call, count.used()));
    carve(carver);
    compact_left<C, E>(f.left, shape.terms, p.m1, p.n1, false, left_compact);
    f.left_compact = left_compact;
    if (bias) stage_rows<C, E>(static_cast<const E*>(args.bias), 0, 1, shape.m1 * shape.m2, bias, 0);
    f.bias = same ? static_cast<const C*>(args.bias) : bias;

    if (f.panels) {
        const auto pack = [](void* arg, int64_t i) { static_cast<const F*>(arg)->pack(i); };
        if (shape.terms * p.m2 * p.n2 <= kSerialPack)
            for (int64_t i = 0; i < all_panels; ++i) f.pack(i);
        else
            executor.run(all_panels, pack, &f);
    }
    const int64_t tasks = p.token_tiles * p.panel_groups;
    if (tasks == 1 || p.serial)
        for (int64_t i = 0; i < tasks; ++i) f.run(i);
    else
        executor.run(tasks, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run(i); }, &f);
}

}  // namespace KRON_ISA
}  // namespace kron
