// Gradients of the product with one large and one tiny factor.
//
// dx is the product with transposed factors. Of the tiny factor's gradient every number is a sum over tokens and
// columns of a row of L x times a part of dy, or of a row of L^T dy times a part of x: the side with fewer rows is
// multiplied, in the reducing form of the product. Where that is dy's side and there is one term, it gives dx in the
// same pass. Sums over tokens have two stages, each in a fixed order. The stages follow each other on the stream and
// share the workspace.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/sums.cuh"
#include "cuda/common/tiny.h"
#include "cuda/matmul/matmul_plan.h"

namespace kron {
namespace cuda {
namespace {

struct Stage {
    const BackwardArgs& args;
    const Launch& launch;
    TinyShape tiny;
    bool launches;  // or only counts the bytes of the workspace
    char* workspace;
    int64_t bytes;  // of the largest stage
    Status status;

    Stage(const BackwardArgs& args, const Launch& launch, bool launches)
        : args(args),
          launch(launch),
          tiny{},
          launches(launches),
          workspace(static_cast<char*>(launch.workspace)),
          bytes(0),
          status{0, ""} {
        tiny_shape(args.shape, tiny);
    }
    bool runs() const { return launches && !status.code; }
    void need(int64_t more) { bytes = std::max(bytes, more); }
    const Factor& tiny_factor() const { return tiny.right ? args.b : args.a; }
    void* tiny_grad() const { return tiny.right ? args.db : args.da; }
    void* large_grad() const { return tiny.right ? args.da : args.db; }
    bool dy_has_fewer_rows() const { return tiny.co <= tiny.ci; }
    bool aligned(bool of_x) const {
        return of_x ? tokens_are_aligned(args.x, args.x_stride, args.shape.dtype, tiny.right, tiny.ci, tiny.li)
                    : tokens_are_aligned(args.grad, args.grad_stride, args.shape.dtype, tiny.right, tiny.co, tiny.lo);
    }

    void sum(SumParams p) {
        if (!runs()) return;
        const int64_t blocks = divide_up(p.terms * p.rows * p.columns, kSumThreads / p.sharers);
        status = with_type(args.shape.dtype, [&](auto type) {
            return start(sum_parts<decltype(type)>, Grid{blocks, 1, 1}, kSumThreads, kSumThreads * 4, launch, p);
        });
    }

    void dx();
    void tiny_grad_of_terms(int64_t first, int64_t count, void* dx);
    void large();
    void bias();
};

ForwardArgs product(const Shape& shape, const void* x, int64_t x_stride, int64_t count, const Projection* projections) {
    return ForwardArgs{shape, x, x_stride, count, projections, Activation::none, NormArgs{}};
}

void Stage::dx() {
    const Projection projection{transposed(args.a), transposed(args.b), nullptr, nullptr, 0, args.dx};
    const ForwardArgs forward = product(transposed(args.shape), args.grad, args.grad_stride, 1, &projection);
    const MmPlan plan = plan_matmul(forward, launch);
    need(workspace_matmul(plan));
    if (runs()) status = run_matmul(forward, plan, launch, workspace);
}

// With dx as well, if it is not null.
void Stage::tiny_grad_of_terms(int64_t first, int64_t count, void* dx) {
    const bool of_dy = dy_has_fewer_rows();
    const auto term_of = [&](Factor f, int64_t term) {
        f.data = static_cast<const char*>(f.data) + term * f.stride_term * size_of(args.shape.dtype);
        return of_dy ? transposed(f) : f;
    };
    Shape shape = of_dy ? transposed(args.shape) : args.shape;
    shape.terms = 1;
    Projection projections[kMostProjections];
    for (int64_t i = 0; i < count; ++i)
        projections[i] = {term_of(args.a, first + i), term_of(args.b, first + i), nullptr, nullptr, 0, dx};
    const ForwardArgs forward = of_dy ? product(shape, args.grad, args.grad_stride, count, projections)
                                      : product(shape, args.x, args.x_stride, count, projections);
    MmPlan plan = plan_matmul(forward, launch, true);
    MmParams& p = plan.params;
    p.other = of_dy ? args.x : args.grad;
    p.other_stride = of_dy ? args.x_stride : args.grad_stride;
    p.other_vector = aligned(of_dy);
    const int64_t row_count = p.halves * plan.group, values = p.co * row_count;
    const int64_t blocks = int64_t(p.row_tiles) * p.column_splits;
    const int64_t packed = workspace_matmul(plan);
    need(packed + aligned_bytes(count * blocks * values * 4));
    if (!runs()) return;
    p.sums = reinterpret_cast<float*>(workspace + packed);
    status = run_matmul(forward, plan, launch, workspace);
    char* to = static_cast<char*>(tiny_grad()) + first * tiny.co * tiny.ci * size_of(args.shape.dtype);
    // A sum is at [m][row]; m numbers the parts of `other`, row those of the tensor that was multiplied.
    const int64_t stride_co = of_dy ? 1 : row_count, stride_ci = of_dy ? row_count : 1;
    sum({p.sums, to, count, tiny.co, tiny.ci, blocks, values, blocks * values, stride_co, stride_ci, kSumThreads});
}

void Stage::large() {
    // The side with more parts is contracted, down to as many rows as the other has.
    const bool contract_x = dy_has_fewer_rows();
    LargeGradPlan plan{};
    LargeGradParams& p = plan.params;
    const Factor& f = tiny_factor();
    p.tiny = f.data, p.tiny_term = f.stride_term;
    p.tiny_row = contract_x ? f.stride_row : f.stride_col, p.tiny_col = contract_x ? f.stride_col : f.stride_row;
    p.plain = contract_x ? args.grad : args.x, p.contracted = contract_x ? args.x : args.grad;
    p.plain_stride = contract_x ? args.grad_stride : args.x_stride;
    p.contracted_stride = contract_x ? args.x_stride : args.grad_stride;
    p.plain_width = int(contract_x ? tiny.lo : tiny.li), p.contracted_width = int(contract_x ? tiny.li : tiny.lo);
    p.rows = int(contract_x ? tiny.co : tiny.ci), p.parts = int(contract_x ? tiny.ci : tiny.co);
    p.plain_vector = aligned(!contract_x), p.contracted_vector = aligned(contract_x);
    p.right = tiny.right;
    p.tokens = args.shape.tokens, p.terms = int(args.shape.terms);
    p.halves = p.rows > 8 ? 2 : 1;
    plan.group = power_of_two_from(std::min(p.rows, 8));
    p.plain_tiles = int(divide_up(p.plain_width, kLargeGradPlain));
    p.contracted_tiles = int(divide_up(p.contracted_width, kLargeGradContracted));

    // Three blocks a multiprocessor, but no split of fewer tokens than one step takes.
    const int64_t tiles = int64_t(p.plain_tiles) * p.contracted_tiles * p.terms,
                  step = large_grad_rows(size_of(args.shape.dtype)) / plan.group;
    const int64_t steps = divide_up(p.tokens * p.halves, step);
    const int64_t wanted = std::min<int64_t>({divide_up(3 * launch.multiprocessors, tiles), steps, 64});
    p.split_tokens = divide_up(steps, wanted) * step;
    plan.splits = divide_up(p.tokens * p.halves, p.split_tokens);
    const int64_t size = int64_t(p.plain_width) * p.contracted_width, results = size * p.terms;
    need(aligned_bytes(plan.splits * results * 4));
    if (!runs()) return;
    p.sums = reinterpret_cast<float*>(workspace);
    status = with_type(args.shape.dtype, [&](auto type) { return start_large_grad<decltype(type)>(plan, launch); });
    const int64_t stride_lo = contract_x ? p.contracted_width : 1, stride_li = contract_x ? 1 : p.contracted_width;
    sum({p.sums, large_grad(), p.terms, tiny.lo, tiny.li, plan.splits, results, size, stride_lo, stride_li, 1});
}

void Stage::bias() {
    const int64_t columns = tiny.co * tiny.lo, vector = 16 / size_of(args.shape.dtype);
    const int64_t column_blocks = divide_up(columns, 32 * vector);
    const int64_t wanted =
        std::min<int64_t>(divide_up(4 * launch.multiprocessors, column_blocks), divide_up(args.shape.tokens, 16));
    const int64_t rows_of_split = divide_up(args.shape.tokens, wanted);
    const int64_t splits = divide_up(args.shape.tokens, rows_of_split);
    need(aligned_bytes(splits * columns * 4));
    if (!runs()) return;
    float* sums = reinterpret_cast<float*>(workspace);
    const ColumnSumParams p{args.grad, args.grad_stride, args.shape.tokens,
                            columns,   rows_of_split,    is_aligned(args.grad) && args.grad_stride % vector == 0,
                            sums};
    status = with_type(args.shape.dtype, [&](auto type) {
        return start(sum_columns<decltype(type)>, Grid{column_blocks, splits, 1}, kColumnSumThreads,
                     kColumnSumThreads * 16 / int64_t(sizeof(type)) * 4, launch, p);
    });
    sum({sums, args.dbias, 1, 1, columns, splits, columns, 0, 0, 1, 1});
}

Stage backward(const BackwardArgs& args, const Launch& launch, bool launches) {
    Stage stage(args, launch, launches);
    const bool together = stage.dy_has_fewer_rows() && args.shape.terms == 1 && stage.tiny.co <= 8;
    if (stage.tiny_grad())
        for (int64_t s = 0; s < args.shape.terms; s += kMostProjections)
            stage.tiny_grad_of_terms(s, std::min(args.shape.terms - s, kMostProjections), together ? args.dx : nullptr);
    if (args.dx && !(together && stage.tiny_grad())) stage.dx();
    if (stage.large_grad()) stage.large();
    if (args.dbias) stage.bias();
    return stage;
}

}  // namespace

const char* unsupported_kron_matmul_backward(const BackwardArgs& args, const Launch& launch) {
    const Projection projection{args.a, args.b, nullptr, nullptr, 0, nullptr};
    for (const Shape& shape : {args.shape, transposed(args.shape)})
        if (const char* reason = unsupported_matmul(product(shape, args.x, args.x_stride, 1, &projection), launch))
            return reason;
    if (!args.shape.tokens) return "gradients of no tokens";
    return nullptr;
}
int64_t workspace_kron_matmul_backward(const BackwardArgs& args, const Launch& launch) {
    return backward(args, launch, false).bytes;
}
Status kron_matmul_backward(const BackwardArgs& args, const Launch& launch) {
    return backward(args, launch, true).status;
}

}  // namespace cuda
}  // namespace kron
