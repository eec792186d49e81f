#include "ffn_sm80_start.cuh"

template kron::cuda::Status kron::cuda::start_ffn_sm80<kron::cuda::device::Bf16>(const ffn::ForwardParams&,
                                                                                 const FfnPlan&, const Launch&);
