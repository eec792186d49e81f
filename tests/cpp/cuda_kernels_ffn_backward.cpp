// The launches of the feed-forward block's backward as C++.
#include "cuda/ffn/ffn_backward.cu"
