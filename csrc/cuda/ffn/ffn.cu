// The feed-forward block: what is taken, the plan of a call, its launches.
#include "cuda/common/rows.cuh"
#include "cuda/common/sm90_launch.h"
#include "cuda/ffn/ffn_plan.h"
#include "cuda/ffn/ffn_sm80.cuh"

namespace kron {
namespace cuda {
namespace {

constexpr int kMostColumns = 384, kMostColumnBlocks = 2;

int columns_of(const FfnArgs& args) {
    const int64_t n = args.second.m2;
    if (args.first.n1 == 1) return kMostColumns;
    if (n <= 128) return 128;
    return n <= 256 || (n > 384 && n <= 512) ? 256 : kMostColumns;
}

int64_t shared_bytes(const FfnArgs& args, int warps) {
    return ffn::forward_layout(warps, int(size_of(args.first.dtype)), columns_of(args), int(args.first.n2),
                               int(args.first.m2), int(args.first.m1))
        .bytes;
}

FfnPlan plan_of(const FfnArgs& args, const Launch& launch) {
    const int64_t groups = divide_up(args.first.tokens * args.first.n1, ffn::kWarpRows);
    FfnPlan plan;
    plan.rows = int(args.first.n1);
    plan.columns = columns_of(args);
    plan.column_blocks = divide_up(args.second.m2, plan.columns);
    // Eight warps share the tiles of the factors where there is work for that many on every multiprocessor.
    plan.warps = groups * plan.column_blocks >= 8 * launch.multiprocessors ? 8 : 4;
    while (plan.warps > 1 && (plan.warps / 2 >= groups || shared_bytes(args, plan.warps) > launch.shared_per_block))
        plan.warps /= 2;
    plan.shared_bytes = shared_bytes(args, plan.warps);
    plan.blocks = divide_up(groups, plan.warps);
    // Blocks for all multiprocessors, by shares of the middle.
    const int64_t tiles = args.first.m2 / (size_of(args.first.dtype) == 2 ? 16 : 8);
    const int64_t shares = plan.blocks ? launch.multiprocessors / (plan.blocks * plan.column_blocks) : 1;
    plan.tiles = divide_up(tiles, std::max<int64_t>(1, std::min(shares, tiles)));
    plan.parts = divide_up(tiles, plan.tiles);
    return plan;
}

struct Operands {
    Rows x, b1, b2;
    float* partial;
};
Operands operands_of(const FfnArgs& args, const FfnPlan& plan, const Launch& launch, Arena& arena, Status& status) {
    const Shape &first = args.first, &second = args.second;
    Operands all;
    all.x = aligned_rows(first.dtype, Factor{args.x, 0, args.x_stride, 1}, first.tokens, first.n1 * first.n2, arena,
                         launch, status);
    all.b1 = aligned_rows(first.dtype, args.w1.b, first.m2, first.n2, arena, launch, status);
    all.b2 = aligned_rows(first.dtype, args.w2.b, second.m2, second.n2, arena, launch, status);
    const int64_t values = plan.parts * first.tokens * second.m1 * second.m2;
    all.partial = plan.parts > 1 ? static_cast<float*>(arena.take(values * 4)) : nullptr;
    return all;
}

}  // namespace

const char* unsupported_ffn_pairs(const Shape& first, const Shape& second, const Launch& launch) {
    if (const char* reason = unsupported_type(first.dtype, launch)) return reason;
    if (first.terms != 1 || second.terms != 1) return "a pair has more than one term";
    if (first.m1 != second.n1 || first.m2 != second.n2) return "the middle has another grid in each of the pairs";
    if (first.n1 != second.m1 || first.n1 < 1 || first.n1 > 2) return "the narrow grids are not of one or two rows";
    if (first.m1 > ffn::kMostWide) return "the middle has more than 16 rows";
    if (first.n2 < 16 || first.m2 < 16 || second.m2 < 16 || first.n2 % 16 || first.m2 % 16 || second.m2 % 16)
        return "a size of the right factors is no multiple of 16";
    return nullptr;
}

const char* unsupported_kron_ffn(const FfnArgs& args, const Launch& launch) {
    if (args.w1.packed || args.w2.packed) return "packed factors are for the CPU kernels";
    if (!sm90::unsupported_kron_ffn(args, launch)) return nullptr;
    if (const char* reason = unsupported_ffn_pairs(args.first, args.second, launch)) return reason;
    if (args.w1.base || args.w2.base) return "a tensor is to be added before the activation";
    if (args.second.m2 > kMostColumnBlocks * kMostColumns) return "the second right factor has more than 768 rows";
    if (args.norm.residual && args.second.m2 > kMostColumns) return "the norm is over more than 384 columns a row";
    if (!is_aligned(args.w2.y)) return "the result is not aligned to 16 bytes";
    constexpr int64_t kMost = 1 << 16;  // of what has to lie in shared memory: its sums fit an int
    if (args.first.n2 > kMost || args.first.m1 * args.first.m2 > kMost ||
        shared_bytes(args, 1) > launch.shared_per_block)
        return "16 rows of x and two tiles of the right factors exceed the shared memory of a block";
    return nullptr;
}

int64_t workspace_kron_ffn(const FfnArgs& args, const Launch& launch) {
    if (!sm90::unsupported_kron_ffn(args, launch)) return 0;
    Arena arena{nullptr, 0};
    Status status{0, ""};
    operands_of(args, plan_of(args, launch), launch, arena, status);
    return arena.used;
}

Status kron_ffn(const FfnArgs& args, const Launch& launch) {
    if (!sm90::unsupported_kron_ffn(args, launch)) return sm90::kron_ffn(args, launch);
    Status status{0, ""};
    if (args.first.tokens == 0) return status;
    const FfnPlan plan = plan_of(args, launch);
    Arena arena{static_cast<char*>(launch.workspace), 0};
    const Operands operands = operands_of(args, plan, launch, arena, status);
    if (status.code) return status;
    ffn::ForwardParams params;
    params.x = operands.x.data;
    params.x_stride = operands.x.stride;
    params.left = ffn::left_factors(args.w1.a, args.w2.a, args.first.m1);
    params.b1 = operands.b1.data;
    params.b1_row = operands.b1.stride;
    params.b2 = operands.b2.data;
    params.b2_row = operands.b2.stride;
    params.bias1 = args.w1.bias;
    params.bias2 = args.w2.bias;
    params.y = args.w2.y;
    params.residual = args.norm.residual;
    params.residual_stride = args.norm.residual_stride;
    params.norm_weight = args.norm.weight;
    params.norm_bias = args.norm.bias;
    params.eps = float(args.norm.eps);
    params.tokens = args.first.tokens;
    params.k = int(args.first.n2);
    params.middle = int(args.first.m2);
    params.n = int(args.second.m2);
    params.activation = args.activation;
    params.tiles = int(plan.tiles);
    params.partial = operands.partial;
    return with_type(args.first.dtype, [&](auto type) { return start_ffn_sm80<decltype(type)>(params, plan, launch); });
}

}  // namespace cuda
}  // namespace kron
