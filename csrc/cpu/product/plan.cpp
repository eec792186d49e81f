#include "cpu/product/plan.h"

#include <algorithm>

namespace kron {
namespace {

// Below this many multiply-adds a call is over before a second thread has woken up.
constexpr double kSerialWork = 400e3;
// Rows of the GEMM per tile: enough to reuse a panel of the right factor from L2, few enough that the tile of
// intermediates (rows x panel) stays in L1.
constexpr int64_t kTileRows = 96;
// Bytes of x and y a tile may cover, so that what is fetched ahead is still in L2 when it is used.
constexpr int64_t kTileBytes = 384 * 1024;
// Bytes of one block of a factor's gradient.
constexpr int64_t kSumsBytes = 192 * 1024;
// With fewer rows than this in all, packing the right factor costs more than it saves.
constexpr int64_t kDotRows = 24;
// Up to this many rows the threads share out the panels instead of the tokens.
constexpr int64_t kTaskPackRows = 192;
// A transposed load or store costs about as much as this many multiply-adds per element.
constexpr double kTransposeCost = 4;
constexpr double kOddTransposeCost = 24;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

bool is_shuffle_width(int64_t width) {
    return width == 1 || width == 2 || width == 4 || width == 8 || width == 16;
}

double transpose_cost(const Shape& s) {
    const double in = static_cast<double>(s.n1 * s.n2) * (is_shuffle_width(s.n2) ? kTransposeCost : kOddTransposeCost);
    const double out = static_cast<double>(s.m1 * s.m2) * (is_shuffle_width(s.m2) ? kTransposeCost : kOddTransposeCost);
    return in + out;
}

struct Candidate {
    bool commuted;
    bool right_first;
    int64_t m1, n1, m2, n2;
    double cost;
    double work;
};

Candidate forward_candidate(const Shape& s, int lanes, bool commuted, bool right_first) {
    Candidate c{commuted, right_first, s.m1, s.n1, s.m2, s.n2, 0, 0};
    if (commuted) std::swap(c.m1, c.m2), std::swap(c.n1, c.n2);
    const double S = static_cast<double>(s.terms);
    const double m1 = c.m1, n1 = c.n1, m2 = c.m2, n2 = c.n2;
    const double m2_lanes = round_up(c.m2, lanes), n2_lanes = round_up(c.n2, lanes);
    c.work = S * (right_first ? n1 * m2 * (n2 + m1) : m1 * n2 * (n1 + m2));
    c.cost = S * (right_first ? n1 * m2_lanes * (n2 + m1) : m1 * (n1 * n2_lanes + n2 * m2_lanes));
    if (commuted) c.cost += transpose_cost(s);
    return c;
}

Candidate best_candidate(const Shape& s, int lanes) {
    Candidate best = forward_candidate(s, lanes, false, true);
    for (const bool commuted : {false, true})
        for (const bool right_first : {true, false}) {
            const Candidate c = forward_candidate(s, lanes, commuted, right_first);
            if (c.cost < best.cost) best = c;
        }
    return best;
}

}  // namespace

int panel_vectors(int64_t m2, int lanes) {
    const int64_t vectors = ceil_div(m2, lanes);
    if (vectors == 1) return 1;
    return vectors % 2 != 0 && (vectors % 3 == 0 || vectors == 5) ? 3 : 2;
}

// Tokens of one of `tiles` equal tiles; where a tile has many blocks of rows, a whole number of them.
static int64_t tile_of(int64_t tokens, int64_t tiles, int64_t rows_a_token, int64_t row_block) {
    const int64_t tile = std::max<int64_t>(1, ceil_div(tokens, std::max<int64_t>(1, tiles)));
    if (row_block % rows_a_token != 0) return tile;
    const int64_t block = row_block / rows_a_token;
    return tile >= 2 * block ? round_up(tile, block) : tile;
}

Plan plan_forward(const Shape& s, const Machine& machine) {
    const Candidate best = best_candidate(s, machine.lanes);
    Plan p{};
    p.commuted = best.commuted;
    p.right_first = best.right_first;
    p.tokens = s.tokens, p.terms = s.terms;
    p.m1 = best.m1, p.n1 = best.n1, p.m2 = best.m2, p.n2 = best.n2;
    p.multiply_adds = best.work;
    p.panel_vectors = machine.panel_vectors ? machine.panel_vectors : panel_vectors(p.m2, machine.lanes);
    p.panels = ceil_div(p.m2, static_cast<int64_t>(p.panel_vectors) * machine.lanes);

    const int64_t rows_a_token = p.right_first ? p.n1 : p.m1;
    const bool dot_allowed = p.commuted ? machine.can_dot_commuted : machine.can_dot;
    p.packed = machine.prepacked || !dot_allowed || p.tokens * rows_a_token > kDotRows || p.m2 * p.n2 <= 4096;

    const int64_t projections = machine.projections;
    p.serial = best.work * static_cast<double>(s.tokens * projections) < kSerialWork;
    const int64_t threads = p.serial ? 1 : machine.threads;
    const int64_t token_bytes = (projections * s.m1 * s.m2 + s.n1 * s.n2) * size_of(s.dtype);
    const int64_t tile_rows =
        std::max<int64_t>(std::min(kTileRows / s.terms, kTileBytes / token_bytes * rows_a_token), machine.max_rows);
    const int64_t rows = p.tokens * rows_a_token;
    const bool small_right = s.terms * p.m2 * p.n2 <= kSerialPack;
    if (!p.packed || (rows <= kTaskPackRows && p.panels >= threads && !small_right)) {
        // Few rows: the threads share out the panels, and each packs its own while it is in L1.
        p.pack_in_task = p.packed && !machine.prepacked;
        p.token_tiles = 1;
        p.panel_groups = std::min(p.panels, threads);
    } else {
        p.token_tiles = ceil_div(p.tokens, std::max<int64_t>(1, tile_rows / rows_a_token));
        // Equal shares: a whole number of tiles for every thread, as long as a tile still fills the register tile.
        if (rows >= threads * machine.max_rows) p.token_tiles = std::min(p.tokens, round_up(p.token_tiles, threads));
        p.panel_groups = 1;
    }
    p.tile_tokens = tile_of(p.tokens, p.token_tiles, rows_a_token, machine.row_block);
    p.token_tiles = ceil_div(p.tokens, p.tile_tokens);
    return p;
}

FfnPlan plan_ffn(const Shape& first, const Shape& second, const Machine& machine) {
    FfnPlan p{};
    p.tokens = first.tokens, p.terms1 = first.terms, p.terms2 = second.terms;
    if (second.n1 != first.m1 || second.n2 != first.m2) return p;
    const Candidate best1 = best_candidate(first, machine.lanes), best2 = best_candidate(second, machine.lanes);
    const auto cost_of = [&](bool commuted) {
        return forward_candidate(first, machine.lanes, commuted, true).cost +
               forward_candidate(second, machine.lanes, commuted, false).cost;
    };
    p.commuted = machine.prepacked ? best1.commuted : cost_of(true) < cost_of(false);
    // What fusing saves, the traffic of the intermediate through the cache, is worth some operations but not many.
    p.fused =
        cost_of(p.commuted) <= 1.25 * (best1.cost + best2.cost) && !(machine.prepacked && best2.commuted != p.commuted);
    p.n1 = first.n1, p.n2 = first.n2, p.m1 = first.m1, p.m2 = first.m2, p.p1 = second.m1, p.p2 = second.m2;
    if (p.commuted) std::swap(p.n1, p.n2), std::swap(p.m1, p.m2), std::swap(p.p1, p.p2);

    const int64_t rows_a_token = std::max(p.terms1 * p.n1, p.terms2 * p.p1);
    const double work = forward_candidate(first, machine.lanes, p.commuted, true).work +
                        forward_candidate(second, machine.lanes, p.commuted, false).work;
    p.serial = work * static_cast<double>(p.tokens) < kSerialWork;
    const int64_t threads = p.serial ? 1 : machine.threads;
    const int64_t rows = p.tokens * rows_a_token;
    const int64_t width = static_cast<int64_t>(machine.panel_vectors ? machine.panel_vectors : 2) * machine.lanes;
    const bool panels_enough = p.m2 >= threads * width && p.p2 >= threads * width;
    if (threads > 1 && rows <= kTaskPackRows && panels_enough) {
        p.token_tiles = 1;
        p.panel_groups = threads;
    } else {
        p.token_tiles = ceil_div(p.tokens, std::max<int64_t>(1, kTileRows / rows_a_token));
        if (rows >= threads * machine.max_rows) p.token_tiles = std::min(p.tokens, round_up(p.token_tiles, threads));
        p.panel_groups = 1;
    }
    const int64_t equal_rows = p.n1 == p.p1 ? p.n1 : 1;
    p.tile_tokens = tile_of(p.tokens, p.token_tiles, equal_rows, machine.row_block);
    p.token_tiles = ceil_div(p.tokens, p.tile_tokens);
    return p;
}

BackwardPlan plan_backward(const Shape& s, const Machine& machine) {
    BackwardPlan best{};
    double best_cost = -1;
    for (const bool commuted : {false, true})
        for (const bool via_left : {true, false}) {
            int64_t a1 = s.m1, b1 = s.n1, a2 = s.m2, b2 = s.n2;
            if (commuted) std::swap(a1, a2), std::swap(b1, b2);
            const double m1 = a1, n1 = b1, m2 = a2, n2 = b2;
            const double m2_lanes = round_up(a2, machine.lanes), n2_lanes = round_up(b2, machine.lanes);
            const double work = via_left ? 2 * n1 * m1 * m2 + 3 * n1 * m2 * n2 : 2 * m1 * m2 * n2 + 3 * m1 * n1 * n2;
            double cost = via_left ? n1 * m1 * m2_lanes * 2 + n1 * m2 * n2_lanes * 2 + n1 * n2 * m2_lanes
                                   : m1 * m2 * n2_lanes * 2 + m1 * n1 * n2_lanes * 3;
            if (commuted) cost += transpose_cost(s) + static_cast<double>(s.n1 * s.n2) * kTransposeCost;
            if (best_cost < 0 || cost < best_cost) {
                best_cost = cost;
                best = BackwardPlan{commuted,
                                    via_left,
                                    s.tokens,
                                    s.terms,
                                    a1,
                                    b1,
                                    a2,
                                    b2,
                                    0,
                                    0,
                                    0,
                                    0,
                                    work * static_cast<double>(s.terms)};
            }
        }
    const int64_t rows_a_token = best.via_left ? best.n1 : best.m1;
    best.tile_tokens = std::max<int64_t>(1, kTileRows / rows_a_token);
    // The sums of a large right factor are taken block by block, so that a block stays in L2 while all tokens pass.
    const int64_t lanes = best.via_left ? best.m2 : best.n2;
    const int64_t blocks = ceil_div(best.m2 * best.n2 * 4, kSumsBytes);
    best.right_block = round_up(ceil_div(lanes, blocks), 96);
    best.right_blocks = ceil_div(lanes, best.right_block);
    const bool serial = best.multiply_adds * static_cast<double>(s.tokens) < kSerialWork;
    best.chunks = serial ? 1 : std::min<int64_t>(machine.threads, ceil_div(std::max<int64_t>(1, s.tokens), 4));
    return best;
}

}  // namespace kron
