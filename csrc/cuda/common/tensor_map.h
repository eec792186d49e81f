// Describes a tensor in device memory to TMA. On the host.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/common/sm90.h"

namespace kron {
namespace cuda {

// Sizes of the tensor and of the box that a load brings, in elements of 16 bits, innermost first; strides of all
// dimensions but the innermost, whose is 1, in elements: multiples of 8. The box is 64 or 32
// elements wide, and its rows arrive swizzled as wgmma takes them.
struct Tiles {
    const void* data;  // a multiple of 16
    int rank;          // 2 or 3
    int64_t size[3];
    int64_t stride[3];
    int box[3];
};

#ifdef __CUDACC__

// Through the runtime: nothing links with the driver, which a machine without a GPU does not have.
inline Status make_tensor_map(TensorMap& map, DType dtype, const Tiles& tiles) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return status_of(error);
    if (found != cudaDriverEntryPointSuccess) return status_of(cudaErrorInsufficientDriver);
    cuuint64_t size[3], stride[2];
    cuuint32_t box[3], step[3];
    for (int i = 0; i < tiles.rank; ++i) {
        size[i] = cuuint64_t(tiles.size[i]), box[i] = cuuint32_t(tiles.box[i]), step[i] = 1;
        if (i > 0) stride[i - 1] = cuuint64_t(tiles.stride[i]) * 2;
    }
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
        &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        cuuint32_t(tiles.rank), const_cast<void*>(tiles.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        tiles.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return Status{int(cudaErrorInvalidValue), "cuTensorMapEncodeTiled does not take a tensor"};
    return Status{0, ""};
}

#else

inline Status make_tensor_map(TensorMap& map, DType, const Tiles& tiles) {
    return emulator::make_tensor_map(map, tiles.data, tiles.rank, tiles.size, tiles.stride, tiles.box);
}

#endif

}  // namespace cuda
}  // namespace kron
