#include "cuda/ffn/ffn_sm80_start.cuh"

using namespace kron::cuda;

template Status kron::cuda::start_ffn_sm80<float>(const ffn::ForwardParams&, const FfnPlan&, const Launch&);
template Status kron::cuda::start_ffn_backward_sm80<float>(const ffn::BackwardParams&, const FfnBackwardPlan&,
                                                           const Launch&);
