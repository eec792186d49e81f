// The kernels of the product and their launchers, for the emulated machine.
#include "cuda/matmul/matmul.cu"
#include "cuda/matmul/matmul_backward.cu"
#include "cuda/matmul/matmul_sm80_bf16.cu"
#include "cuda/matmul/matmul_sm80_f16.cu"
#include "cuda/matmul/matmul_sm80_f32.cu"
