// Gradients of y = (sum_s A_s (x) B_s) x + bias. Tokens are split into contiguous chunks, one task each; a task walks
// its chunk tile by tile, keeps everything but x, dL/dy and dL/dx in cache, and sums its factor gradients into a buffer
// of its own. The buffers are added in chunk order, so a result depends on the thread count but never on the schedule.
// Orientation as in plan.h: left (m1, n1), right (m2, n2), G = dL/dY (m1, m2) a token.
#pragma once

#include "cpu/gemm/factors.h"
#include "cpu/isa/scratch.h"
#include "cpu/product/output.h"
#include "cpu/product/plan.h"

namespace kron {
namespace KRON_ISA {

// sums[i][j] += sum over tokens and lanes of P[t, i, lane] Q[t, j, lane]; rows of P and Q hold whole vectors, of which
// `lanes` elements count.
template <class C, int PR, int QR>
static void dot_tokens(int64_t tokens, int64_t lanes, const C* P, int64_t p_step, int64_t p_token, const C* Q,
                       int64_t q_step, int64_t q_token, C* sums, int64_t sums_step) {
    constexpr int W = Simd<C>::W;
    const int64_t whole = lanes / W * W;
    const auto in_tail = iota<C>() < static_cast<int>(lanes - whole);
    // In groups of tokens: an fp32 sum of at most some 128 products is added to the next level, so that the rounding
    // error grows with the length of a group and the number of groups, not with their product.
    const int64_t steps = (lanes + W - 1) / W, group = steps < 128 ? 128 / steps : 1;
    Vec<C> flat[PR * QR] = {};
    for (int64_t from = 0; from < tokens; from += group) {
        const int64_t to = tokens - from < group ? tokens : from + group;
        Vec<C> acc[PR][QR] = {};
        for (int64_t t = from; t < to; ++t) {
            const C* p = P + t * p_token;
            const C* q = Q + t * q_token;
            for (int64_t l = 0; l < lanes; l += W) {
                Vec<C> qv[QR];
#pragma GCC unroll 4
                for (int j = 0; j < QR; ++j) qv[j] = load<C>(q + j * q_step + l);
                if (l == whole)  // padding may hold inf * 0
#pragma GCC unroll 4
                    for (int j = 0; j < QR; ++j) qv[j] = (Vec<C>)((typename Simd<C>::I)qv[j] & in_tail);
#pragma GCC unroll 4
                for (int i = 0; i < PR; ++i) {
                    Vec<C> pv = load<C>(p + i * p_step + l);
                    if (l == whole) pv = (Vec<C>)((typename Simd<C>::I)pv & in_tail);
#pragma GCC unroll 4
                    for (int j = 0; j < QR; ++j) acc[i][j] += pv * qv[j];
                }
            }
        }
#pragma GCC unroll 16
        for (int n = 0; n < PR * QR; ++n) flat[n] += acc[n / QR][n % QR];
    }
    C totals[PR * QR];
    sum_vectors<C, PR * QR>(flat, totals);
    for (int n = 0; n < PR * QR; ++n) sums[n / QR * sums_step + n % QR] += totals[n];
}

template <class C, class E>
struct Backward {
    BackwardPlan plan;
    const E *grad, *x;
    int64_t grad_stride, x_stride;
    E* dx;
    Factor left, right;
    bool need_left, need_right, need_bias;
    bool staged_g, staged_x;

    C* left_forward;     // (S, n1, m1)
    C* left_transposed;  // (S, m1, n1)
    C* right_panels;     // right^T: (S, panels) of (n2, panel) -> outputs along m2
    C* right_t_panels;   // right:   (S, panels) of (m2, panel) -> outputs along n2
    C* partial;          // (chunks, partial_size): dLeft (S, m1, n1), dRight (S, m2, n2 padded), dbias (m1*m2)

    static constexpr int kVectors = 2;
    static constexpr int64_t kPanel = kVectors * Simd<C>::W;

    static int64_t panel_count(int64_t n) { return (n + kPanel - 1) / kPanel; }
    int64_t left_size() const { return plan.terms * plan.m1 * plan.n1; }
    int64_t right_step() const { return padded<C>(plan.n2); }
    int64_t right_size() const { return plan.terms * plan.m2 * right_step(); }
    int64_t partial_size() const { return (left_size() + right_size() + plan.m1 * plan.m2 + 15) / 16 * 16; }
    int64_t g_step() const { return staged_g ? row_step<C>(plan.m2) : plan.m2; }
    int64_t x_step() const { return staged_x ? row_step<C>(plan.n2) : plan.n2; }
    int64_t mid_step() const { return row_step<C>(plan.via_left ? plan.m2 : plan.n2); }
    bool need_forward_contract() const { return plan.via_left ? need_left : need_right; }

    struct Tile {
        C *g, *x, *dx, *mid, *mid2;
    };
    Tile carve(Carver& c) const {
        const int64_t t = plan.tile_tokens;
        const int64_t rows = t * (plan.via_left ? plan.n1 : plan.m1);
        Tile tile{};
        if (staged_g) tile.g = c.take<C>(t * plan.m1 * g_step());
        if (staged_x) tile.x = c.take<C>(t * plan.n1 * x_step());
        if (dx) tile.dx = c.take<C>(t * plan.n1 * row_step<C>(plan.n2));
        tile.mid = c.take<C>(rows * mid_step());
        if (need_forward_contract() && (plan.via_left || plan.right_blocks == 1))
            tile.mid2 = c.take<C>(rows * mid_step());
        return tile;
    }

    // out rows (lanes of `outputs`) = [out +] R rows (depth) times packed panels.
    void through_right(const C* panels, int64_t outputs, int64_t depth, int64_t rows, const C* R, int64_t step, C* out,
                       int64_t out_step, bool accumulate) const {
        for (int64_t p = 0; p < panel_count(outputs); ++p)
            gemm_rows<C, false>(rows, depth, R, step, panels + p * depth * kPanel, kPanel, vectors_at(outputs, p),
                                out + p * kPanel, out_step, Start<C>{nullptr, 0, 1, accumulate});
    }

    // out[t] (outputs, lanes) = [out +] M in[t] (depth, lanes), M given as (depth, outputs).
    static void through_left(const C* M, int64_t outputs, int64_t depth, int64_t tokens, int64_t lanes, const C* in,
                             int64_t in_step, C* out, int64_t out_step, bool accumulate) {
        contract_tokens<C>(M, outputs, depth, tokens, lanes, in, in_step, out, out_step,
                           Start<C>{nullptr, 0, 1, accumulate});
    }

    static int vectors_at(int64_t n, int64_t panel) {
        const int64_t lanes = n - panel * kPanel < kPanel ? n - panel * kPanel : kPanel;
        return static_cast<int>((lanes + Simd<C>::W - 1) / Simd<C>::W);
    }

    // out (outputs, inputs) += sum over rows of P[row, output] Q[row, input].
    void add_right(C* out, int64_t outputs, int64_t inputs, int64_t rows, const C* P, int64_t p_step, const C* Q,
                   int64_t q_step) const {
        for (int64_t p = 0; p < panel_count(inputs); ++p)
            gemm_rows<C, true>(outputs, rows, P, p_step, Q + p * kPanel, q_step, vectors_at(inputs, p),
                               out + p * kPanel, right_step(), Start<C>{nullptr, 0, 1, true});
    }

    // dLeft (m1, n1) += sum over tokens of P[t] (m1, lanes) Q[t]^T (lanes, n1).
    void add_left(int64_t s, C* sums, int64_t tokens, int64_t lanes, const C* P, int64_t p_step, const C* Q,
                  int64_t q_step) const {
        C* out = sums + s * plan.m1 * plan.n1;
        const int64_t p_token = plan.m1 * p_step, q_token = plan.n1 * q_step;
        const auto block = [&](auto pr, auto qr, int64_t i, int64_t j) {
            dot_tokens<C, decltype(pr)::value, decltype(qr)::value>(tokens, lanes, P + i * p_step, p_step, p_token,
                                                                    Q + j * q_step, q_step, q_token,
                                                                    out + i * plan.n1 + j, plan.n1);
        };
        const auto columns = [&](auto pr, int64_t i) {
            int64_t j = 0;
            for (; j + 4 <= plan.n1; j += 4) block(pr, Int<4>{}, i, j);
            for (; j + 2 <= plan.n1; j += 2) block(pr, Int<2>{}, i, j);
            if (j < plan.n1) block(pr, Int<1>{}, i, j);
        };
        int64_t i = 0;
        for (; i + 4 <= plan.m1; i += 4) columns(Int<4>{}, i);
        for (; i + 2 <= plan.m1; i += 2) columns(Int<2>{}, i);
        if (i < plan.m1) columns(Int<1>{}, i);
    }
    template <int N>
    struct Int {
        static constexpr int value = N;
    };

    void add_bias(C* sums, const E* g, int64_t tokens) const {
        constexpr int W = Simd<C>::W;
        const int64_t outputs = plan.m1 * plan.m2;
        C* out = sums + left_size() + right_size();
        int64_t i = 0;
        for (; i + W <= outputs; i += W) {
            Vec<C> sum{};
            for (int64_t t = 0; t < tokens; ++t) sum += load<C, E>(g + t * grad_stride + i);
            store<C>(out + i, load<C>(out + i) + sum);
        }
        for (; i < outputs; ++i) {
            C sum = 0;
            for (int64_t t = 0; t < tokens; ++t) sum += get<C, E>(g + t * grad_stride + i);
            out[i] += sum;
        }
    }

    // Tokens from t of one operand as rows of the oriented problem, `to_step` apart; the caller's memory where
    // it will do.
    const C* stage(const E* from, int64_t stride, int64_t tokens, int64_t outer, int64_t inner, bool staged, C* to,
                   int64_t to_step) const {
        if (!staged) return reinterpret_cast<const C*>(from);
        stage_tokens<C, E, C>(plan.commuted, from, stride, tokens, outer, inner, inner, to, to_step);
        return to;
    }
    const C* stage_g(int64_t t, int64_t tokens, C* to) const {
        return stage(grad + t * grad_stride, grad_stride, tokens, plan.m1, plan.m2, staged_g, to, g_step());
    }
    const C* stage_x(int64_t t, int64_t tokens, C* to) const {
        return stage(x + t * x_stride, x_stride, tokens, plan.n1, plan.n2, staged_x, to, x_step());
    }

    void tile_gradients(const Tile& tile, int64_t tokens, const C* g, const C* xs, C* sums) const {
        const int64_t dx_step = row_step<C>(plan.n2), mid = mid_step();
        const int64_t n1 = plan.n1, m1 = plan.m1, n2 = plan.n2, m2 = plan.m2;
        const bool right_now = need_right && plan.right_blocks == 1;
        for (int64_t s = 0; s < plan.terms; ++s) {
            C* dright = sums + left_size() + s * m2 * right_step();
            const C* forward_left = left_forward + s * m1 * n1;
            const C* transposed_left = left_transposed + s * m1 * n1;
            const C* to_m2 = right_panels + s * panel_count(m2) * n2 * kPanel;
            const C* to_n2 = right_t_panels + s * panel_count(n2) * m2 * kPanel;
            if (plan.via_left) {
                if (dx || right_now)
                    through_left(transposed_left, n1, m1, tokens, m2, g, g_step(), tile.mid, mid, false);
                if (dx) through_right(to_n2, n2, m2, tokens * n1, tile.mid, mid, tile.dx, dx_step, s > 0);
                if (right_now) add_right(dright, m2, n2, tokens * n1, tile.mid, mid, xs, x_step());
                if (need_left) {
                    through_right(to_m2, m2, n2, tokens * n1, xs, x_step(), tile.mid2, mid, false);
                    add_left(s, sums, tokens, m2, g, g_step(), tile.mid2, mid);
                }
            } else {
                if (dx || need_left) through_right(to_n2, n2, m2, tokens * m1, g, g_step(), tile.mid, mid, false);
                if (dx) through_left(transposed_left, n1, m1, tokens, n2, tile.mid, mid, tile.dx, dx_step, s > 0);
                if (need_left) add_left(s, sums, tokens, n2, tile.mid, mid, xs, x_step());
                if (right_now) {
                    through_left(forward_left, m1, n1, tokens, n2, xs, x_step(), tile.mid2, mid, false);
                    add_right(dright, m2, n2, tokens * m1, g, g_step(), tile.mid2, mid);
                }
            }
        }
    }

    // Scratch of one block of dRight: the operand that the left factor contracts (some lanes, before and after), and
    // the other one.
    struct RightTile {
        C *source, *contracted, *other;
    };
    RightTile carve_right(Carver& c) const {
        const int64_t t = plan.tile_tokens, step = row_step<C>(plan.right_block);
        RightTile tile{};
        tile.source = c.take<C>(t * (plan.via_left ? plan.m1 : plan.n1) * step);
        tile.contracted = c.take<C>(t * (plan.via_left ? plan.n1 : plan.m1) * step);
        tile.other = plan.via_left ? c.take<C>(t * plan.n1 * x_step()) : c.take<C>(t * plan.m1 * g_step());
        return tile;
    }
    size_t task_bytes() const {
        Carver tile(nullptr), right_tile(nullptr);
        carve(tile);
        if (plan.right_blocks > 1) carve_right(right_tile);
        return tile.used() > right_tile.used() ? tile.used() : right_tile.used();
    }

    // Lanes [lane, lane + lanes) of tokens [t, t + tokens) of the operand that the left factor contracts, contracted
    // with term s.
    void contract_lanes(int64_t s, int64_t t, int64_t tokens, int64_t lane, int64_t lanes, const RightTile& tile,
                        int64_t step) const {
        const E* from = plan.via_left ? grad + t * grad_stride : x + t * x_stride;
        const int64_t stride = plan.via_left ? grad_stride : x_stride;
        const int64_t outer = plan.via_left ? plan.m1 : plan.n1, inner = plan.via_left ? plan.m2 : plan.n2;
        const int64_t outputs = plan.via_left ? plan.n1 : plan.m1;
        stage_tokens<C, E, C>(plan.commuted, from + lane * (plan.commuted ? outer : 1), stride, tokens, outer, inner,
                              lanes, tile.source, step);
        through_left((plan.via_left ? left_transposed : left_forward) + s * plan.m1 * plan.n1, outputs, outer, tokens,
                     lanes, tile.source, step, tile.contracted, step, false);
    }

    void right_block(int64_t block, int64_t from, int64_t end, const RightTile& tile, C* sums) const {
        const int64_t lane = block * plan.right_block, all = plan.via_left ? plan.m2 : plan.n2;
        const int64_t lanes = all - lane < plan.right_block ? all - lane : plan.right_block;
        const int64_t step = row_step<C>(plan.right_block);
        for (int64_t t = from; t < end; t += plan.tile_tokens) {
            const int64_t tokens = end - t < plan.tile_tokens ? end - t : plan.tile_tokens;
            const C* other = plan.via_left ? stage_x(t, tokens, tile.other) : stage_g(t, tokens, tile.other);
            for (int64_t s = 0; s < plan.terms; ++s) {
                contract_lanes(s, t, tokens, lane, lanes, tile, step);
                C* out = sums + left_size() + s * plan.m2 * right_step();
                if (plan.via_left)
                    add_right(out + lane * right_step(), lanes, plan.n2, tokens * plan.n1, tile.contracted, step, other,
                              x_step());
                else
                    add_right(out + lane, plan.m2, lanes, tokens * plan.m1, other, g_step(), tile.contracted, step);
            }
        }
    }

    void run(int64_t chunk) const {
        C* sums = partial + chunk * partial_size();
        memset(sums, 0, static_cast<size_t>(partial_size()) * sizeof(C));
        void* memory = scratch(ScratchSlot::task, task_bytes());
        Carver carver(memory), right_carver(memory);
        const Tile tile = carve(carver);
        const int64_t from = plan.tokens * chunk / plan.chunks, end = plan.tokens * (chunk + 1) / plan.chunks;
        const int64_t inputs = plan.n1 * plan.n2;
        for (int64_t t = from; t < end; t += plan.tile_tokens) {
            const int64_t tokens = end - t < plan.tile_tokens ? end - t : plan.tile_tokens;
            const C* g = stage_g(t, tokens, tile.g);
            const C* xs = stage_x(t, tokens, tile.x);
            tile_gradients(tile, tokens, g, xs, sums);
            if (need_bias) add_bias(sums, grad + t * grad_stride, tokens);
            if (!dx) continue;
            const Finish<C, E> plain{nullptr, Act{}};
            if (plan.commuted)
                finish_transposed<C, E>(tile.dx, row_step<C>(plan.n2), tokens, plan.n2, plan.n1, dx + t * inputs,
                                        inputs, plain, 0);
            else
                finish_rows<C, E>(tile.dx, row_step<C>(plan.n2), tokens * plan.n1, plan.n2, dx + t * inputs, plan.n2,
                                  plain, 0, 0, 1);
        }
        if (!need_right || plan.right_blocks == 1) return;
        const RightTile right_tile = carve_right(right_carver);
        for (int64_t block = 0; block < plan.right_blocks; ++block) right_block(block, from, end, right_tile, sums);
    }

    // out (rows, cols) contiguous = the chunks' sums at `offset`, rows `step` apart.
    void reduce(E* out, int64_t offset, int64_t rows, int64_t cols, int64_t step) const {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) {
                C sum = 0;
                for (int64_t k = 0; k < plan.chunks; ++k) sum += partial[k * partial_size() + offset + r * step + c];
                put<C, E>(out + r * cols + c, sum);
            }
    }

    // Job i packs one panel: first those of right^T (if needed), then those of right.
    void pack(int64_t i) const {
        const int64_t to_m2 = plan.via_left && need_left ? plan.terms * panel_count(plan.m2) : 0;
        const bool forward = i < to_m2;
        if (!forward) i -= to_m2;
        const int64_t outputs = forward ? plan.m2 : plan.n2, depth = forward ? plan.n2 : plan.m2;
        const int64_t lane_stride = forward ? right.stride_row : right.stride_col;
        const int64_t k_stride = forward ? right.stride_col : right.stride_row;
        const int64_t s = i / panel_count(outputs), panel = i % panel_count(outputs), lane = panel * kPanel;
        const int64_t lanes = outputs - lane < kPanel ? outputs - lane : kPanel;
        const E* M = static_cast<const E*>(right.data) + s * right.stride_term + lane * lane_stride;
        pack_panel<C, E>(M, lane_stride, k_stride, lanes, depth, kVectors,
                         (forward ? right_panels : right_t_panels) + i * depth * kPanel);
    }
    int64_t pack_jobs() const {
        return plan.terms * (panel_count(plan.n2) + (plan.via_left && need_left ? panel_count(plan.m2) : 0));
    }
};

template <class C, class E>
static void backward(const BackwardArgs& args, const Executor& executor) {
    typedef Backward<C, E> B;
    const Shape& shape = args.shape;
    B b{};
    b.plan = plan_backward(shape, Machine{Simd<C>::W, kMaxRows[2], 1, 0, executor.threads, false, false, 1, false});
    const bool commuted = b.plan.commuted;
    b.grad = static_cast<const E*>(args.grad), b.x = static_cast<const E*>(args.x);
    b.grad_stride = args.grad_stride, b.x_stride = args.x_stride;
    b.dx = static_cast<E*>(args.dx);
    b.left = commuted ? args.b : args.a, b.right = commuted ? args.a : args.b;
    E* dleft = static_cast<E*>(commuted ? args.db : args.da);
    E* dright = static_cast<E*>(commuted ? args.da : args.db);
    b.need_left = dleft, b.need_right = dright, b.need_bias = args.dbias;
    const bool in_place = __is_same(C, E) && !commuted;
    b.staged_g = !in_place || b.plan.m2 % Simd<C>::W != 0 || args.grad_stride != shape.m1 * shape.m2;
    // via_left reads x down its columns, where a power-of-two row length would thrash L1: it is copied to a better one.
    b.staged_x = !in_place || b.plan.via_left || b.plan.n2 % Simd<C>::W != 0 || args.x_stride != shape.n1 * shape.n2;

    const BackwardPlan& p = b.plan;
    const auto carve = [&](Carver& c) {
        b.left_forward = c.take<C>(b.left_size());
        b.left_transposed = c.take<C>(b.left_size());
        b.right_panels = c.take<C>(p.via_left && b.need_left ? p.terms * B::panel_count(p.m2) * p.n2 * B::kPanel : 0);
        b.right_t_panels = c.take<C>(p.terms * B::panel_count(p.n2) * p.m2 * B::kPanel);
        b.partial = c.take<C>(p.chunks * b.partial_size());
    };
    Carver count(nullptr);
    carve(count);
    record_scratch(static_cast<int64_t>(count.used() + b.task_bytes() * static_cast<size_t>(executor.threads)));
    Carver carver(scratch(ScratchSlot::call, count.used()));
    carve(carver);
    compact_left<C, E>(b.left, p.terms, p.m1, p.n1, false, b.left_forward);
    compact_left<C, E>(b.left, p.terms, p.m1, p.n1, true, b.left_transposed);

    const auto each = [&](int64_t jobs, bool share, void (*job)(void*, int64_t)) {
        if (share)
            executor.run(jobs, job, &b);
        else
            for (int64_t i = 0; i < jobs; ++i) job(&b, i);
    };
    each(b.pack_jobs(), p.m2 * p.n2 * p.terms > kSerialPack,
         [](void* arg, int64_t i) { static_cast<const B*>(arg)->pack(i); });
    each(p.chunks, p.chunks > 1, [](void* arg, int64_t i) { static_cast<const B*>(arg)->run(i); });
    if (dleft) b.reduce(dleft, 0, p.terms * p.m1, p.n1, p.n1);
    if (dright) b.reduce(dright, b.left_size(), p.terms * p.m2, p.n2, b.right_step());
    if (args.dbias) b.reduce(static_cast<E*>(args.dbias), b.left_size() + b.right_size(), 1, p.m1 * p.m2, p.m1 * p.m2);
}

}  // namespace KRON_ISA
}  // namespace kron
