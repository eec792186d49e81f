// The embedding's kernels against fp64: rows, added rows, norm, and the gradients of the factors.
#include <string>
#include <vector>

#include "cuda/embedding/embedding.cu"
#include "emulator/schedules.h"
#include "emulator/tests.h"

namespace {

using namespace test;
using kron::AddedRows;
using kron::EmbeddingArgs;
using kron::Factor;
using kron::cuda::EmbeddingBackwardArgs;
using kron::cuda::Launch;
using kron::cuda::Status;

Launch launch_with(void* workspace) {
    return {nullptr, 80, 2, 48 * 1024, false, workspace, 0};
}

struct Table {
    int64_t tokens, terms, rows, p, k;
    DType dtype;
    int64_t size() const { return p * k; }
    std::string text() const {
        std::string name = "T";
        for (const int64_t n : {tokens, terms, rows, p, k}) name += " " + std::to_string(n);
        return name + " dtype " + std::to_string(int(dtype));
    }
};

std::vector<int64_t> indices(int64_t count, int64_t rows) {
    std::vector<int64_t> ids(size_t(count) + 1);
    for (int64_t& id : ids) id = pick(0, rows - 1);
    return ids;
}

struct Operands {
    explicit Operands(const Table& t)
        : a(t.terms * t.rows * t.p, t.dtype), b(t.terms * t.k, t.dtype), ids(indices(t.tokens, t.rows)) {
        a.randomise();
        b.randomise();
    }
    // A transposed: (S, p, rows) in memory.
    Factor a_factor(const Table& t, bool transposed) const {
        return transposed ? Factor{a.get(), t.rows * t.p, 1, t.rows} : Factor{a.get(), t.rows * t.p, t.p, 1};
    }
    double a_at(const Table& t, bool transposed, int64_t s, int64_t id, int64_t c) const {
        return a.at(s * t.rows * t.p + (transposed ? c * t.rows + id : id * t.p + c));
    }
    Buffer a, b;
    std::vector<int64_t> ids;
};

bool close(const std::vector<double>& expected, const Buffer& got, double allowed) {
    double scale = 0.25;
    for (const double value : expected) scale = std::fmax(scale, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(std::fabs(expected[i] - got.at(int64_t(i))) <= allowed * scale)) return false;
    return true;
}

void check_forward(const Table& t, bool added, bool norm, bool transposed, bool misaligned, bool every_site = false) {
    const Operands o(t);
    const int64_t size = t.size(), shift = misaligned ? 1 : 0;
    Buffer tables[2] = {{5 * size, t.dtype}, {2 * size, t.dtype}}, weight(size, t.dtype), bias(size, t.dtype),
           y(t.tokens * size + shift, t.dtype);
    for (Buffer* buffer : {&tables[0], &tables[1], &weight, &bias}) buffer->randomise();
    const std::vector<int64_t> positions = indices(t.tokens, 5), types = indices(t.tokens, 2);
    EmbeddingArgs args{};
    args.tokens = t.tokens, args.terms = t.terms, args.rows = t.rows, args.p = t.p, args.k = t.k;
    args.dtype = t.dtype;
    args.ids = o.ids.data();
    args.a = o.a_factor(t, transposed), args.b = {o.b.get(), t.k, t.k, 1};
    if (added) {
        args.added[0] = AddedRows{positions.data(), tables[0].get(), 5};
        args.added[1] = AddedRows{types.data(), tables[1].get(), 2};
    }
    if (norm) args.norm_weight = weight.get(), args.norm_bias = bias.get();
    args.eps = 1e-5;
    args.y = static_cast<char*>(y.get()) + shift * kron::size_of(t.dtype);

    std::vector<double> expected;
    for (int64_t token = 0; token < t.tokens; ++token) {
        std::vector<double> row(static_cast<size_t>(size), 0.0);
        double mean = 0, variance = 0;
        for (int64_t e = 0; e < size; ++e) {
            double& value = row[size_t(e)];
            for (int64_t s = 0; s < t.terms; ++s)
                value += o.a_at(t, transposed, s, o.ids[size_t(token)], e / t.k) * o.b.at(s * t.k + e % t.k);
            if (added)
                value +=
                    tables[0].at(positions[size_t(token)] * size + e) + tables[1].at(types[size_t(token)] * size + e);
            mean += value / double(size);
        }
        for (const double value : row) variance += (value - mean) * (value - mean) / double(size);
        for (int64_t e = 0; e < size; ++e) {
            const double value = row[size_t(e)];
            expected.push_back(norm ? (value - mean) / std::sqrt(variance + args.eps) * weight.at(e) + bias.at(e)
                                    : value);
        }
    }
    const Launch launch = launch_with(nullptr);
    check(kron::cuda::unsupported_kron_embedding(args, launch) == nullptr, "is taken", t.text().c_str());
    const auto right = [&] {
        if (kron::cuda::kron_embedding(args, launch).code != 0) return false;
        Buffer got(t.tokens * size, t.dtype);
        std::memcpy(got.get(), args.y, size_t(got.count * kron::size_of(t.dtype)));
        return close(expected, got, 2 * tolerance(t.dtype, t.terms));
    };
    emulator::check_schedules(right, "rows of " + t.text());
    if (every_site) emulator::check_every_site_matters(right, "rows of " + t.text());
}

// Whether the gradients are right.
bool backward_is_right(const Table& t, bool transposed, const Operands& o, const Buffer& grad) {
    Buffer da(t.tokens * t.terms * t.p, t.dtype), db(t.terms * t.k, t.dtype);
    EmbeddingBackwardArgs args{};
    args.tokens = t.tokens, args.terms = t.terms, args.rows = t.rows, args.p = t.p, args.k = t.k;
    args.dtype = t.dtype;
    args.grad = grad.get(), args.grad_stride = t.size() + 3;
    args.ids = o.ids.data();
    args.a = o.a_factor(t, transposed), args.b = {o.b.get(), t.k, t.k, 1};
    args.da = da.get(), args.db = db.get();
    const int64_t bytes = kron::cuda::workspace_kron_embedding_backward(args, launch_with(nullptr));
    const Buffer workspace(bytes / 4, DType::f32);
    if (kron::cuda::kron_embedding_backward(args, launch_with(workspace.get())).code != 0) return false;

    const auto g = [&](int64_t token, int64_t c, int64_t l) { return grad.at(token * args.grad_stride + c * t.k + l); };
    const double allowed = tolerance(t.dtype, t.tokens * t.p);
    bool right = true;
    const auto judge = [&](double expected, double got, double scale) {
        right = right && std::fabs(expected - got) <= allowed * scale;
    };
    for (int64_t token = 0; token < t.tokens; ++token)
        for (int64_t s = 0; s < t.terms; ++s)
            for (int64_t c = 0; c < t.p; ++c) {
                double sum = 0, scale = 0.25;
                for (int64_t l = 0; l < t.k; ++l) sum += g(token, c, l) * o.b.at(s * t.k + l), scale += 0.25;
                judge(sum, da.at((token * t.terms + s) * t.p + c), scale);
            }
    for (int64_t s = 0; s < t.terms; ++s)
        for (int64_t l = 0; l < t.k; ++l) {
            double sum = 0, scale = 0.25;
            for (int64_t token = 0; token < t.tokens; ++token)
                for (int64_t c = 0; c < t.p; ++c, scale += 0.25)
                    sum += o.a_at(t, transposed, s, o.ids[size_t(token)], c) * g(token, c, l);
            judge(sum, db.at(s * t.k + l), scale);
        }
    return right;
}

void check_backward(const Table& t, bool transposed, bool every_site) {
    const Operands o(t);
    Buffer grad(t.tokens * (t.size() + 3) + 1, t.dtype);
    grad.randomise();
    const auto right = [&] { return backward_is_right(t, transposed, o, grad); };
    emulator::check_schedules(right, "gradients of " + t.text());
    if (every_site) emulator::check_every_site_matters(right, "gradients of " + t.text());
}

void check_wrong_index() {
    const Table t{3, 1, 4, 2, 4, DType::f32};
    Operands o(t);
    o.ids[1] = 4;
    Buffer y(t.tokens * t.size(), t.dtype);
    EmbeddingArgs args{};
    args.tokens = t.tokens, args.terms = t.terms, args.rows = t.rows, args.p = t.p, args.k = t.k;
    args.ids = o.ids.data();
    args.a = o.a_factor(t, false), args.b = {o.b.get(), t.k, t.k, 1};
    args.y = y.get();
    const Status status = kron::cuda::kron_embedding(args, launch_with(nullptr));
    check(std::string(status.what).find("an index is no row of its table") != std::string::npos, status.what,
          "an index out of range");
}

void run() {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        check_forward({5, 1, 7, 96, 8, dtype}, true, true, false, false, true);
        check_forward({3, 2, 7, 48, 16, dtype}, true, false, false, false);
        check_forward({17, 3, 4, 5, 7, dtype}, false, true, true, false);  // no row is aligned
        check_forward({9, 1, 4, 3, 24, dtype}, true, true, false, true);
        check_forward({1, 2, 1, 64, 1, dtype}, false, false, true, false);
        check_forward({2, 1, 3, 1, 40, dtype}, false, true, false, false);
    }
    check_forward({0, 1, 3, 2, 4, DType::f32}, true, true, false, false);
    check_forward({3, 1, 2, 1500, 8, DType::f32}, false, true, false, false);  // one warp a block
    check_forward({200, 1, 9, 4, 4, DType::bf16}, true, true, false, false);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        check_backward({37, 1, 5, 12, 8, dtype}, false, dtype == DType::bf16);
        check_backward({9, 3, 4, 5, 7, dtype}, true, false);
        check_backward({5, 2, 4, 1, 300, dtype}, false, false);  // b longer than a block
    }
    check_backward({0, 1, 4, 3, 2, DType::f32}, false, false);
    check_wrong_index();

    EmbeddingArgs args{};
    args.terms = 1, args.p = 1500, args.k = 8, args.dtype = DType::f64;
    check(kron::cuda::unsupported_kron_embedding(args, launch_with(nullptr)) != nullptr, "unsupported", "float64");
    args.dtype = DType::f32, args.k = 9;
    check(kron::cuda::unsupported_kron_embedding(args, launch_with(nullptr)) != nullptr, "unsupported",
          "too long a row");
}

const bool added = emulator::add_test("embedding", run);

}  // namespace
