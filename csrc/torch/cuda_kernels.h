// The CUDA kernels as the ops call them: on the device and current stream of a tensor,
// with memory from torch.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "embedding.h"
#include "kron/cuda.h"
#include "kron/cuda_device.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

inline std::string factor_text(int64_t m, int64_t n) {
    return text(m) + "x" + text(n);
}

inline std::string problem_text(const kron::Shape& s) {
    return text(s.tokens) + " tokens, " + text(s.terms) + " terms of " + factor_text(s.m1, s.n1) + " (x) " +
           factor_text(s.m2, s.n2);
}

inline std::string problem_text(const kron::ForwardArgs& args) {
    return problem_text(args.shape) + (args.count > 1 ? ", " + text(args.count) + " projections" : "");
}
inline std::string problem_text(const kron::BackwardArgs& args) {
    return problem_text(args.shape);
}
inline std::string problem_text(const kron::FfnArgs& args) {
    return problem_text(args.first) + ", then " + problem_text(args.second);
}
inline std::string problem_text(const kron::FfnBackwardArgs& args) {
    return problem_text(args.first) + ", then " + problem_text(args.second);
}
template <class Args>
std::string embedding_text(const Args& args) {
    return text(args.tokens) + " tokens, " + text(args.terms) + " terms of " + factor_text(args.rows, args.p) +
           " (x) " + factor_text(1, args.k);
}
inline std::string problem_text(const kron::EmbeddingArgs& args) {
    return embedding_text(args);
}
inline std::string problem_text(const kron::cuda::EmbeddingBackwardArgs& args) {
    return embedding_text(args);
}

// libtorch_cuda has it, which CPU builds of torch lack: looked up in the process, so that one binary serves both.
inline void* current_stream(int32_t device) {
    using Lookup = AOTITorchError (*)(int32_t, void**);
    static const Lookup lookup = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
        return reinterpret_cast<Lookup>(symbol);
    }();
    if (!lookup) throw std::runtime_error("kron_kernels: this torch has no CUDA streams: libtorch_cuda is not loaded");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
    return stream;
}

class CudaKernels {
  public:
    // Of calls whose tensors are on the device of x. Until the end of the call that device is the current one.
    CudaKernels(const Tensor& x, bool tf32) : x_(x) {
        const int32_t device = device_index(x);
        kron::cuda::DeviceInfo info{};
        if (const char* reason = kron::cuda::unsupported_device(device, &info))
            throw std::runtime_error(std::string("kron_kernels: backend 'cuda': ") + reason);
        launch_ = {nullptr, info.sm, info.multiprocessors, info.shared_per_block, tf32, nullptr, 0};
        if (x.is_cpu()) return;  // the emulator's tensors
        launch_.stream = current_stream(device);
        if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard_.emplace(device);
    }

#define KRON_OPERATION(name, Args)                                                                       \
    void name(const Args& args) const {                                                                  \
        run("kron_" #name, args, kron::cuda::unsupported_kron_##name, kron::cuda::workspace_kron_##name, \
            kron::cuda::kron_##name);                                                                    \
    }
    KRON_OPERATION(matmul, kron::ForwardArgs)
    KRON_OPERATION(matmul_backward, kron::BackwardArgs)
    KRON_OPERATION(ffn, kron::FfnArgs)
    KRON_OPERATION(ffn_backward, kron::FfnBackwardArgs)
    KRON_OPERATION(embedding, kron::EmbeddingArgs)
    KRON_OPERATION(embedding_backward, kron::cuda::EmbeddingBackwardArgs)
#undef KRON_OPERATION

    struct Indices {
        Tensor tensor;
        const int64_t* data() const { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
    };
    // Whether they are rows of their table, the kernels see.
    Indices indices(const char* argument, const Tensor& ids, const std::vector<int64_t>& sizes, int64_t,
                    const Tensor& a) const {
        check_device(argument, ids, a);
        const std::vector<int64_t> strides = index_strides(argument, ids, sizes);
        AtenTensorHandle handle;
        TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(ids.get(), static_cast<int64_t>(sizes.size()),
                                                              sizes.data(), strides.data(), 0, &handle));
        const Tensor broadcast(handle);
        return {torch::stable::contiguous(torch::stable::to(broadcast, ScalarType::Long))};
    }

  private:
    template <class Args>
    void run(const char* name, const Args& args, const char* (*unsupported)(const Args&, const kron::cuda::Launch&),
             int64_t (*workspace)(const Args&, const kron::cuda::Launch&),
             kron::cuda::Status (*operation)(const Args&, const kron::cuda::Launch&)) const {
        const auto what = [&] {
            return std::string("kron_kernels: backend 'cuda': ") + name + " of " + problem_text(args);
        };
        kron::cuda::Launch launch = launch_;
        if (const char* reason = unsupported(args, launch)) throw std::runtime_error(what() + ": " + reason);
        launch.workspace_bytes = workspace(args, launch);
        std::optional<Tensor> memory;  // freed for what the stream does next
        if (launch.workspace_bytes > 0) {
            memory = empty_of(1, &launch.workspace_bytes, aoti_torch_dtype_uint8(), x_);
            launch.workspace = memory->mutable_data_ptr();
        }
        const kron::cuda::Status status = operation(args, launch);
        if (status.code != 0)
            throw std::runtime_error(what() + ": the launch failed with CUDA error " + text(status.code) + ", " +
                                     status.what);
    }

    const Tensor& x_;
    kron::cuda::Launch launch_;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace kron_torch
