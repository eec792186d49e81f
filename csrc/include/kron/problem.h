// The boundary between the torch binding and the kernels: raw pointers, sizes, strides. No torch, no Python below it.
//
// Notation (DESIGN: docs/design.md): for one token x read row-major as X (n1, n2),
//   Y (m1, m2) = sum_s A_s X B_s^T,  y = Y read row-major,  + bias, then the activation.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
namespace kron {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
// Bytes of an element.
inline int64_t size_of(DType dtype) {
    return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
enum class Activation : int32_t { none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4 };
// Ordered: a level includes the ones before it that the processor family has.
enum class Isa : int32_t { portable = 0, neon = 1, avx2 = 2, avx512 = 3, amx = 4 };

// IEEE half precision: C++ on AArch64 has had the name _Float16 only since GCC 13.
#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

struct Shape {
    int64_t tokens;          // T, rows of x
    int64_t terms;           // S
    int64_t m1, n1, m2, n2;  // A_s is (m1, n1), B_s is (m2, n2)
    DType dtype;             // of every tensor of the call
};

// A stack of S matrices; strides in elements. Any strides are allowed (so a transpose is free).
struct Factor {
    const void* data;
    int64_t stride_term, stride_row, stride_col;
};

// Runs task(arg, i) for i in [0, count), in any order, on at most `threads` threads. The caller supplies it so that
// the kernels share the framework's thread pool.
struct Executor {
    int threads;
    void (*run)(int64_t count, void (*task)(void* arg, int64_t index), void* arg);
};

// A layer norm of residual + y over each token's results. No residual: none.
struct NormArgs {
    const void* residual;  // (T, m1*m2), last dimension contiguous
    int64_t residual_stride;
    const void *weight, *bias;  // (m1*m2,) contiguous
    double eps;
};

// One pair of factors applied to x, and where the result goes.
struct Projection {
    Factor a, b;
    const void* bias;    // (m1*m2,) contiguous, or null
    const void* packed;  // what kron_pack made of a and b, or null: the plain factor is read
    int64_t packed_bytes;
    void* y;  // (T, m1*m2) contiguous
    // (T, m1*m2) contiguous, added before the activation in the bias's place, or null; y itself, or apart from it.
    const void* base = nullptr;
};

constexpr int64_t kMostProjections = 8;

// Products of one x with `count` pairs of factors, at most kMostProjections, all of one shape.
struct ForwardArgs {
    Shape shape;
    const void* x;  // (T, n1*n2), last dimension contiguous
    int64_t x_stride;
    int64_t count;
    const Projection* projections;
    Activation activation;
    NormArgs norm;
    double alpha = 1;  // of the products
};

// y = W2 activation(W1 x + bias1) + bias2, then the norm. The first pair's m1*m2 is the second's n1*n2.
struct FfnArgs {
    Shape first, second;  // of equal tokens and dtype
    const void* x;        // (T, n1*n2 of the first), last dimension contiguous
    int64_t x_stride;
    Projection w1, w2;  // y of w1 is not used
    Activation activation;
    NormArgs norm;
};

// Gradients of an FfnArgs without norm. An output that is null is not computed.
struct FfnBackwardArgs {
    Shape first, second;
    const void* grad;  // dL/dy (T, m1*m2 of the second), last dimension contiguous
    int64_t grad_stride;
    const void* x;
    int64_t x_stride;
    Factor a1, b1, a2, b2;
    const void* bias1;
    Activation activation;
    void *dx, *da1, *db1, *dbias1, *da2, *db2, *dbias2;  // contiguous
};

// A table of indices and the rows they choose, added to an embedding; weight null: none.
struct AddedRows {
    const int64_t* ids;  // (T,)
    const void* weight;  // (rows, p*k) contiguous
    int64_t rows;
};

// y[t] = sum_s A_s[ids[t]] (x) B_s + added rows, then the norm (whose residual is not used). ids are checked by the
// caller.
struct EmbeddingArgs {
    int64_t tokens, terms, rows, p, k;
    DType dtype;
    const int64_t* ids;
    Factor a, b;  // (S, rows, p), (S, 1, k)
    AddedRows added[2];
    const void *norm_weight, *norm_bias;  // (p*k,) contiguous, or both null
    double eps;
    void* y;  // (T, p*k) contiguous
};

// Gradients of y = (sum_s A_s (x) B_s) x + bias. An output that is null is not computed.
struct BackwardArgs {
    Shape shape;
    const void* grad;  // dL/dy (T, m1*m2), last dimension contiguous
    int64_t grad_stride;
    const void* x;  // (T, n1*n2), last dimension contiguous
    int64_t x_stride;
    Factor a, b;
    void* dx;     // (T, n1*n2) contiguous
    void* da;     // (S, m1, n1) contiguous
    void* db;     // (S, m2, n2) contiguous
    void* dbias;  // (m1*m2,) contiguous
};

// Highest level this processor and operating system can run, and the level in use: that one, unless capped by
// set_isa_cap or, at first use, by the environment variable KRON_KERNELS_CPU_ISA.
Isa detected_isa();
Isa active_isa();
void set_isa_cap(Isa cap);
const char* isa_name(Isa isa);

// True when the level was compiled into this binary: on AArch64 portable and neon, on x86-64 all but neon.
bool isa_compiled(Isa isa);

// Shapes and pointers must already be checked by the caller. Throws std::bad_alloc when scratch cannot be had.
void kron_matmul_forward(const ForwardArgs& args, const Executor& executor);
void kron_matmul_backward(const BackwardArgs& args, const Executor& executor);
void kron_ffn_forward(const FfnArgs& args, const Executor& executor);
void kron_ffn_backward(const FfnBackwardArgs& args, const Executor& executor);
void kron_embedding(const EmbeddingArgs& args, const Executor& executor);

// Whether the block runs as one kernel, given packed factors or plain ones; otherwise as two products.
bool kron_ffn_is_fused(const Shape& first, const Shape& second, bool packed = false);

// The factor of the GEMM, usually the larger one, in the layout of the level in use, behind a head that says what it
// was made of. `out` holds kron_packed_bytes(shape), aligned to 64 bytes. A call that is given these bytes reads
// neither the data nor the strides of that plain factor, which may have been freed; the other factor stays plain. A
// call throws std::invalid_argument where the bytes are of another shape, dtype, layout (level) or size, or not
// aligned.
int64_t kron_packed_bytes(const Shape& shape);
void kron_pack(const Shape& shape, const Factor& a, const Factor& b, void* out, const Executor& executor);
// Whether the factor that kron_pack's bytes hold is a; otherwise it is b.
bool kron_packs_a(const void* packed);

// Bytes of scratch that the last call on this thread used, all worker threads together (introspection and tests).
int64_t last_scratch_bytes();

}  // namespace kron
#pragma GCC visibility pop
