#!/usr/bin/env bash
# The C++ tests of the core on processors this machine is not: 64-bit ARM (cross compiled), and x86-64 without AVX2 and
# without AVX-512 (the native build, on older processors), all under qemu. Correctness only: it says nothing of speed.
#   tools/test_emulated.sh aarch64 | x86
# Exit code 0: passed, 1: failed, 3: a tool is missing (named on stderr).
set -euo pipefail
cd "$(dirname "$0")/.."

need() {
  for name in $1; do
    if command -v "$name" >/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "test_emulated: ${1// / or } is not installed (Debian: apt-get install $2)" >&2
  exit 3
}

build() {
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja -DKRON_KERNELS_BUILD_TESTS=ON -DKRON_KERNELS_BUILD_TORCH=OFF "$@" >"$folder.log" ||
    { cat "$folder.log"; exit 1; }
  # The emulated CUDA kernels compute the same on every processor: the sanitizers' build runs them.
  cmake --build "$folder" --target kron_core_tests
}

mkdir -p build
case "${1:-}" in
  aarch64)
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu >/dev/null
    need "qemu-aarch64 qemu-aarch64-static" qemu-user-static >/dev/null
    # The fixed part takes half a minute here; ctest starts the tests through qemu (cmake/aarch64-linux-gnu.cmake).
    build build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DKRON_KERNELS_TEST_ROUNDS=10
    ctest --test-dir build/aarch64 --verbose -R kron_core_tests
    ;;
  x86)
    if [ "$(uname -m)" != x86_64 ]; then
      echo "test_emulated: x86 needs an x86-64 machine to build on, this is $(uname -m)" >&2
      exit 3
    fi
    qemu=$(need "qemu-x86_64 qemu-x86_64-static" qemu-user-static)
    build build/native
    echo "Nehalem (no AVX: the portable level)"
    "$qemu" -cpu Nehalem build/native/kron_core_tests 10
    # qemu computes each lane of an AVX vector in software: the random part alone. Features it lacks would be warned
    # of at the start of every thread.
    echo "Haswell (no AVX-512: the avx2 level)"
    "$qemu" -cpu Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid build/native/kron_core_tests 12 only
    ;;
  *)
    sed -n '4s/^#  *//p' "$0" >&2
    exit 2
    ;;
esac
