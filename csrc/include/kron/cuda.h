// The CUDA kernels: what problem.h has for the processor, on pointers to device memory and a stream. No torch.
//
// Of every operation there are three functions. `unsupported_` says why the kernels do not take the problem, as a
// static text, or gives null; it reads shapes, strides and the alignment of pointers, never memory. `workspace_` is how
// many bytes of device memory the call needs in launch.workspace, aligned to 256. The operation itself launches kernels
// on launch.stream and does not wait for them; it must only be called with what `unsupported_` let through.
#pragma once

#include "kron/problem.h"

#pragma GCC visibility push(default)
namespace kron {
namespace cuda {

struct Launch {
    void* stream;              // a cudaStream_t
    int sm;                    // compute capability of the device: 80, 90, ...
    int multiprocessors;       // of the device
    int64_t shared_per_block;  // most bytes of shared memory of a block (cudaDevAttrMaxSharedMemoryPerBlockOptin)
    bool tf32;                 // whether products of float32 may be rounded to TF32; without it they are not supported
    void* workspace;
    int64_t workspace_bytes;
};

// A cudaError_t and its text; 0 is success.
struct Status {
    int code;
    const char* what;
};

// Several projections of one x in one launch (kron_qkv), base and alpha (kron_addmm) included.
const char* unsupported_kron_matmul(const ForwardArgs& args, const Launch& launch);
int64_t workspace_kron_matmul(const ForwardArgs& args, const Launch& launch);
Status kron_matmul(const ForwardArgs& args, const Launch& launch);

const char* unsupported_kron_matmul_backward(const BackwardArgs& args, const Launch& launch);
int64_t workspace_kron_matmul_backward(const BackwardArgs& args, const Launch& launch);
Status kron_matmul_backward(const BackwardArgs& args, const Launch& launch);

const char* unsupported_kron_ffn(const FfnArgs& args, const Launch& launch);
int64_t workspace_kron_ffn(const FfnArgs& args, const Launch& launch);
Status kron_ffn(const FfnArgs& args, const Launch& launch);

const char* unsupported_kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch);
int64_t workspace_kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch);
Status kron_ffn_backward(const FfnBackwardArgs& args, const Launch& launch);

const char* unsupported_kron_embedding(const EmbeddingArgs& args, const Launch& launch);
int64_t workspace_kron_embedding(const EmbeddingArgs& args, const Launch& launch);
Status kron_embedding(const EmbeddingArgs& args, const Launch& launch);

// Gradients of the embedding's product, before norm and added rows: a row of A's for each token, for the caller to add
// up by ids, and B's.
struct EmbeddingBackwardArgs {
    int64_t tokens, terms, rows, p, k;
    DType dtype;
    const void* grad;  // (T, p*k), last dimension contiguous
    int64_t grad_stride;
    const int64_t* ids;
    Factor a, b;  // (S, rows, p), (S, 1, k)
    void* da;     // (T, S, p) contiguous
    void* db;     // (S, 1, k) contiguous
};
const char* unsupported_kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch& launch);
int64_t workspace_kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch& launch);
Status kron_embedding_backward(const EmbeddingBackwardArgs& args, const Launch& launch);

}  // namespace cuda
}  // namespace kron
#pragma GCC visibility pop
