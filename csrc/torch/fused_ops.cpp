// The CPU kernels of the ops of whole blocks, and of packing. Schemas: kron_kernels/_fused_ops.py.
#include <initializer_list>
#include <tuple>
#include <vector>

#include "operands.h"

namespace {

using namespace kron_torch;

// A residual and a norm's vectors for results (..., m) of x, alive as long as the call.
class Norm {
  public:
    Norm(const Tensor& x, int64_t m, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps)
        : rows_(checked_residual(x, m, residual)),
          weight_(checked_vector("norm_weight", "(m1 * m2,)", weight, m, x)),
          bias_(checked_vector("norm_bias", "(m1 * m2,)", bias, m, x)),
          eps_(checked_eps(eps)) {}
    kron::NormArgs args() const {
        return {rows_.data(), rows_.stride, weight_.const_data_ptr(), bias_.const_data_ptr(), eps_};
    }

  private:
    static Rows checked_residual(const Tensor& x, int64_t m, const Tensor& residual) {
        check_like("residual", residual, x, m, "");
        return rows_of(residual);
    }
    static double checked_eps(double eps) {
        if (!(eps >= 0)) fail("eps", "a number of at least 0", std::to_string(eps));
        return eps;
    }
    Rows rows_;
    Tensor weight_, bias_;
    double eps_;
};

Tensor kron_pack(const Tensor& a, const Tensor& b) {
    const auto a_size = stack_sizes(a, false), b_size = stack_sizes(b, false);
    if (!a_size) fail_shape("a", "(S, m1, n1) with no empty dimension", a);
    if (!b_size || (*b_size)[0] != (*a_size)[0]) fail_shape("b", "(S, m2, n2) with as many terms as a", b);
    check_dtype("b", b, dtype_code(a));
    const kron::Shape shape{1, (*a_size)[0], (*a_size)[1], (*a_size)[2], (*b_size)[1], (*b_size)[2], kernel_dtype(a)};
    const int64_t bytes = kron::kron_packed_bytes(shape), stride = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor packed(handle);
    kron::kron_pack(shape, factor(a), factor(b), packed.mutable_data_ptr(), torch_executor());
    return packed;
}

Tensor kron_mm_norm(const Tensor& x_any, const Tensor& a, const Tensor& b, std::optional<Tensor> bias,
                    const Tensor& residual, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                    const std::optional<Tensor>& packed) {
    kron::ForwardArgs args{};
    args.shape = checked_shape(x_any, a, b, false);
    const int64_t m = args.shape.m1 * args.shape.m2;
    const Norm norm(x_any, m, residual, norm_weight, norm_bias, eps);
    Tensor y = empty_rows(x_any, m);
    kron::Projection only = projection(args.shape, x_any, a, b, bias, packed, y.mutable_data_ptr());
    if (args.shape.tokens == 0) return y;
    args.norm = norm.args();
    run_product(args, only, x_any);
    return y;
}

// The second pair takes what the first gives.
kron::Shape checked_second(const kron::Shape& first, const Tensor& x, const Tensor& a2, const Tensor& b2) {
    const auto a_size = stack_sizes(a2, false), b_size = stack_sizes(b2, false);
    if (!a_size) fail_shape("a2", "(S, m1, n1) with no empty dimension", a2);
    if (!b_size || (*b_size)[0] != (*a_size)[0]) fail_shape("b2", "(S, m2, n2) with as many terms as a2", b2);
    const int64_t middle = first.m1 * first.m2;
    if ((*a_size)[2] * (*b_size)[2] != middle)
        fail("a2, b2", "n1 * n2 = " + text(middle) + ", what the first pair gives",
             "shapes " + shape_text(a2) + " and " + shape_text(b2));
    check_dtype("a2", a2, dtype_code(x));
    check_dtype("b2", b2, dtype_code(x));
    return {first.tokens, (*a_size)[0], (*a_size)[1], (*a_size)[2], (*b_size)[1], (*b_size)[2], first.dtype};
}

Tensor kron_ffn(const Tensor& x_any, const Tensor& a1, const Tensor& b1, std::optional<Tensor> bias1, const Tensor& a2,
                const Tensor& b2, std::optional<Tensor> bias2, int64_t activation,
                const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight,
                const std::optional<Tensor>& norm_bias, double eps, const std::optional<Tensor>& packed1,
                const std::optional<Tensor>& packed2) {
    kron::FfnArgs args{};
    args.first = checked_shape(x_any, a1, b1, false);
    args.second = checked_second(args.first, x_any, a2, b2);
    args.activation = checked_activation(activation);
    const int64_t m = args.second.m1 * args.second.m2;
    std::optional<Norm> norm;
    if (residual) {
        if (!norm_weight || !norm_bias) fail("norm_weight, norm_bias", "both with a residual", "none");
        norm.emplace(x_any, m, *residual, *norm_weight, *norm_bias, eps);
        args.norm = norm->args();
    }
    Tensor y = empty_rows(x_any, m);
    args.w1 = projection(args.first, x_any, a1, b1, bias1, packed1, nullptr);
    args.w2 = projection(args.second, x_any, a2, b2, bias2, packed2, y.mutable_data_ptr());
    if (args.first.tokens == 0) return y;
    const Rows x = rows_of(x_any);
    args.x = x.data();
    args.x_stride = x.stride;
    kron::kron_ffn_forward(args, torch_executor());
    return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients kron_ffn_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& a1, const Tensor& b1,
                            std::optional<Tensor> bias1, const Tensor& a2, const Tensor& b2, int64_t activation,
                            int64_t needs) {
    kron::FfnBackwardArgs args{};
    args.first = checked_shape(x_any, a1, b1, false);
    args.second = checked_second(args.first, x_any, a2, b2);
    args.activation = checked_activation(activation);
    const kron::Shape &f = args.first, &s = args.second;
    check_like("grad", grad_any, x_any, s.m1 * s.m2, "");
    if (bias1) {
        bias1 = checked_vector("bias1", "(m1 * m2,)", *bias1, f.m1 * f.m2, x_any);
        args.bias1 = bias1->const_data_ptr();
    }
    const auto output = [&](int bit, std::initializer_list<int64_t> sizes, void*& place) {
        const int64_t none = 0;
        if (!(needs >> bit & 1)) return empty(1, &none, x_any);
        Tensor tensor = empty(static_cast<int64_t>(sizes.size()), sizes.begin(), x_any);
        place = tensor.mutable_data_ptr();
        return tensor;
    };
    const int64_t none = 0;
    Tensor dx = needs & 1 ? empty_rows(x_any, f.n1 * f.n2) : empty(1, &none, x_any);
    if (needs & 1) args.dx = dx.mutable_data_ptr();
    Gradients gradients{dx,
                        output(1, {f.terms, f.m1, f.n1}, args.da1),
                        output(2, {f.terms, f.m2, f.n2}, args.db1),
                        output(3, {f.m1 * f.m2}, args.dbias1),
                        output(4, {s.terms, s.m1, s.n1}, args.da2),
                        output(5, {s.terms, s.m2, s.n2}, args.db2),
                        output(6, {s.m1 * s.m2}, args.dbias2)};
    if (f.tokens == 0) {
        std::apply([](const auto&... each) { (zero(each), ...); }, gradients);
        return gradients;
    }
    const Rows grad = rows_of(grad_any), x = rows_of(x_any);
    args.grad = grad.data();
    args.grad_stride = grad.stride;
    args.x = x.data();
    args.x_stride = x.stride;
    args.a1 = factor(a1), args.b1 = factor(b1), args.a2 = factor(a2), args.b2 = factor(b2);
    kron::kron_ffn_backward(args, torch_executor());
    return gradients;
}

bool same_shape(const kron::Shape& one, const kron::Shape& other) {
    return one.terms == other.terms && one.m1 == other.m1 && one.n1 == other.n1 && one.m2 == other.m2 &&
           one.n2 == other.n2;
}

std::vector<Tensor> kron_qkv(const Tensor& x_any, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                             const std::vector<Tensor>& bias, const std::vector<Tensor>& packed) {
    const size_t count = a.size();
    if (count == 0 || b.size() != count || (!bias.empty() && bias.size() != count) ||
        (!packed.empty() && packed.size() != count))
        fail("a, b, bias, packed", "as many of each",
             std::to_string(count) + ", " + std::to_string(b.size()) + ", " + std::to_string(bias.size()) + " and " +
                 std::to_string(packed.size()));
    std::vector<kron::Shape> shapes;
    std::vector<Tensor> outputs;
    std::vector<std::optional<Tensor>> biases(count);
    std::vector<kron::Projection> projections;
    for (size_t i = 0; i < count; ++i) {
        shapes.push_back(checked_shape(x_any, a[i], b[i], false));
        outputs.push_back(empty_rows(x_any, shapes[i].m1 * shapes[i].m2));
        if (!bias.empty()) biases[i] = bias[i];
        projections.push_back(projection(shapes[i], x_any, a[i], b[i], biases[i],
                                         packed.empty() ? std::nullopt : std::optional<Tensor>(packed[i]),
                                         outputs[i].mutable_data_ptr()));
    }
    if (shapes[0].tokens == 0) return outputs;
    const Rows x = rows_of(x_any);
    // Neighbours of one shape share the reading of x.
    for (size_t first = 0, next; first < count; first = next) {
        next = first + 1;
        while (next < count && next - first < kron::kMostProjections && same_shape(shapes[first], shapes[next])) ++next;
        kron::kron_mm_forward({shapes[first], x.data(), x.stride, static_cast<int64_t>(next - first),
                               projections.data() + first, kron::Activation::none, kron::NormArgs{}},
                              torch_executor());
    }
    return outputs;
}

// Indices broadcast to `sizes`, each in [0, rows), as contiguous int64.
std::vector<int64_t> checked_indices(const char* argument, const Tensor& ids, const std::vector<int64_t>& sizes,
                                     int64_t rows) {
    const bool wide = ids.scalar_type() == ScalarType::Long;
    if (!wide && ids.scalar_type() != ScalarType::Int) fail(argument, "dtype int64 or int32", "another dtype");
    const auto own = ids.sizes(), own_strides = ids.strides();
    const size_t missing = sizes.size() - std::min(own.size(), sizes.size());
    std::vector<int64_t> strides(sizes.size(), 0);
    for (size_t d = missing; d < sizes.size(); ++d) {
        if (own[d - missing] != 1 && own[d - missing] != sizes[d])
            fail_shape(argument, "a shape that broadcasts to that of ids", ids);
        strides[d] = own[d - missing] == 1 ? 0 : own_strides[d - missing];
    }
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    std::vector<int64_t> result(static_cast<size_t>(count)), position(sizes.size(), 0);
    int64_t offset = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t id = wide ? static_cast<const int64_t*>(ids.const_data_ptr())[offset]
                                : static_cast<const int32_t*>(ids.const_data_ptr())[offset];
        if (id < 0 || id >= rows)
            throw std::out_of_range(std::string(argument) + ": expected indices in [0, " + text(rows) + "), got " +
                                    text(id));
        result[static_cast<size_t>(i)] = id;
        for (size_t d = sizes.size(); d-- > 0;) {
            offset += strides[d];
            if (++position[d] < sizes[d]) break;
            offset -= strides[d] * sizes[d];
            position[d] = 0;
        }
    }
    return result;
}

Tensor kron_embedding(const Tensor& ids, const Tensor& a, const Tensor& b, const std::optional<Tensor>& position_ids,
                      const std::optional<Tensor>& position_weight, const std::optional<Tensor>& type_ids,
                      const std::optional<Tensor>& type_weight, const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& norm_bias, double eps) {
    const auto a_size = stack_sizes(a, false), b_size = stack_sizes(b, false);
    if (!a_size) fail_shape("a", "(S, V, p) with no empty dimension", a);
    if (!b_size || (*b_size)[0] != (*a_size)[0] || (*b_size)[1] != 1)
        fail_shape("b", "(S, 1, k) with as many terms as a", b);
    check_dtype("b", b, dtype_code(a));
    kron::EmbeddingArgs args{};
    args.terms = (*a_size)[0], args.rows = (*a_size)[1], args.p = (*a_size)[2], args.k = (*b_size)[2];
    args.dtype = kernel_dtype(a);
    args.a = factor(a), args.b = factor(b);
    const int64_t m = args.p * args.k;
    const auto id_sizes = ids.sizes();
    const std::vector<int64_t> sizes(id_sizes.begin(), id_sizes.end());
    std::array<int64_t, kMaxDimensions> out_sizes;
    if (sizes.size() + 1 > kMaxDimensions) fail_shape("ids", "at most 63 dimensions", ids);
    std::copy(sizes.begin(), sizes.end(), out_sizes.begin());
    out_sizes[sizes.size()] = m;
    Tensor y = empty(static_cast<int64_t>(sizes.size()) + 1, out_sizes.data(), a);

    const std::vector<int64_t> tokens = checked_indices("ids", ids, sizes, args.rows);
    std::vector<int64_t> added_ids[2];
    std::optional<Tensor> tables[2];
    const auto add = [&](int i, const char* index_name, const char* table_name, const std::optional<Tensor>& index,
                         const std::optional<Tensor>& table) {
        if (index.has_value() != table.has_value()) fail(index_name, "both indices and a table, or neither", "one");
        if (!index) return;
        if (table->dim() != 2 || table->size(1) != m) fail_shape(table_name, "(rows, " + text(m) + ")", *table);
        check_dtype(table_name, *table, dtype_code(a));
        tables[i] = torch::stable::contiguous(*table);
        added_ids[i] = checked_indices(index_name, *index, sizes, table->size(0));
        args.added[i] = {added_ids[i].data(), tables[i]->const_data_ptr(), table->size(0)};
    };
    add(0, "position_ids", "position_weight", position_ids, position_weight);
    add(1, "type_ids", "type_weight", type_ids, type_weight);
    if (norm_weight.has_value() != norm_bias.has_value())
        fail("norm_bias", "both norm_weight and norm_bias or neither", "one");
    std::optional<Tensor> weight, bias;
    if (norm_weight) {
        weight = checked_vector("norm_weight", "(p * k,)", *norm_weight, m, a);
        bias = checked_vector("norm_bias", "(p * k,)", *norm_bias, m, a);
        args.norm_weight = weight->const_data_ptr(), args.norm_bias = bias->const_data_ptr();
    }
    args.tokens = static_cast<int64_t>(tokens.size());
    args.ids = tokens.data();
    args.eps = eps;
    args.y = y.mutable_data_ptr();
    kron::kron_embedding(args, torch_executor());
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(KRON_KERNELS_OPS, CPU, m) {
    m.impl("kron_pack", TORCH_BOX(&kron_pack));
    m.impl("kron_mm_norm", TORCH_BOX(&kron_mm_norm));
    m.impl("kron_ffn", TORCH_BOX(&kron_ffn));
    m.impl("kron_ffn_backward", TORCH_BOX(&kron_ffn_backward));
    m.impl("kron_qkv", TORCH_BOX(&kron_qkv));
    m.impl("kron_embedding", TORCH_BOX(&kron_embedding));
}
