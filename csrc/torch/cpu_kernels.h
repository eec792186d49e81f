// The kernels of the CPU, on torch's threads, as the ops call them.
#pragma once

#include <stdexcept>
#include <vector>

#include "embedding.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

struct Tasks {
    void (*task)(void* arg, int64_t index);
    void* arg;
};

inline void run_range(int64_t begin, int64_t end, void* context) {
    const Tasks& tasks = *static_cast<const Tasks*>(context);
    for (int64_t i = begin; i < end; ++i) tasks.task(tasks.arg, i);
}

inline void run_on_torch_threads(int64_t count, void (*task)(void*, int64_t), void* arg) {
    if (count == 1) return task(arg, 0);
    Tasks tasks{task, arg};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, run_range, &tasks));
}

inline kron::Executor torch_executor() {
    return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_threads};
}

// Indices broadcast to `sizes`, each in [0, rows).
inline std::vector<int64_t> checked_indices(const char* argument, const Tensor& ids, const std::vector<int64_t>& sizes,
                                            int64_t rows) {
    const std::vector<int64_t> strides = index_strides(argument, ids, sizes);
    const bool wide = ids.scalar_type() == ScalarType::Long;
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    std::vector<int64_t> result(static_cast<size_t>(count)), position(sizes.size(), 0);
    int64_t offset = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t id = wide ? static_cast<const int64_t*>(ids.const_data_ptr())[offset]
                                : static_cast<const int32_t*>(ids.const_data_ptr())[offset];
        if (id < 0 || id >= rows)
            throw std::out_of_range(std::string(argument) + ": expected indices in [0, " + text(rows) + "), got " +
                                    text(id));
        result[static_cast<size_t>(i)] = id;
        for (size_t d = sizes.size(); d-- > 0;) {
            offset += strides[d];
            if (++position[d] < sizes[d]) break;
            offset -= strides[d] * sizes[d];
            position[d] = 0;
        }
    }
    return result;
}

struct CpuKernels {
    void matmul(const kron::ForwardArgs& args) const { kron::kron_matmul_forward(args, torch_executor()); }
    void matmul_backward(const kron::BackwardArgs& args) const { kron::kron_matmul_backward(args, torch_executor()); }
    void ffn(const kron::FfnArgs& args) const { kron::kron_ffn_forward(args, torch_executor()); }
    void ffn_backward(const kron::FfnBackwardArgs& args) const { kron::kron_ffn_backward(args, torch_executor()); }
    void embedding(const kron::EmbeddingArgs& args) const { kron::kron_embedding(args, torch_executor()); }
    std::vector<int64_t> indices(const char* argument, const Tensor& ids, const std::vector<int64_t>& sizes,
                                 int64_t rows, const Tensor&) const {
        return checked_indices(argument, ids, sizes, rows);
    }
};

}  // namespace kron_torch
