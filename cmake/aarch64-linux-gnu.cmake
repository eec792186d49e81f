# Cross build for 64-bit ARM with Debian's g++-aarch64-linux-gnu; its programs run here under qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
# Where qemu finds the dynamic loader and the C and C++ libraries of the target.
find_program(KRON_KERNELS_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(KRON_KERNELS_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${KRON_KERNELS_QEMU};-L;/usr/aarch64-linux-gnu")
endif()
