// Which feed-forward blocks ffn_sm90 takes, and its launch.
#include "cuda/ffn/ffn_sm90.cuh"

#include "cuda/common/sm90_launch.h"
#include "cuda/common/tiny.h"

namespace kron {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kMostHidden = 32;

int blocks_of(int64_t outer) {
    return int((outer + 127) / 128);
}

// Sizes and places in shared memory; returns its bytes, with the least stages that will do at first.
int64_t lay_out(FfnSm90& p, const FfnArgs& args, int64_t shared_per_block) {
    p.hidden = int(args.first.m1), p.inner = int(args.first.n2), p.middle = int(args.first.m2);
    p.outer = int(args.second.m2);
    p.columns = columns_for(blocks_of(p.outer));
    const int64_t x = int64_t(slabs_of(p.inner)) * kSlabBytes;
    const int64_t bias = round_up(int64_t(steps_of(p.middle, p.columns)) * p.hidden * p.columns * 2, 128),
                  small_factors = round_up(p.hidden * 8, 128);
    const int64_t rest = x + bias + small_factors + int64_t(sizeof(FfnBarriers));
    const int64_t stage = stage_bytes(p.columns);
    int64_t stages = (shared_per_block - rest) / stage;
    // The first warpgroup goes through all of a step's stages before the second one gives any of them back.
    const int64_t least = blocks_of(p.outer) + slabs_of(p.inner) / 2;
    stages = stages < least ? least : stages > kMostStages ? kMostStages : stages;
    p.stages = int(stages);
    p.ring = int(x);
    p.bias = int(x + stages * stage);
    p.small_factors = int(p.bias + bias);
    p.barriers = int(p.small_factors + small_factors);
    return rest + stages * stage;
}

template <class T, Activation kAct>
Status run(const FfnSm90& p, const Launch& launch, int64_t shared_bytes) {
    const Grid grid{p.tiles < launch.multiprocessors ? p.tiles : launch.multiprocessors};
    const auto kernel = blocks_of(p.outer) == 1   ? ffn_sm90<T, kAct, 1>
                        : blocks_of(p.outer) == 2 ? ffn_sm90<T, kAct, 2>
                                                  : ffn_sm90<T, kAct, 3>;
    return start<FfnSm90>(kernel, grid, kThreads, shared_bytes, launch, p);
}
template <class T>
Status run(const FfnSm90& p, Activation activation, const Launch& launch, int64_t shared_bytes) {
    switch (activation) {
        case Activation::gelu:
            return run<T, Activation::gelu>(p, launch, shared_bytes);
        case Activation::gelu_tanh:
            return run<T, Activation::gelu_tanh>(p, launch, shared_bytes);
        case Activation::relu:
            return run<T, Activation::relu>(p, launch, shared_bytes);
        case Activation::silu:
            return run<T, Activation::silu>(p, launch, shared_bytes);
        case Activation::none:
            break;
    }
    return run<T, Activation::none>(p, launch, shared_bytes);
}

}  // namespace

const char* unsupported_kron_ffn(const FfnArgs& args, const Launch& launch) {
    const Shape &first = args.first, &second = args.second;
    if (launch.sm != 90) return "not a Hopper GPU";
    if (first.dtype != DType::bf16 && first.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
    if (first.terms != 1 || second.terms != 1) return "more than one term";
    if (first.n1 != 2 || second.m1 != 2) return "not two rows a token in and out";
    if (first.m1 != second.n1 || first.m2 != second.n2) return "the pairs do not chain";
    if (first.m1 > kMostHidden) return "more than 32 rows a token in the middle";
    if (first.n2 % 8 || first.m2 % 8 || second.m2 % 8) return "the large factors' sizes are not multiples of 8";
    if (second.m2 > 384) return "the second pair's large factor has more than 384 rows";
    if (first.tokens >= (int64_t(1) << 31) - kTokens) return "too many tokens";
    if (args.norm.residual_stride % 2) return "rows of the residual at addresses that are no multiples of 4";
    if (args.w2.base) return "a tensor to add to";
    if (args.w1.b.stride_col != 1 || args.w2.b.stride_col != 1) return "the large factors are not row-major";
    if (args.w1.b.stride_row % 8 || args.w2.b.stride_row % 8 || args.x_stride % 8)
        return "rows that begin at addresses that are no multiples of 16";
    const int64_t tiles = divide_up(first.tokens, kTokens);
    if (tiles && 2 * tiles < launch.multiprocessors) return "fewer tiles of tokens than half the multiprocessors";
    for (const void* p : {args.x, args.w1.b.data, args.w2.b.data, args.w1.bias, args.w2.bias, args.norm.residual,
                          args.norm.weight, args.norm.bias, static_cast<const void*>(args.w2.y)})
        if (!is_aligned(p)) return "a tensor at an address that is no multiple of 16";
    FfnSm90 p;
    if (first.n2 > 4096 || first.m2 > 65536 || lay_out(p, args, launch.shared_per_block) > launch.shared_per_block)
        return "the tiles do not fit into shared memory";
    return nullptr;
}

Status kron_ffn(const FfnArgs& args, const Launch& launch) {
    const Shape &first = args.first, &second = args.second;
    if (first.tokens == 0) return Status{0, ""};
    FfnSm90 p;
    const int64_t shared_bytes = lay_out(p, args, launch.shared_per_block);
    p.a1 = args.w1.a, p.a2 = args.w2.a;
    p.bias1 = args.w1.bias, p.bias2 = args.w2.bias;
    p.norm = args.norm, p.one_over_width = 1 / float(2 * second.m2);
    p.y = args.w2.y;
    p.tokens = int(first.tokens), p.tiles = int((first.tokens + kTokens - 1) / kTokens);
    const Tiles tiles[3] = {
        {args.x, 3, {first.n2, first.tokens, 2}, {1, args.x_stride, first.n2}, {kSlab, 8, 2}},
        {args.w1.b.data, 2, {first.n2, first.m2}, {1, args.w1.b.stride_row}, {kSlab, p.columns}},
        {args.w2.b.data, 2, {second.n2, second.m2}, {1, args.w2.b.stride_row}, {p.columns, 128}},
    };
    TensorMap* const maps[3] = {&p.x, &p.b1, &p.b2};
    for (int i = 0; i < 3; ++i) {
        const Status status = make_tensor_map(*maps[i], first.dtype, tiles[i]);
        if (status.code) return status;
    }
    return first.dtype == DType::bf16 ? run<Bf16>(p, args.activation, launch, shared_bytes)
                                      : run<F16>(p, args.activation, launch, shared_bytes);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
