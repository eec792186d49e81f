// Introspection of the core, and its kernels on raw numpy buffers, for tests: what no torch op can show, such as an
// output buffer filled with NaN beforehand, or the scratch a call asked for. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kron/problem.h"

namespace py = pybind11;

namespace {

constexpr kron::Isa kIsas[] = {kron::Isa::portable, kron::Isa::neon, kron::Isa::avx2, kron::Isa::avx512,
                               kron::Isa::amx};

kron::Isa isa_of(const std::string& name) {
    for (kron::Isa isa : kIsas) {
        if (name == kron::isa_name(isa)) return isa;
    }
    throw std::invalid_argument("cap: expected the name of an instruction-set level, got '" + name + "'");
}

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (kron::Isa isa : kIsas) {
        if (kron::isa_compiled(isa)) names.emplace_back(kron::isa_name(isa));
    }
    return names;
}

// numpy has no bfloat16: 16-bit types come as unsigned integers, so the dtype is named.
kron::DType dtype_of(const std::string& name) {
    if (name == "float32") return kron::DType::f32;
    if (name == "float64") return kron::DType::f64;
    if (name == "bfloat16") return kron::DType::bf16;
    if (name == "float16") return kron::DType::f16;
    throw std::invalid_argument("dtype: expected float32, float64, bfloat16 or float16, got '" + name + "'");
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

kron::Shape shape_of(const std::string& dtype, const py::array& x, const py::array& a, const py::array& b) {
    require(x.ndim() == 2 && a.ndim() == 3 && b.ndim() == 3, "expected x (T, n), a (S, m1, n1), b (S, m2, n2)");
    const kron::Shape s{x.shape(0), a.shape(0), a.shape(1), a.shape(2), b.shape(1), b.shape(2), dtype_of(dtype)};
    require(b.shape(0) == s.terms && x.shape(1) == s.n1 * s.n2, "expected factors of equal terms and x (T, n1 * n2)");
    for (const py::array* array : {&x, &a, &b}) {
        require(array->itemsize() == kron::size_of(s.dtype), "expected items of the size of dtype");
    }
    return s;
}

int64_t row_stride(const py::array& matrix) {
    require(matrix.strides(1) == matrix.itemsize(), "expected contiguous rows");
    return matrix.strides(0) / matrix.itemsize();
}

kron::Factor factor(const py::array& stack) {
    const py::ssize_t size = stack.itemsize();
    return {stack.data(), stack.strides(0) / size, stack.strides(1) / size, stack.strides(2) / size};
}

void* output(std::optional<py::array>& array, const kron::Shape& s, int64_t items) {
    if (!array) return nullptr;
    require(
        (array->flags() & py::array::c_style) && array->itemsize() == kron::size_of(s.dtype) && array->size() == items,
        "expected a contiguous output of the size of the result");
    return array->mutable_data();
}

// Task indices in either order: a kernel may not depend on it.
void run_forwards(int64_t count, void (*task)(void*, int64_t), void* arg) {
    for (int64_t i = 0; i < count; ++i) task(arg, i);
}

void run_backwards(int64_t count, void (*task)(void*, int64_t), void* arg) {
    for (int64_t i = count; i-- > 0;) task(arg, i);
}

kron::Executor serial(int threads, bool reverse) {
    return {threads, reverse ? run_backwards : run_forwards};
}

void forward(const std::string& dtype, const py::array& x, const py::array& a, const py::array& b,
             std::optional<py::array> bias, int activation, std::optional<py::array> y, int threads, bool reverse) {
    kron::ForwardArgs args{};
    args.shape = shape_of(dtype, x, a, b);
    const int64_t m = args.shape.m1 * args.shape.m2;
    args.x = x.data();
    args.x_stride = row_stride(x);
    const kron::Projection only{factor(a), factor(b), output(bias, args.shape, m),
                                nullptr,   0,         output(y, args.shape, args.shape.tokens * m)};
    args.count = 1;
    args.projections = &only;
    args.activation = static_cast<kron::Activation>(activation);
    require(only.y != nullptr, "y: expected an array, got None");
    kron::kron_matmul_forward(args, serial(threads, reverse));
}

void backward(const std::string& dtype, const py::array& grad, const py::array& x, const py::array& a,
              const py::array& b, std::optional<py::array> dx, std::optional<py::array> da, std::optional<py::array> db,
              std::optional<py::array> dbias, int threads, bool reverse) {
    kron::BackwardArgs args{};
    args.shape = shape_of(dtype, x, a, b);
    const kron::Shape& s = args.shape;
    require(grad.ndim() == 2 && grad.shape(0) == s.tokens && grad.shape(1) == s.m1 * s.m2,
            "expected grad (T, m1 * m2)");
    args.grad = grad.data();
    args.grad_stride = row_stride(grad);
    args.x = x.data();
    args.x_stride = row_stride(x);
    args.a = factor(a);
    args.b = factor(b);
    args.dx = output(dx, s, s.tokens * s.n1 * s.n2);
    args.da = output(da, s, s.terms * s.m1 * s.n1);
    args.db = output(db, s, s.terms * s.m2 * s.n2);
    args.dbias = output(dbias, s, s.m1 * s.m2);
    kron::kron_matmul_backward(args, serial(threads, reverse));
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
    m.def("detected_isa", [] { return kron::isa_name(kron::detected_isa()); });
    m.def("active_isa", [] { return kron::isa_name(kron::active_isa()); });
    m.def("set_isa_cap", [](const std::string& cap) { kron::set_isa_cap(isa_of(cap)); }, py::arg("cap"));
    m.def("compiled_isas", &compiled_isas);
    m.def("last_scratch_bytes", &kron::last_scratch_bytes);
    m.def("forward", &forward, py::arg("dtype"), py::arg("x"), py::arg("a"), py::arg("b"), py::arg("bias"),
          py::arg("activation"), py::arg("y"), py::arg("threads") = 1, py::arg("reverse") = false);
    m.def("backward", &backward, py::arg("dtype"), py::arg("grad"), py::arg("x"), py::arg("a"), py::arg("b"),
          py::arg("dx"), py::arg("da"), py::arg("db"), py::arg("dbias"), py::arg("threads") = 1,
          py::arg("reverse") = false);
}
