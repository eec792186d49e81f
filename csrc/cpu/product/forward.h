// y = norm(activation((sum_s A_s (x) B_s) x + bias)), one tile of tokens at a time, for one or several pairs of
// factors. plan.h explains the two layouts and orders; here everything is already oriented: `left` (m1, n1), `right`
// (m2, n2).
//
//              right_first                              left_first
//   load       rows = X                                 rows[t] = left X[t]
//   multiply   middle = rows right^T   (GEMM)           result = rows right^T   (GEMM)
//   store      y[t] = left middle[t]                    y = result
// "load" and "store" convert, pad and (commuted) transpose; where nothing is left to do they vanish, and the
// kernels read x and write y themselves. Several pairs share the load.
#pragma once

#include "cpu/gemm/right.h"
#include "cpu/isa/scratch.h"
#include "cpu/product/contract.h"
#include "cpu/product/output.h"

namespace kron {
namespace KRON_ISA {

template <class C, class E, class G>
struct Forward {
    typedef typename G::Row Row;
    static constexpr bool kSameRow = __is_same(C, Row);
    Plan plan;
    const E* x;
    int64_t x_stride;
    int64_t count;  // of projections
    RightFactor<C, E, G> right[kMostProjections];
    Output<C, E> out[kMostProjections];
    Norm<C, E> norm;  // of the first, when it is the only one

    bool direct_x;                              // the GEMM reads x itself
    bool direct_y;                              // the last product writes y itself
    SplitContract<C, E, Row> split_contract_x;  // commuted, left first: load and left product in one pass
    ContractMerge<C, E> contract_merge_y;       // commuted, right first: left product and store in one pass
    const C* left_compact;                      // (projections, S, n1, m1)

    static constexpr int W = Simd<C>::W;

    int64_t left_size() const { return plan.terms * plan.m1 * plan.n1; }
    int64_t gemm_rows_a_token() const { return plan.right_first ? plan.n1 : plan.m1; }
    // A row holds X once, or its product with every left factor side by side.
    int64_t row_term() const { return row_values<C, G>(plan.n2); }
    int64_t rows_step() const { return row_step<Row>((plan.right_first ? 1 : count * plan.terms) * row_term()); }
    int64_t x_step() const { return row_step<C>(plan.n2); }
    int64_t middle_term() const { return right[0].outputs_padded(); }
    int64_t middle_step() const { return row_step<C>(plan.terms * middle_term()); }
    int64_t result_step() const { return direct_y ? plan.m2 : row_step<C>(right[0].outputs_padded()); }

    // Scratch of one task, laid out by a Carver (which only counts when its base is null).
    struct Tile {
        C *x, *contracted, *middle, *result, *norm_row;
        Row *rows, *panel;
    };
    Tile carve(Carver& c) const {
        const int64_t t = plan.tile_tokens, rows = row_blocks<G>(t * gemm_rows_a_token());
        Tile tile{};
        tile.rows = c.take<Row>(rows * rows_step());
        if (plan.right_first) {
            tile.middle = c.take<C>(rows * middle_step());
        } else if (!split_contract_x) {
            tile.x = c.take<C>(t * plan.n1 * x_step());
            if (!kSameRow) tile.contracted = c.take<C>(t * plan.m1 * x_step());
        }
        if (!direct_y && !contract_merge_y) tile.result = c.take<C>(row_blocks<G>(t * plan.m1) * result_step());
        if (plan.pack_in_task) tile.panel = c.take<Row>(right[0].panel_size());
        if (norm.residual) tile.norm_row = c.take<C>(padded<C>(out[0].size()));
        return tile;
    }

    struct Rows {
        const Row* data;
        int64_t step;
    };

    // Right first: X in the GEMM's layout.
    Rows load_rows(int64_t first, int64_t tokens, const Tile& tile) const {
        const E* from = x + first * x_stride;
        // A GEMM of whole blocks of rows would read past the last one.
        const bool whole = tokens * plan.n1 % G::kRowBlock == 0;
        if (direct_x && whole) return {reinterpret_cast<const Row*>(from), plan.n2};
        stage_tokens<C, E, Row>(plan.commuted, from, x_stride, tokens, plan.n1, plan.n2, plan.n2, tile.rows,
                                rows_step());
        clear_row_tails<C, G>(tile.rows, tokens * plan.n1, plan.n2, rows_step());
        return {tile.rows, rows_step()};
    }

    // Left first: the products of X with all left factors, side by side.
    Rows contract_rows(int64_t first, int64_t tokens, const Tile& tile) const {
        const E* from = x + first * x_stride;
        const int64_t terms = count * plan.terms, rows = tokens * plan.m1;
        if (split_contract_x) {
            split_contract_x(from, x_stride, tokens, plan.n2, contract(0, terms), tile.rows, rows_step(), row_term());
        } else {
            const bool in_place = direct_x && plan.n2 % W == 0;
            const C* xs = in_place ? reinterpret_cast<const C*>(from) : tile.x;
            if (!in_place)
                stage_tokens<C, E, C>(plan.commuted, from, x_stride, tokens, plan.n1, plan.n2, plan.n2, tile.x,
                                      x_step());
            for (int64_t s = 0; s < terms; ++s) {
                C* contracted = kSameRow ? reinterpret_cast<C*>(tile.rows + s * row_term()) : tile.contracted;
                const int64_t step = kSameRow ? rows_step() : x_step();
                contract_tokens<C>(left_compact + s * plan.m1 * plan.n1, plan.m1, plan.n1, tokens, plan.n2, xs,
                                   in_place ? plan.n2 : x_step(), contracted, step, Start<C>{});
                if (!kSameRow)
                    stage_rows<C, C, Row>(contracted, step, rows, padded<C>(plan.n2), tile.rows + s * row_term(),
                                          rows_step());
            }
        }
        for (int64_t s = 0; s < terms; ++s)
            clear_row_tails<C, G>(tile.rows + s * row_term(), rows, plan.n2, rows_step());
        return {tile.rows, rows_step()};
    }

    Contraction<C> contract(int64_t projection, int64_t terms) const {
        return Contraction<C>{left_compact + projection * left_size(), terms, plan.m1, plan.n1};
    }

    // Spreads `elements` over the k steps of this task's GEMM.
    template <class T>
    Ahead fetch(const T* from, int64_t elements, int64_t rows, int64_t panels_here) const {
        const int64_t block = G::kRowBlock > 1 ? G::kRowBlock : kMaxRows[plan.panel_vectors];
        const int64_t blocks = (rows + block - 1) / block;
        const int64_t steps = blocks * plan.n2 * panels_here * plan.terms;
        const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
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
        Carver counter(nullptr);
        carve(counter);
        Carver carver(scratch(ScratchSlot::task, counter.used()));
        const Tile tile = carve(carver);
        G::begin();
        const Rows rows = plan.right_first ? load_rows(first, tokens, tile) : contract_rows(first, tokens, tile);
        for (int64_t p = 0; p < count; ++p) {
            if (plan.right_first)
                run_right_first(p, out[p], first, tokens, from, to, rows, tile);
            else
                run_left_first(p, out[p], first, tokens, from, to, rows, tile);
        }
        G::end();
        if (norm.residual && plan.panel_groups == 1) norm.apply(out[0].y, first, tokens, out[0].size(), tile.norm_row);
    }

    void run_right_first(int64_t p, const Output<C, E>& o, int64_t first, int64_t tokens, int64_t from, int64_t to,
                         const Rows& rows, const Tile& tile) const {
        Ahead ahead = fetch(o.y + first * o.size(), tokens * o.size(), tokens * plan.n1, to - from);
        const int64_t width = right[p].width();
        for (int64_t s = 0; s < plan.terms; ++s)
            for (int64_t panel = from; panel < to; ++panel)
                right[p].multiply(s, panel, tokens * plan.n1, rows.data, rows.step, tile.panel,
                                  tile.middle + s * middle_term() + panel * width, middle_step(), Start<C>{}, &ahead);
        const int64_t lane = from * width;
        const int64_t lanes = (to * width < plan.m2 ? to * width : plan.m2) - lane;
        const Contraction<C> left = contract(p, plan.terms);
        if (contract_merge_y) {
            contract_merge_y(tile.middle + lane, middle_step(), middle_term(), tokens, lanes, left,
                             o.y + first * o.size() + lane * plan.m1, o.size(), o.finish(), lane * plan.m1);
            return;
        }
        C* result = (direct_y ? reinterpret_cast<C*>(o.y) + first * o.size() : tile.result) + lane;
        for (int64_t s = 0; s < plan.terms; ++s)
            contract_tokens<C>(left.factor + s * plan.m1 * plan.n1, plan.m1, plan.n1, tokens, lanes,
                               tile.middle + s * middle_term() + lane, middle_step(), result, result_step(),
                               start_of(o, s, first, lane));
        finish(o, first, tokens, lane, lanes, result);
    }

    void run_left_first(int64_t p, const Output<C, E>& o, int64_t first, int64_t tokens, int64_t from, int64_t to,
                        const Rows& rows, const Tile& tile) const {
        const int64_t next = first + tokens, left = plan.tokens - next < tokens ? plan.tokens - next : tokens;
        Ahead ahead = fetch(x + next * x_stride, left * x_stride, tokens * plan.m1, (to - from) * count);
        C* result = direct_y ? reinterpret_cast<C*>(o.y) + first * o.size() : tile.result;
        const int64_t width = right[p].width();
        for (int64_t s = 0; s < plan.terms; ++s)
            for (int64_t panel = from; panel < to; ++panel)
                right[p].multiply(s, panel, tokens * plan.m1, rows.data + (p * plan.terms + s) * row_term(), rows.step,
                                  tile.panel, result + panel * width, result_step(),
                                  start_of(o, s, first, panel * width), &ahead);
        const int64_t lane = from * width;
        finish(o, first, tokens, lane, (to * width < plan.m2 ? to * width : plan.m2) - lane, result + lane);
    }

    // Term s adds to the ones before; the first starts from the bias or the base where it writes y itself.
    Start<C> start_of(const Output<C, E>& o, int64_t s, int64_t first, int64_t lane) const {
        if (s > 0) return Start<C>{nullptr, 0, 1, true};
        if (direct_y && o.base)
            return Start<C>{reinterpret_cast<const C*>(o.base) + first * o.size() + lane, plan.m2,
                            plan.tile_tokens * plan.m1, false};
        if (direct_y && o.bias) return Start<C>{o.bias + lane, plan.m2, plan.m1, false};
        return Start<C>{};
    }

    void finish(const Output<C, E>& o, int64_t first, int64_t tokens, int64_t lane, int64_t lanes,
                const C* result) const {
        if (direct_y)
            o.activate_tile(first, tokens, lane, lanes);
        else
            o.store_tile(first, tokens, lane, lanes, result, result_step());
    }

    // Where the panels are shared out, no task has whole tokens: the norm follows when all are done.
    void run_norm(int64_t index) const {
        C* row = static_cast<C*>(scratch(ScratchSlot::task, static_cast<size_t>(padded<C>(out[0].size())) * sizeof(C)));
        const int64_t from = plan.tokens * index / plan.panel_groups,
                      to = plan.tokens * (index + 1) / plan.panel_groups;
        norm.apply(out[0].y, from, to - from, out[0].size(), row);
    }
};

template <class F>
static void run_tasks(const F& f, int64_t tasks, bool serial, const Executor& executor) {
    if (tasks == 1 || serial)
        for (int64_t i = 0; i < tasks; ++i) f.run(i);
    else
        executor.run(tasks, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run(i); }, const_cast<F*>(&f));
}

template <class C, class E>
static Norm<C, E> norm_of(const NormArgs& args) {
    return Norm<C, E>{static_cast<const E*>(args.residual), args.residual_stride, static_cast<const E*>(args.weight),
                      static_cast<const E*>(args.bias), args.eps};
}

// A bias in the compute type: the caller's own, or a copy in `own` (null: only say how much it takes).
template <class C, class E>
static const C* bias_of(const void* bias, int64_t size, C* own) {
    if (!bias || __is_same(C, E)) return static_cast<const C*>(bias);
    if (own) stage_rows<C, E, C>(static_cast<const E*>(bias), 0, 1, size, own, 0);
    return own;
}

template <class C, class E, class G = VectorGemm<C>>
static void forward(const ForwardArgs& args, const Executor& executor) {
    typedef Forward<C, E, G> F;
    typedef typename G::Row Row;
    const Shape& shape = args.shape;
    F f{};
    f.count = args.count;
    Machine machine{Simd<C>::W, kMaxRows[2], G::kRowBlock, G::kPanelVectors, executor.threads, true,
                    true,       args.count,  false};
    // The layout of the panels depends on nothing but the shape: see which ones the caller has.
    f.plan = plan_forward(shape, machine);
    const Row* prepacked[kMostProjections];
    for (int64_t p = 0; p < args.count; ++p) {
        const Projection& projection = args.projections[p];
        const RightFactor<C, E, G> right(f.plan.commuted ? projection.a : projection.b, shape.terms, f.plan.m2,
                                         f.plan.n2, f.plan.panel_vectors);
        prepacked[p] = right.packed_by(projection, shape, f.plan.commuted);
        machine.prepacked = machine.prepacked || prepacked[p];
        machine.can_dot = machine.can_dot && projection.b.stride_col == 1;
        machine.can_dot_commuted = machine.can_dot_commuted && projection.a.stride_col == 1;
        f.right[p] = right;
    }
    f.plan = plan_forward(shape, machine);
    const Plan& p = f.plan;
    f.x = static_cast<const E*>(args.x);
    f.x_stride = args.x_stride;
    f.norm = norm_of<C, E>(args.norm);
    constexpr bool same = __is_same(C, E);
    if (p.commuted && p.right_first) f.contract_merge_y = pick_contract_merge<C, E>(p.m1);
    if (p.commuted && !p.right_first) f.split_contract_x = pick_split_contract<C, E, Row>(p.n1);
    const bool in_rows = !p.commuted && args.x_stride == shape.n1 * shape.n2;
    // The left product computes in C, the right one reads whole rows of its own type.
    f.direct_x = in_rows && (p.right_first ? __is_same(E, Row) && p.n2 == G::depth(p.n2) : same);
    f.direct_y = same && !p.commuted && p.m2 % Simd<C>::W == 0;
    // A GEMM of whole tiles writes whole panels, and does not start from a bias.
    if (G::kRowBlock > 1 && (p.m2 % f.right[0].width() != 0 || args.projections[0].bias)) f.direct_y = false;

    const int64_t outputs = shape.m1 * shape.m2;
    const bool pack_before = p.packed && !p.pack_in_task;
    C* left_compact = nullptr;
    C* biases = nullptr;
    Row* panels[kMostProjections] = {};
    const auto carve = [&](Carver& c) {
        left_compact = c.take<C>(args.count * f.left_size());
        if (!same) biases = c.take<C>(args.count * padded<C>(outputs));
        for (int64_t i = 0; i < args.count && pack_before; ++i)
            if (!prepacked[i]) panels[i] = c.take<Row>(f.right[i].size());
    };
    Carver count(nullptr), tile_count(nullptr);
    carve(count);
    f.carve(tile_count);
    record_scratch(static_cast<int64_t>(count.used() + tile_count.used() * static_cast<size_t>(executor.threads)));
    Carver carver(scratch(ScratchSlot::call, count.used()));
    carve(carver);
    f.left_compact = left_compact;
    for (int64_t i = 0; i < args.count; ++i) {
        const Projection& projection = args.projections[i];
        compact_left<C, E>(p.commuted ? projection.b : projection.a, shape.terms, p.m1, p.n1, false,
                           left_compact + i * f.left_size());
        // The left factor is copied in any case: the products' scale costs nothing there.
        for (int64_t v = 0; v < f.left_size() && args.alpha != 1; ++v)
            left_compact[i * f.left_size() + v] *= static_cast<C>(args.alpha);
        const C* bias = bias_of<C, E>(projection.bias, outputs, same ? nullptr : biases + i * padded<C>(outputs));
        f.out[i] =
            Output<C, E>{static_cast<E*>(projection.y),         p.commuted, p.m1, p.m2, bias, act_for(args.activation),
                         static_cast<const E*>(projection.base)};
        f.right[i].panels = prepacked[i];
        if (panels[i]) f.right[i].pack_all(panels[i], executor);
    }
    run_tasks(f, p.token_tiles * p.panel_groups, p.serial, executor);
    if (f.norm.residual && p.panel_groups > 1)
        executor.run(p.panel_groups, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run_norm(i); }, &f);
}

// Packed factors: the panels of the right one, behind a head.
template <class C, class E, class G = VectorGemm<C>>
struct Packing {
    typedef typename G::Row Row;
    Plan plan;
    RightFactor<C, E, G> right;

    Packing(const Shape& shape, const Factor& a, const Factor& b)
        : plan(plan_forward(shape,
                            Machine{Simd<C>::W, kMaxRows[2], G::kRowBlock, G::kPanelVectors, 1, true, true, 1, true})),
          right(plan.commuted ? a : b, shape.terms, plan.m2, plan.n2, plan.panel_vectors) {}
    int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHead)) + right.bytes(); }
    void pack(const Shape& shape, void* out, const Executor& executor) {
        const PackedHead head = packed_head(shape, right.layout(plan.commuted));
        memcpy(out, &head, sizeof head);
        right.pack_all(reinterpret_cast<Row*>(static_cast<char*>(out) + sizeof head), executor);
    }
};

}  // namespace KRON_ISA
}  // namespace kron
