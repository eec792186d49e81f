#include "tail_tables.h"

#include <cmath>

namespace kron {
namespace {

typedef double (*Tail)(double a);

double gelu_tail(double a) {
    return 0.5 * std::erfc(a * 0.70710678118654752440);
}
double gelu_tanh_tail(double a) {
    // (1 + tanh(-u)) / 2 = 1 / (1 + exp(2u)), u = sqrt(2/pi) (a + 0.044715 a^3)
    return 1 / (1 + std::exp(1.5957691216057308 * (a + 0.044715 * a * a * a)));
}
double silu_tail(double a) {
    return 1 / (1 + std::exp(a));
}

// Interpolates the tail at the Chebyshev nodes of every piece: Newton's divided differences, expanded to powers of r.
TailTable fit(Tail tail, double limit, int degree) {
    constexpr int kMost = TailTable::kDegree + 1;
    TailTable table{};
    table.degree = degree;
    table.limit = static_cast<float>(limit);
    table.scale = static_cast<float>((TailTable::kPieces - 0.5) / limit);
    const int n = degree + 1;
    for (int piece = 0; piece < TailTable::kPieces; ++piece) {
        double node[kMost], difference[kMost], power[kMost] = {};
        for (int i = 0; i < n; ++i) {
            node[i] = 0.5 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * n));
            difference[i] = tail((piece + node[i]) / static_cast<double>(table.scale));
        }
        for (int order = 1; order < n; ++order)
            for (int i = n - 1; i >= order; --i)
                difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
        for (int i = n - 1; i >= 0; --i) {  // power = power * (r - node[i]) + difference[i]
            for (int d = n - 1; d > 0; --d) power[d] = power[d - 1] - node[i] * power[d];
            power[0] = difference[i] - node[i] * power[0];
        }
        for (int d = 0; d < n; ++d) table.coefficient[d][piece] = static_cast<float>(power[d]);
    }
    return table;
}

// The limits: beyond them 1 - F(-a) is 1 in fp32 for the two forms of GELU. SiLU's tail falls slower.
struct Tables {
    TailTable gelu[2] = {fit(gelu_tail, 5.6, 6), fit(gelu_tail, 5.6, 2)};
    TailTable gelu_tanh[2] = {fit(gelu_tanh_tail, 5.2, 6), fit(gelu_tanh_tail, 5.2, 2)};
    TailTable silu[2] = {fit(silu_tail, 17.5, 6), fit(silu_tail, 17.5, 2)};
};

}  // namespace

const TailTable& tail_table(Activation activation, bool rough) {
    static const Tables tables;
    switch (activation) {
        case Activation::gelu_tanh:
            return tables.gelu_tanh[rough];
        case Activation::silu:
            return tables.silu[rough];
        default:
            return tables.gelu[rough];
    }
}

}  // namespace kron
