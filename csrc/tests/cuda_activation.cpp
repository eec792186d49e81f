// Activations of the CUDA kernels against fp64, with exact powers of two and reciprocals.
#include "../cuda/device/activation.h"

#include <string>

#include "emulator/tests.h"
#include "support.h"

namespace {

using kron::Activation;
using namespace kron::cuda::device;

double slope_of(Activation kind, double x) {
    const double c = 2 * std::sqrt(2 / M_PI), v = kind == Activation::silu ? x : c * (x + 0.044715 * x * x * x);
    const double s = 1 / (1 + std::exp(-v));
    switch (kind) {
        case Activation::gelu:
            return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        case Activation::gelu_tanh:
            return s + x * s * (1 - s) * c * (1 + 3 * 0.044715 * x * x);
        case Activation::relu:
            return x > 0;
        case Activation::silu:
            return s * (1 + x * (1 - s));
        case Activation::none:
            break;
    }
    return 1;
}

// Largest errors of value and slope as activation.h states them: relative to max(1, |x|).
void test_one(Activation kind, double value_error, double slope_error) {
    const std::string name = "activation " + std::to_string(int(kind));
    double worst = 0, worst_slope = 0;
    for (int i = -40000; i <= 40000; ++i) {
        const float x = float(i) * 0.00051f;  // up to 20.4
        const double scale = std::fmax(1, std::fabs(x));
        worst = std::fmax(worst, std::fabs(activate(kind, x) - test::activate(kind, x)) / scale);
        worst_slope = std::fmax(worst_slope, std::fabs(activation_slope(kind, x) - slope_of(kind, x)) / scale);
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
