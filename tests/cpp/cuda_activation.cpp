// Activations of the CUDA kernels against fp64, with exact powers of two and reciprocals.
#include "cuda/common/activation.h"

#include <string>

#include "cuda_ffn.h"
#include "emulator/tests.h"

namespace {

using kron::Activation;
using namespace kron::cuda::device;

// Largest errors of value and slope as activation.h states them: relative to max(1, |x|).
void test_one(Activation kind, double value_error, double slope_error) {
    const std::string name = "activation " + std::to_string(int(kind));
    double worst = 0, worst_slope = 0;
    for (int i = -40000; i <= 40000; ++i) {
        const float x = float(i) * 0.00051f;  // up to 20.4
        const double scale = std::fmax(1, std::fabs(x));
        worst = std::fmax(worst, std::fabs(activate(kind, x) - test::activate(kind, x)) / scale);
        worst_slope = std::fmax(worst_slope, std::fabs(activation_slope(kind, x) - test::slope(kind, x)) / scale);
    }
    const auto report = [&](double error, double allowed) {
        return name + ": error " + std::to_string(error * 1e7) + "e-7, allowed " + std::to_string(allowed * 1e7) +
               "e-7";
    };
    test::check(worst <= value_error, "value", report(worst, value_error).c_str());
    test::check(worst_slope <= slope_error, "slope", report(worst_slope, slope_error).c_str());

    const float huge = 3e38f, nan = std::nanf("");
    test::check(activate(kind, huge) == huge && activation_slope(kind, huge) == 1, "huge", name.c_str());
    const bool zero = kind != Activation::none;
    test::check(std::fabs(activate(kind, -huge) - (zero ? 0 : -huge)) < 1e-14f, "minus huge", name.c_str());
    test::check(std::fabs(activation_slope(kind, -huge) - (zero ? 0 : 1)) < 1e-14f, "its slope", name.c_str());
    test::check(std::isnan(activate(kind, nan)), "NaN", name.c_str());
    const bool smooth = zero && kind != Activation::relu;
    test::check(std::isnan(activation_slope(kind, nan)) == smooth, "its slope", name.c_str());
}

void test_activations() {
    test_one(Activation::none, 0, 0);
    test_one(Activation::gelu, 1.8e-7, 3.1e-7);
    test_one(Activation::gelu_tanh, 2.0e-7, 7.2e-7);
    test_one(Activation::relu, 0, 0);
    test_one(Activation::silu, 1.5e-7, 3e-7);
}

const bool added = emulator::add_test("activation", test_activations);

}  // namespace
