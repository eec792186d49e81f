// How one product is carried out: a pure function of the shape, the vector width and the thread count. No pointers, no
// instruction set: it can be tested and printed by itself.
#pragma once

#include "kron/problem.h"

namespace kron {

// Every product runs in one of two layouts and two orders.
//   natural: vectors lie along the columns of X and Y (n2, m2), as in memory.
//   commuted: A (x) B = P (B (x) A) Q with P, Q transposing each token's matrix; the kernels then see X^T (n2, n1),
//   with
//     B in A's place and A in B's. For a tiny B the vectors lie along n1 and m1 this way, and the transposes are a few
//     shuffles folded into loading x and storing y.
// m1, n1, m2, n2 below are those of the oriented problem: `left` (m1, n1) contracts a token's rows, `right` (m2, n2) is
// the factor of the GEMM over all rows.
struct Plan {
    bool commuted;
    // right_first: Z = X right^T (GEMM over tokens*n1 rows), then Y[t] = left Z[t].
    // otherwise:   U[t] = left X[t], then Y = U right^T (GEMM over tokens*m1 rows).
    bool right_first;
    int64_t tokens, terms, m1, n1, m2, n2;
    int panel_vectors;    // vectors of the right factor's outputs that are computed together
    int64_t panels;       // ceil(m2 / (panel_vectors * lanes))
    int64_t tile_tokens;  // tokens whose intermediate stays in cache at a time
    int64_t token_tiles;
    int64_t panel_groups;  // few tokens: the panels, not the tokens, are shared out among the threads
    bool packed;           // right factor copied into panels; otherwise read in place by dot products
    bool pack_in_task;     // each task packs its panels as it uses them; otherwise all are packed before
    bool serial;           // too little work to share out
    double multiply_adds;  // a token, of the chosen order
};

// Vectors of a panel of a right factor with `outputs` outputs.
int panel_vectors(int64_t outputs, int lanes);

// Elements of a right factor that one thread packs before another would have started.
constexpr int64_t kSerialPack = 32768;

struct Machine {
    int lanes;          // elements of the compute type in a vector
    int max_rows;       // rows of the widest register tile
    int64_t row_block;  // rows that the GEMM computes in one go, whatever their number
    int panel_vectors;  // fixed by the kernel, or 0: free to choose
    int threads;
    bool can_dot;  // the right factors' rows are contiguous in memory (natural, commuted)
    bool can_dot_commuted;
    int64_t projections;  // products of one x
    bool prepacked;       // the caller has panels of right factors, as plan_forward orients each product by itself
};

Plan plan_forward(const Shape& shape, const Machine& machine);

// Two products with an activation between, the intermediate (m1, m2) a token never whole in memory. Oriented as above:
//   Z = X right1^T,  H = act(left1 Z + bias1),  M = left2 H,  Y = M right2^T + bias2
// with left1 (m1, n1), right1 (m2, n2), left2 (p1, m1), right2 (p2, m2). Panel by panel of right1, H lives in
// registers.
struct FfnPlan {
    bool fused;  // the factors chain, and this order costs little more than the best of each product by itself
    bool commuted;
    int64_t tokens, terms1, terms2, n1, n2, m1, m2, p1, p2;
    int64_t tile_tokens, token_tiles;
    // Few tokens: the threads share out the panels of right1, then, after a barrier, those of right2. 1: they share out
    // the tokens, and a tile goes all the way.
    int64_t panel_groups;
    bool serial;
};

// Prepacked panels decide the orientation; where the two products' differ, the block is not fused.
FfnPlan plan_ffn(const Shape& first, const Shape& second, const Machine& machine);

struct BackwardPlan {
    bool commuted;
    // via_left: V[t] = left^T G[t]; dX = V right, dRight = V^T X, dLeft = sum G (X right^T)^T.
    // otherwise: H = G right; dX[t] = left^T H[t], dLeft = sum H X^T, dRight = G^T (left X).
    bool via_left;
    int64_t tokens, terms, m1, n1, m2, n2;
    int64_t tile_tokens;
    // dRight is summed in this many blocks of right_block outputs (via_left) or inputs (otherwise) of the right factor.
    // One block: in the same pass over the tokens as everything else.
    int64_t right_blocks, right_block;
    int64_t chunks;  // contiguous token ranges, each with partial sums of its own, added in order
    double multiply_adds;
};

BackwardPlan plan_backward(const Shape& shape, const Machine& machine);

}  // namespace kron
