// What a GPU is, and whether the kernels of this library run on it. Nothing here needs a GPU or a driver to be there.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
namespace kron {
namespace cuda {

struct DeviceInfo {
    int sm;  // 10 * major + minor: 80, 90, ...
    int multiprocessors;
    int64_t shared_per_block;  // most bytes of shared memory of a block
};

// Null where the kernels run on the device, whose `info` is then filled in; otherwise why not: no driver, too old a
// driver, no such device, an architecture without machine code or PTX in this library. The text stays until this thread
// calls again.
const char* unsupported_device(int device, DeviceInfo* info);

// Devices that the driver shows, or -1 and why they cannot be counted.
int device_count(const char** reason);

// The architectures built, such as "80+PTX 90a 100a 120": machine code of each, and PTX for later ones.
const char* built_architectures();

// Whether an architecture of the list can run on a device of compute capability sm.
bool runs_on(const char* architectures, int sm);

}  // namespace cuda
}  // namespace kron
#pragma GCC visibility pop
