// Several products of one x on given kernels.
#pragma once

#include <vector>

#include "matmul.h"

namespace [[gnu::visibility("hidden")]] kron_torch {

inline bool same_shape(const kron::Shape& one, const kron::Shape& other) {
    return one.terms == other.terms && one.m1 == other.m1 && one.n1 == other.n1 && one.m2 == other.m2 &&
           one.n2 == other.n2;
}

template <class Kernels>
std::vector<Tensor> kron_qkv(const Kernels& kernels, const Tensor& x_any, const std::vector<Tensor>& a,
                             const std::vector<Tensor>& b, const std::vector<Tensor>& bias,
                             const std::vector<Tensor>& packed) {
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
        kernels.matmul({shapes[first], x.data(), x.stride, static_cast<int64_t>(next - first),
                        projections.data() + first, kron::Activation::none, kron::NormArgs{}});
    }
    return outputs;
}

}  // namespace kron_torch
