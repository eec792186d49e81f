// The kernels of the product and their launchers, for the emulated machine.
#include "../cuda/mm.cu"
#include "../cuda/mm_backward.cu"
#include "../cuda/mm_sm80_bf16.cu"
#include "../cuda/mm_sm80_f16.cu"
#include "../cuda/mm_sm80_f32.cu"
