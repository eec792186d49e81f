// The product with one large and one tiny factor: what is taken, the plan of a call, its launches.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/pack.cuh"
#include "cuda/common/sm90_launch.h"
#include "cuda/common/tiny.h"
#include "cuda/matmul/matmul_plan.h"
#include "cuda/matmul/matmul_sm80.cuh"

namespace kron {
namespace cuda {
namespace {

bool results_are_aligned(const ForwardArgs& args, const TinyShape& tiny) {
    const int64_t vector = 16 / size_of(args.shape.dtype);
    if (tiny.co * tiny.lo % vector || (!tiny.right && tiny.lo % vector)) return false;
    for (int64_t i = 0; i < args.count; ++i) {
        const Projection& one = args.projections[i];
        if (!is_aligned(one.y) || !is_aligned(one.bias) || !is_aligned(one.base)) return false;
    }
    return true;
}

bool factors_need_packing(const ForwardArgs& args, const TinyShape& tiny) {
    const int64_t vector = 16 / size_of(args.shape.dtype);
    for (int64_t i = 0; i < args.count; ++i) {
        const Factor& f = tiny.right ? args.projections[i].a : args.projections[i].b;
        if ((f.stride_col != 1 && tiny.li > 1) || tiny.li % vector || !is_aligned(f.data) || f.stride_row % vector ||
            (args.shape.terms > 1 && f.stride_term % vector))
            return true;
    }
    return false;
}

// As much of the inner dimension as fits; all of it, or equal parts of it.
int choose_panel(int inner, int tile, int64_t value_bytes, int64_t room) {
    const int tiles = int(divide_up(inner, tile));
    const int64_t most = std::max<int64_t>(1, (room / kRows - 16) / (tile * value_bytes));
    const int64_t panels = divide_up(tiles, most);
    return int(divide_up(tiles, panels)) * tile;
}

Status pack(const ForwardArgs& args, const MmPlan& plan, const Launch& launch, char* out) {
    const MmParams& p = plan.params;
    PackParams params{p.lo, p.li, int(plan.packed_columns), p.terms, p.count, {}};
    for (int i = 0; i < p.count; ++i) {
        const Factor& f = p.right ? args.projections[i].a : args.projections[i].b;
        params.factors[i] = {f.data, f.stride_term, f.stride_row, f.stride_col, out + i * plan.packed_bytes};
    }
    const Grid grid{divide_up(p.lo, kPackTile), divide_up(plan.packed_columns, kPackTile), int64_t(p.count) * p.terms};
    return with_type(args.shape.dtype, [&](auto type) {
        return start(pack_factors<decltype(type)>, grid, kPackThreads, kPackShared, launch, params);
    });
}

}  // namespace

int power_of_two_from(int64_t n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}

bool tokens_are_aligned(const void* data, int64_t stride, DType dtype, bool right, int64_t parts, int64_t width) {
    const int64_t vector = 16 / size_of(dtype);
    if (!is_aligned(data) || stride % vector) return false;
    if (!right || parts == 1) return width % vector == 0;
    if (parts & (parts - 1)) return false;
    return width % std::max<int64_t>(2, vector / parts) == 0;
}

const char* unsupported_matmul(const ForwardArgs& args, const Launch& launch) {
    TinyShape tiny{};
    if (const char* reason = unsupported_type(args.shape.dtype, launch)) return reason;
    if (!tiny_shape(args.shape, tiny)) return "no factor is tiny (at most 16 x 16)";
    if (args.shape.terms > kMostTerms) return "more than 16 terms";
    if (args.norm.residual || args.norm.weight) return "the CUDA product has no layer norm";
    // Sizes times 16 stay in 32 bits, and grids within their limits.
    if (tiny.lo > int64_t(1) << 26 || tiny.li > 1 << 20 || args.shape.tokens > int64_t(1) << 26)
        return "more than 2^26 tokens or rows of the large factor, or 2^20 columns of it";
    if (plan_matmul(args, launch).shared_bytes > launch.shared_per_block)
        return "the device has too little shared memory for a block of the CUDA product";
    return nullptr;
}

MmPlan plan_matmul(const ForwardArgs& args, const Launch& launch, bool reduce) {
    TinyShape tiny{};
    tiny_shape(args.shape, tiny);
    const int64_t bytes = size_of(args.shape.dtype), vector = 16 / bytes;
    MmPlan plan{};
    MmParams& p = plan.params;
    p.x = args.x, p.x_stride = args.x_stride, p.tokens = args.shape.tokens;
    p.terms = int(args.shape.terms), p.right = tiny.right;
    p.co = int(tiny.co), p.ci = int(tiny.ci), p.lo = int(tiny.lo), p.li = int(tiny.li);
    // Terms follow each other along the inner dimension, which only the contracting form can do.
    plan.form = reduce ? MmForm::reduce : p.co > p.ci && p.terms == 1 && p.ci <= 8 ? MmForm::expand : MmForm::contract;
    const int rows = plan.form == MmForm::contract ? p.co : p.ci;
    p.halves = rows > 8 ? 2 : 1;
    plan.group = power_of_two_from(std::min(rows, 8));
    p.x_vector = tokens_are_aligned(args.x, args.x_stride, args.shape.dtype, tiny.right, tiny.ci, tiny.li);
    p.y_vector = results_are_aligned(args, tiny);
    p.term_inner = int(round_up(p.li, kStepBytes / bytes));
    p.inner = p.terms * p.term_inner;
    p.count = int(args.count);
    p.alpha = float(args.alpha);
    p.activation = args.activation;

    plan.pack = factors_need_packing(args, tiny);
    plan.packed_columns = round_up(p.li, vector);
    plan.packed_bytes = aligned_bytes(p.terms * int64_t(p.lo) * plan.packed_columns * bytes);

    const int64_t fixed = small_bytes(p, plan.group, plan.form) + kStages * kStageBytes;
    p.panel = choose_panel(p.inner, int(kTileBytes / bytes), bytes, launch.shared_per_block - fixed);
    plan.shared_bytes = fixed + int64_t(kRows) * row_pitch(p.panel, int(bytes));

    p.row_tiles = int(divide_up(p.tokens * p.halves, kRows / plan.group));
    p.column_tiles = int(divide_up(p.lo, kColumns));
    // Few tokens: the columns are shared out until every multiprocessor has two blocks.
    const int64_t wanted = divide_up(2 * launch.multiprocessors, std::max<int64_t>(1, int64_t(p.row_tiles) * p.count));
    p.split_tiles = int(divide_up(p.column_tiles, wanted));
    p.column_splits = int(divide_up(p.column_tiles, p.split_tiles));
    plan.blocks = int64_t(p.row_tiles) * p.count * p.column_splits;
    return plan;
}

Status run_matmul(const ForwardArgs& args, const MmPlan& plan, const Launch& launch, void* workspace) {
    if (!plan.blocks) return Status{0, ""};
    MmPlan ready = plan;
    char* packed = static_cast<char*>(workspace);
    if (plan.pack) {
        const Status status = pack(args, plan, launch, packed);
        if (status.code) return status;
    }
    Projection projections[kMostProjections];
    for (int i = 0; i < plan.params.count; ++i) {
        Projection& one = projections[i] = args.projections[i];
        Factor &tiny = plan.params.right ? one.b : one.a, &large = plan.params.right ? one.a : one.b;
        if (plan.pack)
            large = {packed + i * plan.packed_bytes, plan.params.lo * plan.packed_columns, plan.packed_columns, 1};
        MmProjection& out = ready.params.projections[i];
        out.large = large.data, out.large_row = large.stride_row, out.large_term = large.stride_term;
        out.tiny = tiny.data;
        out.tiny_term = tiny.stride_term, out.tiny_row = tiny.stride_row, out.tiny_col = tiny.stride_col;
        out.bias = one.bias, out.base = one.base, out.y = one.y;
    }
    if (plan.form != MmForm::reduce) {
        ForwardArgs row_major = args;
        row_major.projections = projections;
        if (!sm90::unsupported_kron_matmul(row_major, launch)) return sm90::kron_matmul(row_major, launch);
    }
    return with_type(args.shape.dtype, [&](auto type) { return start_matmul_sm80<decltype(type)>(ready, launch); });
}

const char* unsupported_kron_matmul(const ForwardArgs& args, const Launch& launch) {
    for (int64_t p = 0; p < args.count; ++p)
        if (args.projections[p].packed) return "packed factors are for the CPU kernels";
    if (!sm90::unsupported_kron_matmul(args, launch)) return nullptr;
    return unsupported_matmul(args, launch);
}
int64_t workspace_kron_matmul(const ForwardArgs& args, const Launch& launch) {
    if (!sm90::unsupported_kron_matmul(args, launch)) return 0;
    return workspace_matmul(plan_matmul(args, launch));
}
Status kron_matmul(const ForwardArgs& args, const Launch& launch) {
    if (!sm90::unsupported_kron_matmul(args, launch)) return sm90::kron_matmul(args, launch);
    return run_matmul(args, plan_matmul(args, launch), launch, launch.workspace);
}

}  // namespace cuda
}  // namespace kron
