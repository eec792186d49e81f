// kron/cuda_device.h of the emulated device: of the compute capability in KRON_EMULATED_SM, else 80.
#include "kron/cuda_device.h"

#include <cstdlib>

namespace kron {
namespace cuda {

const char* unsupported_device(int, DeviceInfo* info) {
    const char* sm = std::getenv("KRON_EMULATED_SM");
    *info = {sm ? std::atoi(sm) : 80, 2, 227 * 1024};
    return nullptr;
}

int device_count(const char**) {
    return 1;
}

const char* built_architectures() {
    return "80+PTX 90a";
}

bool runs_on(const char*, int sm) {
    return sm >= 80;
}

}  // namespace cuda
}  // namespace kron
