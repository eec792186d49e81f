#include "cuda/matmul/matmul_large_grad_start.cuh"
#include "cuda/matmul/matmul_sm80_start.cuh"

template kron::cuda::Status kron::cuda::start_matmul_sm80<kron::cuda::device::Bf16>(const MmPlan&, const Launch&);
template kron::cuda::Status kron::cuda::start_large_grad<kron::cuda::device::Bf16>(const LargeGradPlan&, const Launch&);
