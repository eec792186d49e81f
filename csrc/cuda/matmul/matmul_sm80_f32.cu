#include "cuda/matmul/matmul_large_grad_start.cuh"
#include "cuda/matmul/matmul_sm80_start.cuh"

template kron::cuda::Status kron::cuda::start_matmul_sm80<float>(const MmPlan&, const Launch&);
template kron::cuda::Status kron::cuda::start_large_grad<float>(const LargeGradPlan&, const Launch&);
