// Runs a test under several schedules, and again with each of its barriers and waits taken out.
#pragma once

#include <string>
#include <vector>

#include "emulator/machine.h"
#include "support.h"

namespace emulator {

inline const uint64_t kSeeds[] = {1, 2, 3};

// right() runs kernels and says whether their results are right.
template <class F>
void check_schedules(F right, const std::string& where) {
    for (const uint64_t seed : kSeeds) {
        settings().seed = seed;
        test::check(right(), ("under schedule " + std::to_string(seed)).c_str(), where.c_str());
    }
}

// Without any one of the barriers and waits that right() meets, it has to go wrong under one of the schedules at least:
// each is needed, and the test would notice its loss.
template <class F>
void check_every_site_matters(F right, const std::string& where) {
    forget_sites();
    settings().seed = kSeeds[0];
    test::check(right(), "with all barriers", where.c_str());
    const std::vector<Site> all = sites();
    for (size_t i = 0; i < all.size(); ++i) {
        settings().skipped_site = int(i);
        bool noticed = false;
        for (uint64_t seed = 1; seed <= 8 && !noticed; ++seed) {
            settings().seed = seed;
            noticed = !right();
        }
        settings().skipped_site = -1;
        const std::string what =
            std::string("nothing is wrong without ") + all[i].what + " at line " + std::to_string(all[i].line);
        test::check(noticed, what.c_str(), where.c_str());
    }
    test::check(!all.empty(), "a barrier or wait is met", where.c_str());
}

}  // namespace emulator
