// Which products matmul_sm90 takes, and its launch.
#include "cuda/matmul/matmul_sm90.cuh"

#include "cuda/common/sm90_launch.h"
#include "cuda/common/tiny.h"

namespace kron {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kMostInner = 384;

// Sizes and places in shared memory; returns its bytes, with the least stages that will do at least.
int64_t lay_out(MmSm90& p, const ForwardArgs& args, const TinyShape& tiny, int64_t shared_per_block) {
    p.count = int(args.count), p.tokens = int(args.shape.tokens), p.tiles = int(divide_up(args.shape.tokens, kTokens));
    p.co = int(tiny.co), p.ci = int(tiny.ci), p.lo = int(tiny.lo), p.li = int(tiny.li);
    p.width = p.ci * p.li;
    const int64_t x = divide_up(p.width, kSlab) * kMmSlabBytes;
    const int64_t small_factors = int64_t(p.count) * kMostTiny * int64_t(sizeof(Words2));
    const int64_t rest = x + small_factors + int64_t(sizeof(RingBarriers));
    // The first warpgroup goes through all stages of a block of columns before the second one gives any of them back.
    const int64_t least = divide_up(p.li, kSlab) + 1;
    int64_t stages = (shared_per_block - rest) / kMmStageBytes;
    stages = stages < least ? least : stages > kMostStages ? kMostStages : stages;
    p.stages = int(stages);
    p.ring = int(x);
    p.small_factors = int(x + stages * kMmStageBytes);
    p.barriers = int(p.small_factors + small_factors);
    return rest + stages * kMmStageBytes;
}

bool contracts(const TinyShape& tiny) {
    return tiny.ci > 2;
}

template <class T, class Form, Activation kAct>
Status run(const MmSm90& p, const Launch& launch, int64_t shared_bytes) {
    const Grid grid{p.tiles < launch.multiprocessors ? p.tiles : launch.multiprocessors};
    const auto kernel = p.li <= 64 ? matmul_sm90<T, Form, kAct, 4> : matmul_sm90<T, Form, kAct, kMostInner / 16>;
    return start<MmSm90>(kernel, grid, kThreads, shared_bytes, launch, p);
}
template <class T>
Status run(const MmSm90& p, const TinyShape& tiny, Activation activation, const Launch& launch, int64_t shared_bytes) {
    if (tiny.right)
        return contracts(tiny) ? run<T, Form<true, true>, Activation::none>(p, launch, shared_bytes)
                               : run<T, Form<true, false>, Activation::none>(p, launch, shared_bytes);
    if (contracts(tiny)) return run<T, Form<false, true>, Activation::none>(p, launch, shared_bytes);
    return activation == Activation::gelu ? run<T, Form<false, false>, Activation::gelu>(p, launch, shared_bytes)
                                          : run<T, Form<false, false>, Activation::none>(p, launch, shared_bytes);
}

const Factor& large_of(const Projection& one, const TinyShape& tiny) {
    return tiny.right ? one.a : one.b;
}

}  // namespace

const char* unsupported_kron_matmul(const ForwardArgs& args, const Launch& launch) {
    const Shape& s = args.shape;
    TinyShape tiny{};
    if (launch.sm != 90) return "not a Hopper GPU";
    if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
    if (s.terms != 1) return "more than one term";
    if (!tiny_shape(s, tiny)) return "no factor is tiny (at most 16 x 16)";
    if (tiny.ci != 2 && tiny.co != 2) return "not two rows a token on either side";
    if (tiny.ci % 2) return "an odd number of rows a token";
    if (tiny.right && tiny.co % 8 && tiny.co != 2 && tiny.co != 4)
        return "the right factor has a number of rows other than 2, 4, 8 or 16";
    if (tiny.li > kMostInner) return "the large factor has more than 384 columns";
    if (tiny.li % 8 || tiny.lo % 8) return "the large factor's sizes are not multiples of 8";
    if (tiny.lo > (1 << 20) || s.tokens >= (int64_t(1) << 31) - kTokens) return "too many tokens or rows";
    const int64_t tiles = divide_up(s.tokens, kTokens);
    if (tiles && 2 * tiles < launch.multiprocessors) return "fewer tiles of tokens than half the multiprocessors";
    if (args.count > kMostProducts) return "more than 4 products of one x";
    if (args.norm.weight || args.norm.residual) return "a layer norm";
    const bool gelu = args.activation == Activation::gelu && !tiny.right && !contracts(tiny);
    if (args.activation != Activation::none && !gelu)
        return "an activation, except GELU after an expanding left factor";
    if (args.x_stride % 8) return "rows that begin at addresses that are no multiples of 16";
    if (!is_aligned(args.x)) return "a tensor at an address that is no multiple of 16";
    for (int64_t i = 0; i < args.count; ++i) {
        const Projection& one = args.projections[i];
        const Factor& large = large_of(one, tiny);
        if (one.base) return "a tensor to add to";
        if (large.stride_col != 1) return "the large factor is not row-major";
        if (large.stride_row % 8) return "rows that begin at addresses that are no multiples of 16";
        for (const void* p : {large.data, one.bias, static_cast<const void*>(one.y)})
            if (!is_aligned(p)) return "a tensor at an address that is no multiple of 16";
    }
    MmSm90 p;
    if (lay_out(p, args, tiny, launch.shared_per_block) > launch.shared_per_block)
        return "the tiles do not fit into shared memory";
    return nullptr;
}

Status kron_matmul(const ForwardArgs& args, const Launch& launch) {
    const Shape& s = args.shape;
    if (s.tokens == 0 || args.count == 0) return Status{0, ""};
    TinyShape tiny{};
    tiny_shape(s, tiny);
    MmSm90 p;
    const int64_t shared_bytes = lay_out(p, args, tiny, launch.shared_per_block);
    p.alpha = float(args.alpha);
    Status status =
        make_tensor_map(p.x, s.dtype, {args.x, 2, {p.width, s.tokens}, {1, args.x_stride}, {kSlab, kTokens}});
    for (int i = 0; i < p.count && !status.code; ++i) {
        const Projection& one = args.projections[i];
        const Factor& large = large_of(one, tiny);
        MmProduct& product = p.products[i];
        product.tiny = tiny.right ? one.b : one.a;
        product.bias = one.bias, product.y = one.y;
        status = make_tensor_map(product.large, s.dtype,
                                 {large.data, 2, {tiny.li, tiny.lo}, {1, large.stride_row}, {kSlab, 128}});
    }
    if (status.code) return status;
    return s.dtype == DType::bf16 ? run<Bf16>(p, tiny, args.activation, launch, shared_bytes)
                                  : run<F16>(p, tiny, args.activation, launch, shared_bytes);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace kron
