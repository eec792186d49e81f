// The feed-forward block's kernels and launchers as C++.
#include "../cuda/ffn.cu"
#include "../cuda/ffn_sm80_bf16.cu"
#include "../cuda/ffn_sm80_f16.cu"
#include "../cuda/ffn_sm80_f32.cu"
