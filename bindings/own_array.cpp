#include "bindings/own_array.hpp"

#include <cstdint>
#include <new>
#include <string>

#include "bindings/dlpack.hpp"

namespace octavo::python {
namespace {

constexpr std::align_val_t alignment{64};

std::int64_t bytes_of(const Shape& shape, DType dtype) {
    std::int64_t bytes = size_of(dtype);
    for (const auto extent : shape) {
        if (__builtin_mul_overflow(bytes, extent, &bytes)) throw std::bad_alloc();
    }
    return bytes;
}

DLDataType dlpack_of(DType dtype) {
    const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
    switch (dtype) {
        case DType::i8:
        case DType::i32: return {0, bits, 1};
        case DType::f32:
        case DType::f16: return {2, bits, 1};
        case DType::bf16: return {4, bits, 1};
    }
    return {};
}

// What a capsule hands out: a tensor of DLPack and the array that it keeps alive.
template <class Managed>
struct Handed {
    Managed tensor{};
    std::shared_ptr<OwnArray> array;
};

template <class Managed>
py::object capsule_of(std::shared_ptr<OwnArray> array, const char* name) {
    auto handed = std::make_unique<Handed<Managed>>();
    Managed& tensor = handed->tensor;
    tensor.dl_tensor = {.data = array->data(),
                        .device = {1, 0},
                        .ndim = static_cast<std::int32_t>(array->shape().size()),
                        .dtype = dlpack_of(array->dtype()),
                        .shape = const_cast<std::int64_t*>(array->shape().begin()),      // NOLINT: DLPack has no const
                        .strides = const_cast<std::int64_t*>(array->strides().begin()),  // NOLINT
                        .byte_offset = 0};
    tensor.manager_ctx = handed.get();
    tensor.deleter = [](Managed* self) { delete static_cast<Handed<Managed>*>(self->manager_ctx); };
    if constexpr (requires { tensor.version; }) tensor.version = {1, 0};
    handed->array = std::move(array);
    PyObject* const capsule = PyCapsule_New(&tensor, name, [](PyObject* self) {
        const char* const held = PyCapsule_GetName(self);
        if (held == nullptr || std::string(held).starts_with("used_")) return;
        auto* const unused = static_cast<Managed*>(PyCapsule_GetPointer(self, held));
        if (unused != nullptr) unused->deleter(unused);
    });
    if (capsule == nullptr) throw py::error_already_set();
    static_cast<void>(handed.release());
    return py::reinterpret_steal<py::object>(capsule);
}

py::tuple shape_of(const OwnArray& array) {
    py::tuple shape(array.shape().size());
    for (std::size_t i = 0; i < shape.size(); ++i) shape[i] = array.shape()[i];
    return shape;
}

// `__dlpack__` of the array API standard. There is no stream to order work on, and nothing to copy to another device.
py::object dlpack(OwnArray& array, const py::object& /*stream*/, const py::object& max_version,
                  const py::object& dl_device, const py::object& copy) {
    if (!dl_device.is_none() && !dl_device.equal(py::make_tuple(1, 0))) {
        PyErr_SetString(PyExc_BufferError, "__dlpack__: dl_device: expected the CPU, (1, 0)");
        throw py::error_already_set();
    }
    if (copy.ptr() == Py_True) {
        PyErr_SetString(PyExc_BufferError, "__dlpack__: copy: expected None or False");
        throw py::error_already_set();
    }
    return array.capsule(!max_version.is_none() && py::object(max_version[py::int_(0)]).cast<int>() >= 1);
}

// NumPy's `__array__`: without it NumPy would make an array of one object.
py::object numpy_array(const py::object& self, const py::object& dtype, const py::object& copy) {
    if (self.cast<const OwnArray&>().dtype() == DType::bf16) {
        throw py::type_error("DLPackArray: expected a dtype that NumPy has, got bfloat16");
    }
    const py::module_ numpy = py::module_::import("numpy");
    return numpy.attr("array")(numpy.attr("from_dlpack")(self), dtype, py::arg("copy") = copy);
}

}  // namespace

void OwnArray::Free::operator()(void* data) const noexcept { ::operator delete(data, alignment); }

OwnArray::OwnArray(const Shape& shape, DType dtype)
    : shape_(shape),
      strides_(shape),
      dtype_(dtype),
      bytes_(bytes_of(shape, dtype)),
      data_(::operator new(static_cast<std::size_t>(bytes_), alignment)) {
    std::int64_t stride = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
        strides_[i] = stride;
        stride *= shape_[i];
    }
}

py::object OwnArray::capsule(bool versioned) {
    if (versioned) return capsule_of<DLManagedTensorVersioned>(shared_from_this(), "dltensor_versioned");
    return capsule_of<DLManagedTensor>(shared_from_this(), "dltensor");
}

void define_own_array(py::module_& module) {
    py::class_<OwnArray, std::shared_ptr<OwnArray>> type(module, "DLPackArray", py::is_final());
    type.attr("__module__") = "octavo";
    type.def("__dlpack__", &dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
             py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
        .def("__array__", &numpy_array, py::arg("dtype") = py::none(), py::arg("copy") = py::none())
        .def("__dlpack_device__", [](const OwnArray&) { return py::make_tuple(1, 0); })
        .def_property_readonly("shape", &shape_of)
        .def_property_readonly("dtype", [](const OwnArray& array) { return name_of(array.dtype()); })
        .def_property_readonly("device", [](const OwnArray&) { return "cpu"; })
        .def_property_readonly("nbytes", &OwnArray::bytes)
        .def("__len__", [](const OwnArray& array) { return array.shape()[0]; })
        .def("__repr__", [](const OwnArray& array) {
            return "<octavo.DLPackArray of shape " + py::str(shape_of(array)).cast<std::string>() + ", " +
                   name_of(array.dtype()) + ": give it to a framework's from_dlpack>";
        });
}

}  // namespace octavo::python
