// y = (A (x) B) x for two tokens by the torch-free core, checked against the sum by hand. Exit code 0: right.
#include <cmath>
#include <cstdio>
#include <vector>

#include "kron/problem.h"
#include "kron/version.h"

// The core asks its caller for threads: here there is one.
static void run(int64_t count, void (*task)(void* arg, int64_t index), void* arg) {
    for (int64_t i = 0; i < count; ++i) task(arg, i);
}

int main() {
    const int64_t T = 2, m1 = 3, n1 = 4, m2 = 5, n2 = 6;
    std::vector<float> x(T * n1 * n2), a(m1 * n1), b(m2 * n2), y(T * m1 * m2);
    for (std::vector<float>* values : {&x, &a, &b})
        for (size_t i = 0; i < values->size(); ++i) (*values)[i] = std::sin(1.0f + i * values->size());

    kron::Projection pair{};
    pair.a = {a.data(), m1 * n1, n1, 1}, pair.b = {b.data(), m2 * n2, n2, 1}, pair.y = y.data();
    kron::ForwardArgs args{};
    args.shape = {T, 1, m1, n1, m2, n2, kron::DType::f32};
    args.x = x.data(), args.x_stride = n1 * n2, args.count = 1, args.projections = &pair;
    kron::kron_matmul_forward(args, {1, run});

    double worst = 0;
    for (int64_t i = 0; i < T * m1 * m2; ++i) {
        double expected = 0;  // sum over k, l of A[row, k] B[column, l] X[k, l]
        const int64_t t = i / (m1 * m2), row = i / m2 % m1, column = i % m2;
        for (int64_t k = 0; k < n1; ++k)
            for (int64_t l = 0; l < n2; ++l)
                expected += a[row * n1 + k] * b[column * n2 + l] * x[(t * n1 + k) * n2 + l];
        worst = std::fmax(worst, std::fabs(y[i] - expected));
    }
    std::printf("kron_kernels %s, headers %s, kernels %s: largest error %.1e\n", kron::version_string(),
                KRON_VERSION_STRING, kron::isa_name(kron::active_isa()), worst);
    return worst < 1e-5 && kron::version() == KRON_VERSION ? 0 : 1;
}
