// The feed-forward block's kernels and launchers as C++.
#include "cuda/ffn/ffn.cu"
#include "cuda/ffn/ffn_sm80_bf16.cu"
#include "cuda/ffn/ffn_sm80_f16.cu"
#include "cuda/ffn/ffn_sm80_f32.cu"
