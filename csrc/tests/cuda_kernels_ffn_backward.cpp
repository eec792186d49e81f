// The launches of the feed-forward block's backward as C++.
#include "../cuda/ffn_backward.cu"
