#include "mm_sm80_start.cuh"

template kron::cuda::Status kron::cuda::start_mm_sm80<kron::cuda::device::F16>(const MmPlan&, const Launch&);
