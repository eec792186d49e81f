// Whole blocks against a naive fp64 computation: feed-forward and its gradients, joint projections, add and norm,
// embeddings; plain and packed factors, and errors for packs that do not fit.
#include <stdexcept>
#include <string>

#include "emulated.h"
#include "support.h"

namespace {

using namespace test;

typedef std::vector<double> Values;

Values values_of(const Buffer& b) {
    Values v(static_cast<size_t>(b.count));
    for (int64_t i = 0; i < b.count; ++i) v[size_t(i)] = b.at(i);
    return v;
}

struct Pair {
    Pair(int64_t terms, int64_t m1, int64_t n1, int64_t m2, int64_t n2, DType dtype)
        : terms(terms),
          m1(m1),
          n1(n1),
          m2(m2),
          n2(n2),
          dtype(dtype),
          a(terms * m1 * n1, dtype),
          b(terms * m2 * n2, dtype),
          bias(m1 * m2, dtype) {
        a.randomise(), b.randomise(), bias.randomise();
    }
    int64_t m() const { return m1 * m2; }
    int64_t n() const { return n1 * n2; }
    kron::Shape shape(int64_t tokens) const { return {tokens, terms, m1, n1, m2, n2, dtype}; }
    kron::Factor factor_a() const { return {a.get(), m1 * n1, n1, 1}; }
    kron::Factor factor_b() const { return {b.get(), m2 * n2, n2, 1}; }
    // With packed bytes, the plain factor that they hold is one NaN of stride 0: a kernel that reads it gives NaN.
    kron::Projection projection(void* y, const std::vector<char>* packed = nullptr) const {
        static const uint64_t nan = ~uint64_t{0};  // in every dtype
        kron::Projection p{factor_a(), factor_b(), bias.get(), nullptr, 0, y};
        if (packed) {
            p.packed = aligned(*packed);
            p.packed_bytes = static_cast<int64_t>(packed->size()) - 64;
            (kron::kron_packs_a(p.packed) ? p.a : p.b) = {&nan, 0, 0, 0};
        }
        return p;
    }
    // Packed bytes have to lie on cache lines.
    static const char* aligned(const std::vector<char>& bytes) {
        return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
    }
    std::vector<char> pack(const kron::Executor& executor, bool emulated_amx = false) const {
        const auto bytes_of = emulated_amx ? amx_emulated_packed_bytes : kron::kron_packed_bytes;
        std::vector<char> bytes(size_t(bytes_of(shape(1))) + 64);
        char* const place = const_cast<char*>(aligned(bytes));
        (emulated_amx ? amx_emulated_pack : kron::kron_pack)(shape(1), factor_a(), factor_b(), place, executor);
        return bytes;
    }
    double weight(int64_t row, int64_t col) const {
        double w = 0;
        for (int64_t s = 0; s < terms; ++s)
            w += a.at((s * m1 + row / m2) * n1 + col / n2) * b.at((s * m2 + row % m2) * n2 + col % n2);
        return w;
    }
    Values times(const Values& x, int64_t tokens) const {
        Values y(size_t(tokens * m()));
        for (int64_t i = 0; i < m(); ++i) {
            Values row(static_cast<size_t>(n()));
            for (int64_t j = 0; j < n(); ++j) row[size_t(j)] = weight(i, j);
            for (int64_t t = 0; t < tokens; ++t) {
                double sum = bias.at(i);
                for (int64_t j = 0; j < n(); ++j) sum += row[size_t(j)] * x[size_t(t * n() + j)];
                y[size_t(t * m() + i)] = sum;
            }
        }
        return y;
    }

    int64_t terms, m1, n1, m2, n2;
    DType dtype;
    Buffer a, b, bias;
};

struct NormOperands {
    NormOperands(int64_t tokens, int64_t m, DType dtype)
        : residual(tokens * m, dtype), weight(m, dtype), bias(m, dtype) {
        residual.randomise(), weight.randomise(), bias.randomise();
    }
    kron::NormArgs args(int64_t m) const { return {residual.get(), m, weight.get(), bias.get(), kEps}; }
    Values of(Values y, int64_t m) const {
        for (size_t t = 0; t < y.size(); t += size_t(m)) {
            double mean = 0, variance = 0;
            for (size_t i = t; i < t + size_t(m); ++i) y[i] += residual.at(int64_t(i)), mean += y[i] / double(m);
            for (size_t i = t; i < t + size_t(m); ++i) variance += (y[i] - mean) * (y[i] - mean) / double(m);
            for (size_t i = 0; i < size_t(m); ++i)
                y[t + i] = (y[t + i] - mean) / std::sqrt(variance + kEps) * weight.at(int64_t(i)) + bias.at(int64_t(i));
        }
        return y;
    }
    static constexpr double kEps = 1e-3;
    Buffer residual, weight, bias;
};

// bf16 rounds twice or three times on the way through a block.
double block_tolerance(DType dtype, int64_t depth) {
    return 4 * tolerance(dtype, depth);
}

void test_ffn(int64_t tokens, const Pair& first, const Pair& second, Activation activation, bool with_norm) {
    const DType dtype = first.dtype;
    Buffer x(tokens * first.n(), dtype);
    x.randomise();
    const NormOperands norm(tokens, second.m(), dtype);
    Values hidden = first.times(values_of(x), tokens);
    for (double& h : hidden) h = activate(activation, h);
    Values expected = second.times(hidden, tokens);
    if (with_norm) expected = norm.of(expected, second.m());
    const auto run = [&](auto&& ffn, const kron::Executor& executor, const char* level, int packed,
                         bool emulated_amx = false) {
        const char* const packs[] = {"", " first packed", " second packed", " packed"};
        char where[200];
        std::snprintf(where, sizeof where,
                      "ffn at %s, %d threads, T=%ld S=%ld,%ld A=%ldx%ld B=%ldx%ld, %ldx%ld dtype=%d act=%d%s%s", level,
                      executor.threads, long(tokens), long(first.terms), long(second.terms), long(first.m1),
                      long(first.n1), long(first.m2), long(first.n2), long(second.m1), long(second.m2), int(dtype),
                      int(activation), with_norm ? " norm" : "", packs[packed]);
        const std::vector<char> bytes1 = first.pack(executor, emulated_amx),
                                bytes2 = second.pack(executor, emulated_amx);
        const Buffer y(tokens * second.m(), dtype);
        ffn({first.shape(tokens), second.shape(tokens), x.get(), first.n(),
             first.projection(nullptr, packed & 1 ? &bytes1 : nullptr),
             second.projection(y.get(), packed & 2 ? &bytes2 : nullptr), activation,
             with_norm ? norm.args(second.m()) : kron::NormArgs{}},
            executor);
        compare(expected, y, block_tolerance(dtype, first.n() + second.n()), "ffn", where);
    };
    at_every_level([&](const kron::Executor& executor, const char* level) {
        for (int packed = 0; packed < 4; ++packed) run(kron::kron_ffn_forward, executor, level, packed);
    });
    if (dtype != DType::bf16 || tokens == 0) return;
    for (const int packed : {0, 3})
        if (amx_emulated_ffn_is_fused(first.shape(1), second.shape(1), packed))
            run(amx_emulated_ffn, kThreads, "emulated AMX", packed, true);
}

// Along a random direction of each operand, the gradient's product with it is the derivative of <grad, y>.
void test_ffn_backward(int64_t tokens, const Pair& first, const Pair& second, Activation activation) {
    const DType dtype = DType::f64;
    Buffer x(tokens * first.n(), dtype), grad(tokens * second.m(), dtype);
    x.randomise(), grad.randomise();
    const auto loss = [&](const kron::Executor& executor) {
        const Buffer y(tokens * second.m(), dtype);
        kron::kron_ffn_forward({first.shape(tokens), second.shape(tokens), x.get(), first.n(),
                                first.projection(nullptr), second.projection(y.get()), activation, kron::NormArgs{}},
                               executor);
        double sum = 0;
        for (int64_t i = 0; i < y.count; ++i) sum += y.at(i) * grad.at(i);
        return sum;
    };
    at_every_level([&](const kron::Executor& executor, const char* level) {
        const Buffer dx(x.count, dtype), da1(first.a.count, dtype), db1(first.b.count, dtype), dbias1(first.m(), dtype),
            da2(second.a.count, dtype), db2(second.b.count, dtype), dbias2(second.m(), dtype);
        kron::kron_ffn_backward(
            {first.shape(tokens), second.shape(tokens), grad.get(), second.m(), x.get(), first.n(), first.factor_a(),
             first.factor_b(), second.factor_a(), second.factor_b(), first.bias.get(), activation, dx.get(), da1.get(),
             db1.get(), dbias1.get(), da2.get(), db2.get(), dbias2.get()},
            executor);
        const std::pair<const Buffer*, const Buffer*> each[] = {
            {&x, &dx},         {&first.a, &da1},  {&first.b, &db1},        {&first.bias, &dbias1},
            {&second.a, &da2}, {&second.b, &db2}, {&second.bias, &dbias2},
        };
        for (size_t which = 0; which < 7; ++which) {
            const auto [operand, gradient] = each[which];
            const Values before = values_of(*operand);
            Values direction(before.size());
            double predicted = 0, scale = 0;
            for (size_t i = 0; i < direction.size(); ++i) {
                direction[i] = uniform();
                predicted += direction[i] * gradient->at(int64_t(i));
                scale += std::fabs(direction[i] * gradient->at(int64_t(i)));
            }
            const double h = 1e-5;
            double ends[2];
            for (const int side : {0, 1}) {
                for (size_t i = 0; i < direction.size(); ++i)
                    write(operand->get(), int64_t(i), dtype, before[i] + (side ? h : -h) * direction[i]);
                ends[side] = loss(executor);
            }
            for (size_t i = 0; i < before.size(); ++i) write(operand->get(), int64_t(i), dtype, before[i]);
            const double found = (ends[1] - ends[0]) / (2 * h);
            char where[100];
            std::snprintf(where, sizeof where, "ffn gradient %zu at %s, T=%ld act=%d: %.9g, differences %.9g", which,
                          level, long(tokens), int(activation), predicted, found);
            check(std::fabs(found - predicted) <= 1e-6 * (scale + 1), "ffn backward", where);
        }
    });
}

void test_projections(int64_t tokens, const std::vector<const Pair*>& pairs) {
    const Pair& one = *pairs[0];
    Buffer x(tokens * one.n(), one.dtype);
    x.randomise();
    std::vector<Values> expected;
    for (const Pair* pair : pairs) expected.push_back(pair->times(values_of(x), tokens));
    const NormOperands norm(tokens, one.m(), one.dtype);
    const auto run = [&](auto&& forward, const kron::Executor& executor, const char* level, bool packed,
                         bool emulated_amx = false) {
        char where[120];
        std::snprintf(where, sizeof where, "%zu projections at %s, %d threads, T=%ld A=%ldx%ld B=%ldx%ld dtype=%d%s",
                      pairs.size(), level, executor.threads, long(tokens), long(one.m1), long(one.n1), long(one.m2),
                      long(one.n2), int(one.dtype), packed ? " packed" : "");
        std::vector<std::vector<char>> bytes;
        std::vector<Buffer*> outputs;
        std::vector<kron::Projection> projections;
        for (const Pair* pair : pairs) bytes.push_back(pair->pack(executor, emulated_amx));
        for (size_t i = 0; i < pairs.size(); ++i) {
            outputs.push_back(new Buffer(tokens * one.m(), one.dtype));
            projections.push_back(pairs[i]->projection(outputs[i]->get(), packed ? &bytes[i] : nullptr));
        }
        const double tol = tolerance(one.dtype, one.terms * (one.n() + 1));
        forward({one.shape(tokens), x.get(), one.n(), int64_t(pairs.size()), projections.data(), Activation::none,
                 kron::NormArgs{}},
                executor);
        for (size_t i = 0; i < pairs.size(); ++i) compare(expected[i], *outputs[i], tol, "projection", where);
        forward({one.shape(tokens), x.get(), one.n(), 1, projections.data(), Activation::none, norm.args(one.m())},
                executor);
        compare(norm.of(expected[0], one.m()), *outputs[0], block_tolerance(one.dtype, one.n()), "norm", where);
        for (const Buffer* output : outputs) delete output;
    };
    at_every_level([&](const kron::Executor& executor, const char* level) {
        for (const bool packed : {false, true}) run(kron::kron_matmul_forward, executor, level, packed);
    });
    if (one.dtype == DType::bf16)
        for (const bool packed : {false, true}) run(amx_emulated_forward, kThreads, "emulated AMX", packed, true);
}

// What kron_pack made of other shapes or dtypes, at another level, in part or out of line is an error.
void test_packs_that_do_not_fit() {
    const int64_t tokens = 30;
    const auto message_of = [&](const Pair& pair, const Pair& packed_pair, int64_t bytes_less, int64_t offset,
                                const char* level_of_pack) -> std::string {
        if (level_of_pack) kron::set_isa_cap(kron::Isa::portable);
        const int64_t bytes = kron::kron_packed_bytes(packed_pair.shape(1));
        std::vector<char> memory(size_t(bytes) + 128);
        char* const place = const_cast<char*>(Pair::aligned(memory));
        kron::kron_pack(packed_pair.shape(1), packed_pair.factor_a(), packed_pair.factor_b(), place, kSerial);
        if (level_of_pack) kron::set_isa_cap(kron::Isa::amx);
        std::memmove(place + offset, place, size_t(bytes));
        const Buffer x(tokens * pair.n(), pair.dtype), y(tokens * pair.m(), pair.dtype);
        kron::Projection projection = pair.projection(y.get());
        projection.packed = place + offset, projection.packed_bytes = bytes - bytes_less;
        try {
            kron::kron_matmul_forward({pair.shape(tokens), x.get(), pair.n(), 1, &projection, Activation::none, {}},
                                      kSerial);
        } catch (const std::invalid_argument& error) {
            return error.what();
        }
        return "";
    };
    const auto expect = [&](const char* what, const char* got, const std::string& message) {
        check(message.find(got) != std::string::npos && message.find("optimize_for_inference") != std::string::npos,
              what, message.c_str());
    };
    const Pair pair(1, 8, 2, 48, 40, DType::f32);
    at_every_level([&](const kron::Executor&, const char* level) {
        expect("other shape", "got those of a (1, 8, 2), b (1, 40, 40) in float32",
               message_of(pair, Pair(1, 8, 2, 40, 40, DType::f32), 0, 0, nullptr));
        expect("other dtype", "in float64", message_of(pair, Pair(1, 8, 2, 48, 40, DType::f64), 0, 0, nullptr));
        expect("cut short", "bytes, not", message_of(pair, pair, 64, 0, nullptr));
        expect("no head", "bytes of another origin", message_of(pair, pair, 1 << 30, 0, nullptr));
        expect("out of line", "do not begin at a multiple of 64", message_of(pair, pair, 0, 8, nullptr));
        expect("level named", level, message_of(pair, pair, 64, 0, nullptr));
    });
    if (kron::active_isa() >= kron::Isa::avx2)
        expect("other level", "the layout of another level", message_of(pair, pair, 0, 0, "portable"));
}

void test_embedding(int64_t tokens, int64_t terms, int64_t p, int64_t k, DType dtype, bool added, bool with_norm) {
    const int64_t rows = 23, m = p * k;
    Buffer a(terms * rows * p, dtype), b(terms * k, dtype), positions(5 * m, dtype), types(2 * m, dtype);
    a.randomise(), b.randomise(), positions.randomise(), types.randomise();
    std::vector<int64_t> ids, position_ids, type_ids;
    for (int64_t t = 0; t < tokens; ++t)
        ids.push_back(pick(0, rows - 1)), position_ids.push_back(t % 5), type_ids.push_back(t % 2);
    Buffer zero(tokens * m, dtype);
    for (int64_t i = 0; i < zero.count; ++i) write(zero.get(), i, dtype, 0);
    NormOperands norm(tokens, m, dtype);
    for (int64_t i = 0; i < norm.residual.count; ++i) write(norm.residual.get(), i, dtype, 0);
    Values expected(size_t(tokens * m));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < m; ++i) {
            double& y = expected[size_t(t * m + i)];
            for (int64_t s = 0; s < terms; ++s)
                y += a.at((s * rows + ids[size_t(t)]) * p + i / k) * b.at(s * k + i % k);
            if (added) y += positions.at(t % 5 * m + i) + types.at(t % 2 * m + i);
        }
    if (with_norm) expected = norm.of(expected, m);
    at_every_level([&](const kron::Executor& executor, const char* level) {
        char where[120];
        std::snprintf(where, sizeof where, "embedding at %s, %d threads, T=%ld S=%ld p=%ld k=%ld dtype=%d", level,
                      executor.threads, long(tokens), long(terms), long(p), long(k), int(dtype));
        const Buffer y(tokens * m, dtype);
        kron::EmbeddingArgs args{tokens,
                                 terms,
                                 rows,
                                 p,
                                 k,
                                 dtype,
                                 ids.data(),
                                 {a.get(), rows * p, p, 1},
                                 {b.get(), k, k, 1},
                                 {},
                                 nullptr,
                                 nullptr,
                                 NormOperands::kEps,
                                 y.get()};
        if (added)
            args.added[0] = {position_ids.data(), positions.get(), 5},
            args.added[1] = {type_ids.data(), types.get(), 2};
        if (with_norm) args.norm_weight = norm.weight.get(), args.norm_bias = norm.bias.get();
        kron::kron_embedding(args, executor);
        compare(expected, y, block_tolerance(dtype, 8), "embedding", where);
    });
}

void fixed_blocks() {
    // Two rows a token (in registers), four, one; a balanced pair (in L1); tiny right factors (commuted); odd sizes; a
    // pair that does not chain; first or second product oriented otherwise than the fused block. m1, n1, m2, n2 of the
    // first, m1, m2 of the second, whether the second's grid is turned round.
    const int64_t shapes[][7] = {{8, 2, 48, 32, 2, 48, 0},    {8, 4, 32, 24, 4, 40, 0},  {4, 1, 40, 24, 1, 24, 0},
                                 {24, 8, 24, 16, 8, 16, 0},   {48, 24, 4, 2, 24, 2, 0},  {5, 3, 7, 2, 2, 9, 0},
                                 {64, 16, 48, 48, 16, 48, 0}, {32, 5, 20, 9, 11, 24, 0}, {7, 2, 33, 17, 2, 19, 0},
                                 {6, 2, 10, 12, 2, 12, 1},    {2, 1, 1, 4, 17, 1, 0},    {3, 16, 1, 1, 2, 2, 0}};
    for (const auto& s : shapes)
        for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::f16})
            for (const int64_t tokens : {0, 1, 9, 67}) {
                const bool all = dtype == DType::f32 || dtype == DType::bf16;
                if (!all && tokens > 1 && tokens < 67) continue;
                for (const int64_t terms : {1, 2}) {
                    if (terms == 2 && (!all || tokens != 9)) continue;
                    const Pair first(terms, s[0], s[1], s[2], s[3], dtype);
                    const Pair second(terms, s[4], s[6] ? s[2] : s[0], s[5], s[6] ? s[0] : s[2], dtype);
                    for (const auto activation : {Activation::gelu, static_cast<Activation>(tokens % 4 + 1)})
                        test_ffn(tokens, first, second, activation, tokens % 2 == 1);
                }
            }
    // Differences across ReLU's kink mean nothing: its gradient is tested against torch.
    for (const int kind : {0, 1, 2, 4}) {
        const Pair first(1, 8, 2, 24, 20, DType::f64), second(2, 2, 8, 12, 24, DType::f64);
        for (const int64_t tokens : {3, 40}) test_ffn_backward(tokens, first, second, static_cast<Activation>(kind));
    }
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
        for (const int64_t tokens : {1, 13, 130}) {
            const int64_t shapes_of[][4] = {{48, 48, 2, 2}, {96, 24, 2, 16},  {8, 2, 40, 48},
                                            {2, 8, 48, 40}, {24, 24, 32, 32}, {5, 3, 7, 2}};
            for (const auto& s : shapes_of) {
                const Pair q(1, s[0], s[1], s[2], s[3], dtype), k(1, s[0], s[1], s[2], s[3], dtype),
                    v(1, s[0], s[1], s[2], s[3], dtype);
                test_projections(tokens, {&q, &k, &v});
            }
            const Pair q(3, 6, 5, 7, 4, dtype), k(3, 6, 5, 7, 4, dtype);
            test_projections(tokens, {&q, &k});
        }
    // Large enough for the threads to share out the panels.
    const Pair wide(1, 8, 2, 240, 250, DType::f32);
    test_projections(13, {&wide});
    test_packs_that_do_not_fit();
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64, DType::f16})
        for (const int64_t k : {1, 3, 8, 12, 16})
            test_embedding(k == 8 ? 60 : 7, 1 + k % 2, 11, k, dtype, k != 3, k != 1);
}

}  // namespace

void test_blocks(int rounds, bool only_random) {
    if (!only_random) fixed_blocks();
    for (int r = 0; r < rounds; ++r) {
        const DType dtype = static_cast<DType>(pick(0, 3));
        const int64_t m1 = pick(1, 12), m2 = pick(1, 40), terms = pick(1, 2);
        const Pair first(terms, m1, pick(1, 6), m2, pick(1, 40), dtype);
        const Pair second(pick(1, 2), pick(1, 6), m1, pick(1, 40), m2, dtype);
        test_ffn(pick(0, 50), first, second, static_cast<Activation>(pick(0, 4)), pick(0, 1) == 1);
    }
}
