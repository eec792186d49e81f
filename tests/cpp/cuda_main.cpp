// Tests of the CUDA kernels on an emulated machine: their own source, run on the processor against fp64, under several
// schedules of the threads of a block. No GPU, no nvcc.
//   kron_cuda_emulated_tests [name of a test]
#include <cstdio>
#include <cstring>
#include <ctime>

#include "emulator/tests.h"
#include "support.h"

int main(int argc, char** argv) {
    for (const emulator::Test& one : emulator::Test::all()) {
        if (argc > 1 && std::strcmp(argv[1], one.name)) continue;
        const std::clock_t start = std::clock();
        test::state = 1;
        one.run();
        std::printf("%s: %.1f s\n", one.name, double(std::clock() - start) / CLOCKS_PER_SEC);
    }
    std::printf("%d checks, %d failures\n", test::checks, test::failures);
    return test::failures || !test::checks;
}
