// The tests of this executable: each file of them defines a Test beside its function.
#pragma once

#include <vector>

namespace emulator {

struct Test {
    const char* name;
    void (*run)();
    static std::vector<Test>& all() {
        static std::vector<Test> tests;
        return tests;
    }
};
inline bool add_test(const char* name, void (*run)()) {
    Test::all().push_back(Test{name, run});
    return true;
}

}  // namespace emulator
