// The feed-forward block's backward: the middle by a kernel of its own, the rest as plain products of its results.
#include "cuda/common/rows.cuh"
#include "cuda/common/sums.cuh"
#include "cuda/ffn/ffn_backward_sm80.cuh"
#include "cuda/ffn/ffn_plan.h"

namespace kron {
namespace cuda {
namespace {

int64_t shared_bytes(const FfnBackwardArgs& args) {
    const int k = int(args.first.n2), n = int(args.second.m2), wide = int(args.first.m1);
    return args.first.dtype == DType::f32 ? ffn::backward_layout<float>(k, n, wide).bytes
                                          : ffn::backward_layout<Bf16>(k, n, wide).bytes;
}

FfnBackwardPlan plan_of(const FfnBackwardArgs& args, const Launch& launch) {
    const int columns = args.first.dtype == DType::f32 ? ffn::kBlockColumns<float> : ffn::kBlockColumns<Bf16>;
    FfnBackwardPlan plan;
    plan.rows = int(args.first.n1);
    plan.column_blocks = divide_up(args.first.m2, columns);
    plan.shared_bytes = shared_bytes(args);
    // Two blocks are on a multiprocessor at a time. No fewer than a group of rows for each warp.
    const int64_t most = divide_up(args.first.tokens * plan.rows, ffn::kWarpRows * ffn::kBackwardWarps);
    plan.shares = std::max<int64_t>(1, std::min(most, 2 * int64_t(launch.multiprocessors) / plan.column_blocks));
    return plan;
}

// The products behind the kernel: of the rows of all tokens where these follow each other in memory, otherwise of
// tokens with the identity as left factor.
struct Product {
    Shape shape;
    Factor left;
};
Product product_of(const FfnBackwardArgs& args, bool flat, int64_t m2, int64_t n2, void* identity) {
    const int64_t rows = args.first.n1;
    const Shape shape = flat ? Shape{args.first.tokens * rows, 1, 1, 1, m2, n2, args.first.dtype}
                             : Shape{args.first.tokens, 1, rows, rows, m2, n2, args.first.dtype};
    return {shape, Factor{identity, 0, rows, 1}};
}

// z and dh where they are needed, sums of the kernel, and what the products need for themselves.
struct Operands {
    Rows x, grad, b1, b2;
    void *z, *dh, *identity, *rest;
    float *bias_sums, *left_sums;
};
Operands operands_of(const FfnBackwardArgs& args, const FfnBackwardPlan& plan, const Launch& launch, Arena& arena,
                     Status& status) {
    const Shape &first = args.first, &second = args.second;
    const int64_t narrow = first.tokens * first.n1 * first.m2 * size_of(first.dtype);
    Operands all;
    all.x = aligned_rows(first.dtype, Factor{args.x, 0, args.x_stride, 1}, first.tokens, first.n1 * first.n2, arena,
                         launch, status);
    all.grad = aligned_rows(first.dtype, Factor{args.grad, 0, args.grad_stride, 1}, first.tokens, second.m1 * second.m2,
                            arena, launch, status);
    all.b1 = aligned_rows(first.dtype, args.b1, first.m2, first.n2, arena, launch, status);
    all.b2 = aligned_rows(first.dtype, transposed(args.b2), second.n2, second.m2, arena, launch, status);
    all.z = args.db2 ? arena.take(narrow) : nullptr;
    all.dh = args.dx || args.db1 ? arena.take(narrow) : nullptr;
    all.identity = arena.take(first.n1 * first.n1 * size_of(first.dtype));
    all.bias_sums = static_cast<float*>(arena.take(plan.shares * first.m1 * first.m2 * 4));
    all.left_sums = static_cast<float*>(arena.take(plan.shares * plan.column_blocks * first.m1 * 4 * 4));
    all.rest = arena.base ? arena.base + arena.used : nullptr;
    return all;
}

// dX = dh B1.
ForwardArgs dx_args(const FfnBackwardArgs& args, const Operands& o, Projection& projection) {
    const Product product = product_of(args, true, args.first.n2, args.first.m2, o.identity);
    projection = {product.left, transposed(args.b1), nullptr, nullptr, 0, args.dx};
    return {product.shape, o.dh, args.first.m2, 1, &projection, Activation::none, {}};
}
// dB1 = sum dh^T x.
BackwardArgs db1_args(const FfnBackwardArgs& args, const Operands& o) {
    const int64_t k = args.first.n2, middle = args.first.m2, rows = args.first.n1;
    const bool flat = o.x.stride == rows * k;
    const Product product = product_of(args, flat, middle, k, o.identity);
    return {product.shape,
            o.dh,
            flat ? middle : rows * middle,
            o.x.data,
            flat ? k : o.x.stride,
            product.left,
            args.b1,
            nullptr,
            nullptr,
            args.db1,
            nullptr};
}
// dB2 = sum dY^T z, dbias2 = sum dY.
BackwardArgs db2_args(const FfnBackwardArgs& args, const Operands& o) {
    const int64_t n = args.second.m2, middle = args.first.m2, rows = args.first.n1;
    const bool flat = o.grad.stride == rows * n && !args.dbias2;
    const Product product = product_of(args, flat, n, middle, o.identity);
    return {product.shape,
            o.grad.data,
            flat ? n : o.grad.stride,
            o.z,
            flat ? middle : rows * middle,
            product.left,
            args.b2,
            nullptr,
            nullptr,
            args.db2,
            args.dbias2};
}

Status start_middle(const FfnBackwardArgs& args, const Operands& o, const FfnBackwardPlan& plan, const Launch& launch) {
    ffn::BackwardParams p;
    p.x = o.x.data, p.x_stride = o.x.stride;
    p.grad = o.grad.data, p.grad_stride = o.grad.stride;
    p.left = ffn::left_factors(args.a1, args.a2, args.first.m1);
    p.b1 = o.b1.data, p.b1_row = o.b1.stride;
    p.b2 = o.b2.data, p.b2_row = o.b2.stride;
    p.bias1 = args.bias1;
    p.z = o.z, p.dh = o.dh, p.identity = o.identity;
    p.bias_sums = o.bias_sums, p.left_sums = o.left_sums;
    p.tokens = args.first.tokens;
    p.k = int(args.first.n2), p.middle = int(args.first.m2), p.n = int(args.second.m2);
    p.activation = args.activation;
    return with_type(args.first.dtype,
                     [&](auto type) { return start_ffn_backward_sm80<decltype(type)>(p, plan, launch); });
}

// The second stage of the sums over tokens.
Status start_sums(const FfnBackwardArgs& args, const Operands& o, const FfnBackwardPlan& plan, const Launch& launch) {
    const int64_t rows = args.first.n1, wide = args.first.m1, middle = args.first.m2;
    const int64_t blocks = plan.shares * plan.column_blocks;
    const SumParams all[] = {
        {o.bias_sums, args.dbias1, 1, 1, wide * middle, plan.shares, wide * middle, 0, 0, 1, 1},
        {o.left_sums, args.da1, 1, wide, rows, blocks, wide * 4, 0, 4, 1, kSumThreads},
        {o.left_sums + 2, args.da2, 1, rows, wide, blocks, wide * 4, 0, 1, 4, kSumThreads},
    };
    Status status{0, ""};
    for (const SumParams& one : all) {
        if (!one.to || status.code) continue;
        const int64_t results = kSumThreads / one.sharers;
        const Grid grid{divide_up(one.rows * one.columns, results)};
        status = with_type(args.first.dtype, [&](auto type) {
            return start(sum_parts<decltype(type)>, grid, kSumThreads, kSumThreads * 4, launch, one);
        });
    }
    return status;
}

}  // namespace

const char* unsupported_kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch) {
    if (const char* reason = unsupported_ffn_pairs(args.first, args.second, launch)) return reason;
    if (args.first.tokens == 0) return "gradients of no tokens";
    constexpr int64_t kMost = 1 << 16;  // of what has to lie in shared memory: its sums fit an int
    if (args.first.n2 > kMost || args.second.m2 > kMost || args.first.m2 > kMost ||
        shared_bytes(args) > launch.shared_per_block)
        return "32 rows of B1 and 32 columns of B2 exceed the shared memory of a block";
    const Operands none{};
    Projection projection;
    if (args.dx)
        if (const char* reason = unsupported_kron_matmul(dx_args(args, none, projection), launch)) return reason;
    if (args.db1)
        if (const char* reason = unsupported_kron_matmul_backward(db1_args(args, none), launch)) return reason;
    if (args.db2 || args.dbias2)
        if (const char* reason = unsupported_kron_matmul_backward(db2_args(args, none), launch)) return reason;
    return nullptr;
}

int64_t workspace_kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch) {
    Arena arena{nullptr, 0};
    Status status{0, ""};
    const Operands o = operands_of(args, plan_of(args, launch), launch, arena, status);
    Projection projection;
    int64_t rest = 0;
    if (args.dx) rest = workspace_kron_matmul(dx_args(args, o, projection), launch);
    if (args.db1) rest = std::max(rest, workspace_kron_matmul_backward(db1_args(args, o), launch));
    if (args.db2 || args.dbias2) rest = std::max(rest, workspace_kron_matmul_backward(db2_args(args, o), launch));
    return arena.used + rest;
}

Status kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch) {
    Status status{0, ""};
    const FfnBackwardPlan plan = plan_of(args, launch);
    Arena arena{static_cast<char*>(launch.workspace), 0};
    const Operands o = operands_of(args, plan, launch, arena, status);
    if (!status.code) status = start_middle(args, o, plan, launch);
    if (!status.code) status = start_sums(args, o, plan, launch);
    Launch rest = launch;
    rest.workspace = o.rest;
    rest.workspace_bytes = launch.workspace_bytes - arena.used;
    Projection projection;
    if (args.dx && !status.code) status = kron_matmul(dx_args(args, o, projection), rest);
    if (args.db1 && !status.code) status = kron_matmul_backward(db1_args(args, o), rest);
    if ((args.db2 || args.dbias2) && !status.code) status = kron_matmul_backward(db2_args(args, o), rest);
    return status;
}

}  // namespace cuda
}  // namespace kron
