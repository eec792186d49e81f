// The op of the embedding on given kernels. `kernels.indices` checks indices as far as it can read them and gives
// them as contiguous int64, broadcast, in something that owns them.
#pragma once

#include <vector>

#include "operands.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

// Strides that broadcast indices to `sizes`, once their dtype fits.
inline std::vector<int64_t> index_strides(const char* argument, const Tensor& ids, const std::vector<int64_t>& sizes) {
    if (ids.scalar_type() != ScalarType::Long && ids.scalar_type() != ScalarType::Int)
        fail(argument, "dtype int64 or int32", "another dtype");
    const auto own = ids.sizes(), own_strides = ids.strides();
    const size_t missing = sizes.size() - std::min(own.size(), sizes.size());
    if (own.size() > sizes.size()) fail_shape(argument, "a shape that broadcasts to that of ids", ids);
    std::vector<int64_t> strides(sizes.size(), 0);
    for (size_t d = missing; d < sizes.size(); ++d) {
        if (own[d - missing] != 1 && own[d - missing] != sizes[d])
            fail_shape(argument, "a shape that broadcasts to that of ids", ids);
        strides[d] = own[d - missing] == 1 ? 0 : own_strides[d - missing];
    }
    return strides;
}

// Sizes and factors of a table sum_s A_s (x) B_s, in what describes a call of its kernels.
template <class Args>
Args checked_table(const Tensor& a, const Tensor& b) {
    const auto a_size = stack_sizes(a, false), b_size = stack_sizes(b, false);
    if (!a_size) fail_shape("a", "(S, V, p) with no empty dimension", a);
    if (!b_size || (*b_size)[0] != (*a_size)[0] || (*b_size)[1] != 1)
        fail_shape("b", "(S, 1, k) with as many terms as a", b);
    check_dtype("b", b, a);
    Args args{};
    args.terms = (*a_size)[0], args.rows = (*a_size)[1], args.p = (*a_size)[2], args.k = (*b_size)[2];
    args.dtype = kernel_dtype(a);
    args.a = factor(a), args.b = factor(b);
    return args;
}

template <class Kernels>
Tensor kron_embedding(const Kernels& kernels, const Tensor& ids, const Tensor& a, const Tensor& b,
                      const std::optional<Tensor>& position_ids, const std::optional<Tensor>& position_weight,
                      const std::optional<Tensor>& type_ids, const std::optional<Tensor>& type_weight,
                      const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
    kron::EmbeddingArgs args = checked_table<kron::EmbeddingArgs>(a, b);
    const int64_t m = args.p * args.k;
    const auto id_sizes = ids.sizes();
    const std::vector<int64_t> sizes(id_sizes.begin(), id_sizes.end());
    std::array<int64_t, kMaxDimensions> out_sizes;
    if (sizes.size() + 1 > kMaxDimensions) fail_shape("ids", "at most 63 dimensions", ids);
    std::copy(sizes.begin(), sizes.end(), out_sizes.begin());
    out_sizes[sizes.size()] = m;
    Tensor y = empty(static_cast<int64_t>(sizes.size()) + 1, out_sizes.data(), a);

    const auto tokens = kernels.indices("ids", ids, sizes, args.rows, a);
    std::optional<decltype(kernels.indices("ids", ids, sizes, args.rows, a))> added_ids[2];
    std::optional<Tensor> tables[2];
    const auto add = [&](int i, const char* index_name, const char* table_name, const std::optional<Tensor>& index,
                         const std::optional<Tensor>& table) {
        if (index.has_value() != table.has_value()) fail(index_name, "both indices and a table, or neither", "one");
        if (!index) return;
        if (table->dim() != 2 || table->size(1) != m) fail_shape(table_name, "(rows, " + text(m) + ")", *table);
        check_dtype(table_name, *table, a);
        tables[i] = torch::stable::contiguous(*table);
        added_ids[i] = kernels.indices(index_name, *index, sizes, table->size(0), a);
        args.added[i] = {added_ids[i]->data(), tables[i]->const_data_ptr(), table->size(0)};
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
    args.tokens = 1;
    for (const int64_t size : sizes) args.tokens *= size;
    args.ids = tokens.data();
    args.eps = eps;
    args.y = y.mutable_data_ptr();
    kernels.embedding(args);
    return y;
}

}  // namespace kron_torch
