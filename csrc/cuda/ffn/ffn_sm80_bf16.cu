#include "cuda/ffn/ffn_sm80_start.cuh"

using namespace kron::cuda;

template Status kron::cuda::start_ffn_sm80<device::Bf16>(const ffn::ForwardParams&, const FfnPlan&, const Launch&);
template Status kron::cuda::start_ffn_backward_sm80<device::Bf16>(const ffn::BackwardParams&, const FfnBackwardPlan&,
                                                                  const Launch&);
