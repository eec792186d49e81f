#include "ffn_sm80_start.cuh"

template kron::cuda::Status kron::cuda::start_ffn_sm80<float>(const ffn::ForwardParams&, const FfnPlan&, const Launch&);
