#include "cpu/product/tail_tables.h"

#include <cmath>

namespace kron {
namespace {

typedef double (*Function)(double);

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

// Interpolates f(x / scale) at the Chebyshev nodes of [center - 1/2, center + 1/2]: Newton's divided differences,
// expanded to powers of r = x - center, into column `piece`.
template <int kDegree>
void fit_piece(Function f, double scale, int center, int piece, float (&coefficient)[kDegree + 1][kPieces]) {
    constexpr int n = kDegree + 1;
    double node[n], difference[n], power[n] = {};
    for (int i = 0; i < n; ++i) {
        node[i] = 0.5 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * n));
        difference[i] = f((center + node[i]) / scale);
    }
    for (int order = 1; order < n; ++order)
        for (int i = n - 1; i >= order; --i)
            difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
    for (int i = n - 1; i >= 0; --i) {  // power = power * (r - node[i]) + difference[i]
        for (int d = n - 1; d > 0; --d) power[d] = power[d - 1] - node[i] * power[d];
        power[0] = difference[i] - node[i] * power[0];
    }
    for (int d = 0; d < n; ++d) coefficient[d][piece] = static_cast<float>(power[d]);
}

TailTable fit_tail(Function tail, double limit) {
    TailTable table{};
    table.limit = static_cast<float>(limit);
    table.scale = static_cast<float>((kPieces - 0.5) / limit);
    for (int piece = 0; piece < kPieces; ++piece)
        fit_piece<TailTable::kDegree>(tail, table.scale, piece, piece, table.coefficient);
    return table;
}

// F(x) = tail(-x) for every x.
RoughTable fit_rough(Function tail, double limit) {
    RoughTable table{};
    table.limit = static_cast<float>(limit);
    table.scale = static_cast<float>((kPieces / 2 - 0.5) / limit);
    for (int n = -kPieces / 2; n < kPieces / 2; ++n)
        fit_piece<RoughTable::kDegree>(tail, -table.scale, n, (n + kPieces) % kPieces, table.coefficient);
    return table;
}

// The limits: beyond them 1 - F(-a) is 1 in fp32 for the two forms of GELU. SiLU's tail falls slower.
constexpr double kGeluLimit = 5.6, kGeluTanhLimit = 5.2, kSiluLimit = 17.5;

}  // namespace

const TailTable& tail_table(Activation activation) {
    static const TailTable gelu = fit_tail(gelu_tail, kGeluLimit), gelu_tanh = fit_tail(gelu_tanh_tail, kGeluTanhLimit),
                           silu = fit_tail(silu_tail, kSiluLimit);
    return activation == Activation::gelu_tanh ? gelu_tanh : activation == Activation::silu ? silu : gelu;
}

const RoughTable& rough_table(Activation activation) {
    static const RoughTable gelu = fit_rough(gelu_tail, kGeluLimit),
                            gelu_tanh = fit_rough(gelu_tanh_tail, kGeluTanhLimit);
    return activation == Activation::gelu_tanh ? gelu_tanh : gelu;
}

}  // namespace kron
