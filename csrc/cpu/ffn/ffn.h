// y = norm(W2 activation(W1 x + bias1) + bias2), both weights Kronecker products, without the intermediate ever being
// whole. The plan (plan.h) orients both pairs alike; for a tile of tokens and one panel of right1 at a time
//   Z (n1 rows a token)  = X right1^T                       GEMM, a panel wide, stays in L1
//   M (p1 rows a token)  = left2 act(left1 Z + bias1)       column by column: in registers, or in L1
// and when all panels are done, Y = M right2^T (GEMM). M is as large as X.
#pragma once

#include "cpu/ffn/ffn_contract.h"
#include "cpu/product/forward.h"

namespace kron {
namespace KRON_ISA {

template <class C, class E, class G>
struct Ffn {
    typedef typename G::Row Row;
    static constexpr bool kSameRow = __is_same(C, Row);
    FfnPlan plan;
    const E* x;
    int64_t x_stride;
    RightFactor<C, E, G> right1, right2;
    Middle<C> middle;                      // both left factors, bias1 and the activation
    ContractActContract<C, Row> contract;  // the middle in registers; null: in L1
    Output<C, E> out;
    Norm<C, E> norm;
    bool direct_x, direct_y;
    Row* shared_m;  // M of all tokens, where the panels are shared out

    int64_t x_step() const { return row_step<Row>(row_values<C, G>(plan.n2)); }
    int64_t z_step() const { return right1.width(); }
    int64_t m_step() const { return row_step<Row>(row_values<C, G>(plan.m2)); }
    int64_t result_step() const { return direct_y ? plan.p2 : row_step<C>(right2.outputs_padded()); }
    int64_t z_term() const { return row_blocks<G>(plan.tile_tokens * plan.n1) * z_step(); }
    // M: a block of rows for every term of the second pair.
    int64_t m_term() const { return row_blocks<G>(plan.tile_tokens * plan.p1) * m_step(); }
    int64_t m_size() const { return plan.terms2 * m_term(); }

    struct Tile {
        Row *x, *m;
        C *z, *h, *contracted, *result, *norm_row;
    };
    Tile carve(Carver& c) const {
        Tile tile{};
        tile.x = c.take<Row>(row_blocks<G>(plan.tile_tokens * plan.n1) * x_step());
        tile.z = c.take<C>(plan.terms1 * z_term());
        if (!contract) {
            tile.h = c.take<C>(h_tokens() * plan.m1 * z_step());
            if (!kSameRow) tile.contracted = c.take<C>(h_tokens() * plan.p1 * z_step());
        }
        if (plan.panel_groups == 1) tile.m = c.take<Row>(m_size());
        if (!direct_y) tile.result = c.take<C>(row_blocks<G>(plan.tile_tokens * plan.p1) * result_step());
        if (norm.residual) tile.norm_row = c.take<C>(padded<C>(out.size()));
        return tile;
    }
    // Tokens whose part of the intermediate is in L1 at a time, when it does not fit the registers.
    int64_t h_tokens() const {
        const int64_t values = plan.m1 * z_step(), most = 16384 / static_cast<int64_t>(sizeof(C));
        return values >= most ? 1 : most / values;
    }

    struct Range {
        int64_t from, to;
    };
    static Range share(int64_t count, int64_t group, int64_t groups) {
        return {group * count / groups, (group + 1) * count / groups};
    }

    // M of tokens [first, first + tokens), the columns of some panels of right1.
    void first_half(int64_t first, int64_t tokens, Range panels, const Tile& tile, Row* m) const {
        const E* from = x + first * x_stride;
        const int64_t rows = tokens * plan.n1;
        const Row* x_rows = reinterpret_cast<const Row*>(from);
        int64_t step = plan.n2;
        if (!direct_x || rows % G::kRowBlock != 0) {
            stage_tokens<C, E, Row>(plan.commuted, from, x_stride, tokens, plan.n1, plan.n2, plan.n2, tile.x, x_step());
            clear_row_tails<C, G>(tile.x, rows, plan.n2, x_step());
            x_rows = tile.x, step = x_step();
        }
        Ahead ahead{reinterpret_cast<const char*>(x_rows), 0};
        for (int64_t panel = panels.from; panel < panels.to; ++panel) {
            for (int64_t s = 0; s < plan.terms1; ++s)
                right1.multiply(s, panel, rows, x_rows, step, nullptr, tile.z + s * z_term(), z_step(), Start<C>{},
                                &ahead);
            const int64_t lane = panel * right1.width();
            if (contract)
                contract(middle, tokens, tile.z, z_step(), lane, padded<C>(right1.lanes(panel)), m + lane, m_step());
            else
                contract_in_cache(tokens, lane, right1.lanes(panel), tile, m + lane);
        }
    }

    void contract_in_cache(int64_t tokens, int64_t lane, int64_t lanes, const Tile& tile, Row* m) const {
        const int64_t step = z_step(), block = h_tokens(), whole = padded<C>(lanes);
        for (int64_t t = 0; t < tokens; t += block) {
            const int64_t here = tokens - t < block ? tokens - t : block;
            for (int64_t s = 0; s < plan.terms1; ++s)
                contract_tokens<C>(middle.left1 + s * plan.m1 * plan.n1, plan.m1, plan.n1, here, lanes,
                                   tile.z + s * z_term() + t * plan.n1 * step, step, tile.h, step,
                                   s > 0 ? Start<C>{nullptr, 0, 1, true}
                                         : Start<C>{middle.bias + lane, middle.bias_step, plan.m1, false});
            activate_rows<C>(tile.h, here * plan.m1, step, whole, middle.act);
            for (int64_t s = 0; s < plan.terms2; ++s) {
                Row* to = m + s * m_term() + t * plan.p1 * m_step();
                C* contracted = kSameRow ? reinterpret_cast<C*>(to) : tile.contracted;
                const int64_t contracted_step = kSameRow ? m_step() : step;
                contract_tokens<C>(middle.left2 + s * plan.m1 * plan.p1, plan.p1, plan.m1, here, lanes, tile.h, step,
                                   contracted, contracted_step, Start<C>{});
                if (!kSameRow) stage_rows<C, C, Row>(contracted, contracted_step, here * plan.p1, whole, to, m_step());
            }
        }
    }

    // y of these tokens, the columns of some panels of right2.
    void second_half(int64_t first, int64_t tokens, Range panels, const Tile& tile, const Row* m) const {
        const int64_t rows = tokens * plan.p1, width = right2.width();
        C* result = direct_y ? reinterpret_cast<C*>(out.y) + first * out.size() : tile.result;
        Ahead ahead{reinterpret_cast<const char*>(m), 0};
        for (int64_t s = 0; s < plan.terms2; ++s)
            for (int64_t panel = panels.from; panel < panels.to; ++panel) {
                Start<C> start;
                if (s > 0)
                    start.accumulate = true;
                else if (direct_y && out.bias)
                    start = Start<C>{out.bias + panel * width, plan.p2, plan.p1, false};
                right2.multiply(s, panel, rows, m + s * m_term(), m_step(), nullptr, result + panel * width,
                                result_step(), start, &ahead);
            }
        if (direct_y) return;
        const int64_t lane = panels.from * width;
        const int64_t end = panels.to * width < plan.p2 ? panels.to * width : plan.p2;
        if (end > lane) out.store_tile(first, tokens, lane, end - lane, result + lane, result_step());
    }

    Tile task_tile() const {
        Carver counter(nullptr);
        carve(counter);
        Carver carver(scratch(ScratchSlot::task, counter.used()));
        return carve(carver);
    }

    // A tile of tokens, all the way.
    void run(int64_t index) const {
        const Tile tile = task_tile();
        const int64_t first = index * plan.tile_tokens;
        const int64_t tokens = plan.tokens - first < plan.tile_tokens ? plan.tokens - first : plan.tile_tokens;
        G::begin();
        first_half(first, tokens, {0, right1.count()}, tile, tile.m);
        clear_m_tails(tokens, tile.m);
        second_half(first, tokens, {0, right2.count()}, tile, tile.m);
        G::end();
        if (norm.residual) norm.apply(out.y, first, tokens, out.size(), tile.norm_row);
    }
    // All tokens, some of the panels.
    void run_first(int64_t group) const {
        const Tile tile = task_tile();
        G::begin();
        first_half(0, plan.tokens, share(right1.count(), group, plan.panel_groups), tile, shared_m);
        G::end();
    }
    void run_second(int64_t group) const {
        const Tile tile = task_tile();
        G::begin();
        second_half(0, plan.tokens, share(right2.count(), group, plan.panel_groups), tile, shared_m);
        G::end();
    }
    void run_norm(int64_t group) const {
        const Range tokens = share(plan.tokens, group, plan.panel_groups);
        norm.apply(out.y, tokens.from, tokens.to - tokens.from, out.size(), task_tile().norm_row);
    }
    void clear_m_tails(int64_t tokens, Row* m) const {
        for (int64_t s = 0; s < plan.terms2; ++s)
            clear_row_tails<C, G>(m + s * m_term(), tokens * plan.p1, plan.m2, m_step());
    }
};

template <class C, class G>
static FfnPlan ffn_plan(const Shape& first, const Shape& second, int threads, bool packed) {
    return plan_ffn(first, second,
                    Machine{Simd<C>::W, kMaxRows[2], G::kRowBlock, G::kPanelVectors, threads, false, false, 1, packed});
}

template <class C, class E, class G = VectorGemm<C>>
static bool ffn_is_fused(const Shape& first, const Shape& second, bool packed) {
    return ffn_plan<C, G>(first, second, 1, packed).fused;
}

template <class C, class E, class G = VectorGemm<C>>
static void ffn_forward(const FfnArgs& args, const Executor& executor) {
    typedef Ffn<C, E, G> F;
    typedef typename G::Row Row;
    F f{};
    f.plan = ffn_plan<C, G>(args.first, args.second, executor.threads, args.w1.packed || args.w2.packed);
    const FfnPlan& p = f.plan;
    f.x = static_cast<const E*>(args.x);
    f.x_stride = args.x_stride;
    f.norm = norm_of<C, E>(args.norm);
    constexpr bool same = __is_same(C, E);
    const int vectors1 = G::kPanelVectors ? G::kPanelVectors : panel_vectors(p.m2, Simd<C>::W);
    const int vectors2 = G::kPanelVectors ? G::kPanelVectors : panel_vectors(p.p2, Simd<C>::W);
    f.right1 = RightFactor<C, E, G>(p.commuted ? args.w1.a : args.w1.b, p.terms1, p.m2, p.n2, vectors1);
    f.right2 = RightFactor<C, E, G>(p.commuted ? args.w2.a : args.w2.b, p.terms2, p.p2, p.m2, vectors2);
    f.direct_x = !p.commuted && args.x_stride == p.n1 * p.n2 && __is_same(E, Row) && p.n2 == G::depth(p.n2);
    f.direct_y = same && !p.commuted && p.p2 % Simd<C>::W == 0;
    f.contract = pick_contract_act_contract<C, Row>(p, args.activation);
    bool on_tiles = false;
    if constexpr (G::kTileContract) {
        if (!f.contract) f.contract = G::pick_contract(p, args.activation), on_tiles = f.contract;
    }
    const int64_t bias_step = (p.m2 + 15) / 16 * 16;  // whole vectors, and whole tiles
    f.middle =
        Middle<C>{p.m1, p.n1, p.p1, nullptr, nullptr, nullptr, bias_step, act_for(args.activation), nullptr, nullptr};
    const int64_t outputs = p.p1 * p.p2;
    f.out = Output<C, E>{static_cast<E*>(args.w2.y), p.commuted, p.p1, p.p2, nullptr, Act{}};

    f.right1.panels = f.right1.packed_by(args.w1, args.first, p.commuted);
    f.right2.panels = f.right2.packed_by(args.w2, args.second, p.commuted);
    C *left1 = nullptr, *left2 = nullptr, *bias1 = nullptr, *bias2 = nullptr;
    Row *panels1 = nullptr, *panels2 = nullptr, *tile_left1 = nullptr, *tile_left2 = nullptr;
    const auto carve = [&](Carver& c) {
        left1 = c.take<C>(p.terms1 * p.m1 * p.n1);
        left2 = c.take<C>(p.terms2 * p.p1 * p.m1);
        bias1 = c.take<C>(p.m1 * f.middle.bias_step);
        if (!same) bias2 = c.take<C>(padded<C>(outputs));
        if (!f.right1.panels) panels1 = c.take<Row>(f.right1.size());
        if (!f.right2.panels) panels2 = c.take<Row>(f.right2.size());
        if (p.panel_groups > 1) f.shared_m = c.take<Row>(f.m_size());
        if (on_tiles)
            tile_left1 = c.take<Row>(p.m1 * kTileContractInputs), tile_left2 = c.take<Row>(p.m1 * kTileContractOutputs);
    };
    Carver count(nullptr), tile_count(nullptr);
    carve(count);
    f.carve(tile_count);
    record_scratch(static_cast<int64_t>(count.used() + tile_count.used() * static_cast<size_t>(executor.threads)));
    Carver carver(scratch(ScratchSlot::call, count.used()));
    carve(carver);
    // In registers, all that one row of left1 meets should be neighbours.
    compact_left<C, E>(p.commuted ? args.w1.b : args.w1.a, p.terms1, p.m1, p.n1, f.contract != nullptr, left1);
    compact_left<C, E>(p.commuted ? args.w2.b : args.w2.a, p.terms2, p.p1, p.m1, false, left2);
    oriented_bias<C, E>(static_cast<const E*>(args.w1.bias), p.commuted, p.m1, p.m2, bias1, f.middle.bias_step);
    f.middle.left1 = left1, f.middle.left2 = left2, f.middle.bias = bias1;
    if constexpr (G::kTileContract) {
        if (on_tiles) G::contract_lefts(f.middle, tile_left1, tile_left2);
        f.middle.tile_left1 = tile_left1, f.middle.tile_left2 = tile_left2;
    }
    f.out.bias = bias_of<C, E>(args.w2.bias, outputs, bias2);
    if (panels1) f.right1.pack_all(panels1, executor);
    if (panels2) f.right2.pack_all(panels2, executor);
    if (p.panel_groups == 1) return run_tasks(f, p.token_tiles, p.serial, executor);
    executor.run(p.panel_groups, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run_first(i); }, &f);
    f.clear_m_tails(p.tokens, f.shared_m);
    executor.run(p.panel_groups, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run_second(i); }, &f);
    if (f.norm.residual)
        executor.run(p.panel_groups, [](void* arg, int64_t i) { static_cast<const F*>(arg)->run_norm(i); }, &f);
}

}  // namespace KRON_ISA
}  // namespace kron
