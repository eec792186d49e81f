// What the driver reports of a device, and whether the kernels run on it. Plain C++: no kernel is here.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "kron/cuda_device.h"

namespace kron {
namespace cuda {
namespace {

thread_local std::string answer;

const char* answer_with(std::string text) {
    answer = std::move(text);
    return answer.c_str();
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why the driver cannot be used, from its first error.
std::string driver_problem(cudaError_t error) {
    if (error == cudaErrorNoDevice) return "no CUDA device is there";
    if (error != cudaErrorInsufficientDriver) return std::string("the CUDA driver fails: ") + cudaGetErrorString(error);
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return "no NVIDIA driver is installed";
    return "the NVIDIA driver is too old: it serves CUDA " + version_text(driver) +
           ", the kernels were built with CUDA " + version_text(runtime);
}

cudaError_t read_info(int device, DeviceInfo* info) {
    int major = 0, minor = 0, shared = 0;
    const std::pair<cudaDeviceAttr, int*> wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &major},
        {cudaDevAttrComputeCapabilityMinor, &minor},
        {cudaDevAttrMultiProcessorCount, &info->multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared},
    };
    for (const auto& [attribute, value] : wanted) {
        const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
        if (error != cudaSuccess) return error;
    }
    info->sm = 10 * major + minor;
    info->shared_per_block = shared;
    return cudaSuccess;
}

// Needed by every call of an op; the driver is queried once a device.
constexpr int kKeptDevices = 64;
DeviceInfo kept[kKeptDevices];
std::atomic<bool> is_kept[kKeptDevices];
std::mutex keeping;

}  // namespace

const char* built_architectures() {
    return KRON_CUDA_ARCHS;
}

bool runs_on(const char* architectures, int sm) {
    for (const char* item = architectures; *item;) {
        char* rest;
        const long number = std::strtol(item, &rest, 10);
        const char* end = std::strchr(rest, ' ');
        if (!end) end = rest + std::strlen(rest);
        const bool ptx = std::string_view(rest, size_t(end - rest)).find("PTX") != std::string_view::npos;
        // Machine code serves later minor versions of its major one, PTX all later ones.
        if (sm >= number && (ptx || sm / 10 == number / 10)) return true;
        item = *end ? end + 1 : end;
    }
    return false;
}

int device_count(const char** reason) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return count;
    *reason = answer_with(driver_problem(error == cudaSuccess ? cudaErrorNoDevice : error));
    return -1;
}

const char* unsupported_device(int device, DeviceInfo* info) {
    const bool keeps = device >= 0 && device < kKeptDevices;
    if (keeps && is_kept[device].load(std::memory_order_acquire)) {
        *info = kept[device];
        return nullptr;
    }
    const char* reason = nullptr;
    const int count = device_count(&reason);
    if (reason) return reason;
    if (device < 0 || device >= count)
        return answer_with("device " + std::to_string(device) + " is not one of the " + std::to_string(count) +
                           " there are");
    DeviceInfo read{};
    const cudaError_t error = read_info(device, &read);
    if (error != cudaSuccess) return answer_with(driver_problem(error));
    if (!runs_on(built_architectures(), read.sm))
        return answer_with("device " + std::to_string(device) + " is of architecture sm_" + std::to_string(read.sm) +
                           ", the kernels were built for " + built_architectures());
    if (keeps) {
        const std::lock_guard<std::mutex> lock(keeping);
        if (!is_kept[device].load(std::memory_order_relaxed)) kept[device] = read;
        is_kept[device].store(true, std::memory_order_release);
    }
    *info = read;
    return nullptr;
}

}  // namespace cuda
}  // namespace kron
