// Launches of the embedding's kernels. Also compiled as plain C++, for the emulator.
#include "cuda/embedding/embedding.cuh"

#include <algorithm>

#include "cuda/common/launch.h"

namespace kron {
namespace cuda {
namespace {

// A block without asking for more.
constexpr int64_t kSharedFloats = 48 * 1024 / 4;

int64_t of_b(int64_t terms, int64_t k) {
    return terms * k;
}

bool aligned(const void* data) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Whether every row that is read or written as such starts on 16 bytes.
bool has_aligned_rows(const EmbeddingArgs& args) {
    return args.p * args.k * size_of(args.dtype) % 16 == 0 && aligned(args.y) && aligned(args.added[0].weight) &&
           aligned(args.added[1].weight) && aligned(args.norm_weight) && aligned(args.norm_bias);
}

template <class T>
Status forward(const EmbeddingArgs& args, const Launch& launch) {
    const int64_t size = args.p * args.k, free = kSharedFloats - of_b(args.terms, args.k);
    EmbeddingParams params{args, int(std::min<int64_t>(kEmbeddingWarps, free / size)), size};
    const int64_t blocks = (args.tokens + params.warps - 1) / params.warps;
    // Some sixteen rounds of blocks, each of which loads b again.
    const Grid grid{std::min<int64_t>(blocks, int64_t(launch.multiprocessors) * 16)};
    const int64_t shared = (of_b(args.terms, args.k) + params.warps * size) * 4;
    constexpr int kVector = 16 / sizeof(T);
    const auto kernel = has_aligned_rows(args) ? embedding_forward<T, kVector> : embedding_forward<T, 1>;
    return start(kernel, grid, kEmbeddingThreads, shared, launch, params);
}

// Blocks of the backward's first stage: fixed by the problem and the device, so that results are too.
int64_t backward_blocks(const EmbeddingBackwardArgs& args, const Launch& launch) {
    constexpr int64_t kLeastTokens = 8;
    const int64_t most = int64_t(launch.multiprocessors) * 2;
    return std::max<int64_t>(1, std::min(most, (args.tokens + kLeastTokens - 1) / kLeastTokens));
}

int64_t backward_floats(const EmbeddingBackwardArgs& args, int64_t groups) {
    return of_b(args.terms, args.k) * (1 + groups) + args.p * args.k + args.terms * args.p;
}

template <class T>
Status backward(const EmbeddingBackwardArgs& args, const Launch& launch) {
    const int64_t size = of_b(args.terms, args.k);
    int64_t groups = std::max<int64_t>(1, std::min<int64_t>(args.p, kEmbeddingThreads / size));
    while (groups > 1 && backward_floats(args, groups) > kSharedFloats) groups /= 2;
    const int64_t wanted = backward_blocks(args, launch);
    const int64_t tokens_a_block = (args.tokens + wanted - 1) / wanted;
    const int64_t blocks = args.tokens == 0 ? 0 : (args.tokens + tokens_a_block - 1) / tokens_a_block;
    float* partial = static_cast<float*>(launch.workspace);
    const EmbeddingBackwardParams params{args, tokens_a_block, int(groups), partial};
    if (blocks > 0) {
        const Status status = start(embedding_backward<T>, Grid{blocks}, kEmbeddingThreads,
                                    backward_floats(args, groups) * 4, launch, params);
        if (status.code != 0) return status;
    }
    const EmbeddingSumParams sum{partial, blocks, int(size), args.db};
    return start(embedding_sum<T>, Grid{(size + 31) / 32}, 32, 0, launch, sum);
}

template <class F>
Status by_dtype(DType dtype, F call) {
    if (dtype == DType::f32) return call(float{});
    return dtype == DType::bf16 ? call(device::Bf16{}) : call(device::F16{});
}

}  // namespace

const char* unsupported_kron_embedding(const EmbeddingArgs& args, const Launch&) {
    if (args.dtype == DType::f64) return "float64 is not a type of these kernels";
    if (args.p * args.k > kSharedFloats || of_b(args.terms, args.k) + args.p * args.k > kSharedFloats)
        return "a row of the table, p * k values, and the S * k values of b are more than 12288";
    return nullptr;
}

int64_t workspace_kron_embedding(const EmbeddingArgs&, const Launch&) {
    return 0;
}

Status kron_embedding(const EmbeddingArgs& args, const Launch& launch) {
    if (args.tokens == 0) return Status{0, ""};
    return by_dtype(args.dtype, [&](auto type) { return forward<decltype(type)>(args, launch); });
}

const char* unsupported_kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch&) {
    if (args.dtype == DType::f64) return "float64 is not a type of these kernels";
    if (backward_floats(args, 1) > kSharedFloats)
        return "p * k + S * (p + 2 * k), what a block keeps of a token and of b, is more than 12288";
    return nullptr;
}

int64_t workspace_kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch& launch) {
    return backward_blocks(args, launch) * of_b(args.terms, args.k) * 4;
}

Status kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch& launch) {
    return by_dtype(args.dtype, [&](auto type) { return backward<decltype(type)>(args, launch); });
}

}  // namespace cuda
}  // namespace kron
