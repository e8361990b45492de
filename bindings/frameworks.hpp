// The frameworks whose arrays octavo takes: which one an object is of, and what octavo asks of each.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings/dlpack.hpp"
#include "bindings/own_array.hpp"
#include "octavo/types.hpp"

namespace octavo::python {

// `own` is octavo's DLPackArray. `other` is whatever has `__dlpack__` and `__dlpack_device__`: results beside it are
// OwnArrays, which its framework takes over where octavo knows that framework's function for it.
enum class Framework : std::uint8_t { numpy, torch, cupy, own, other };

// What octavo makes of the objects of one type.
struct TypeFacts {
    std::optional<Framework> framework;  // nothing: no array
    bool plain = false;                  // its memory is what it seems: no mask, no FakeTensor, no DTensor
};

// A type is of NumPy, PyTorch or CuPy if it is derived from that framework's own class, whatever it calls itself.
[[nodiscard]] TypeFacts facts_of(py::handle object);

// A function of a library that the process has loaded, or null.
[[nodiscard]] void* symbol_of(const char* library, const char* name);

// "module.Class" of the object, for messages.
[[nodiscard]] std::string type_name(py::handle object);

// The result of a call of the C API, checked.
[[nodiscard]] py::object checked(PyObject* result);

// Python's integers of a shape.
[[nodiscard]] py::tuple to_tuple(const Shape& shape);

// NumPy's dtype as octavo's; of ml_dtypes its bfloat16. Nothing where octavo has no such dtype.
[[nodiscard]] std::optional<DType> dtype_of(const py::dtype& dtype);

// PyTorch's functions for C, null before version 2.10: its tensors then go through `__dlpack__`.
[[nodiscard]] const DLPackExchangeAPI* torch_exchange();

// What DLPack does not tell of a tensor.
// Whether autograd, backward or forward, would record an operation on a tensor and another one, or None.
[[nodiscard]] bool torch_records(py::handle tensor, py::handle other = py::none());
[[nodiscard]] bool torch_requires_grad(py::handle tensor);
[[nodiscard]] bool torch_is_negated(py::handle tensor);  // the memory holds the negation of its values
[[nodiscard]] bool torch_is_dense(py::handle tensor);

// Whether an operation on `tensor`, apart from its gradient, is nothing but its computation: nobody traces, transforms,
// intercepts or casts it. Below autograd the dispatcher has seen to some of these. It may still have no memory of its
// own (nested, or on the meta device), which reading it tells.
[[nodiscard]] bool torch_is_plain(py::handle tensor);
[[nodiscard]] bool torch_is_plain_below_autograd(py::handle tensor);

// How often a tensor has been written to, as far as PyTorch counts: it does not for one made in inference mode.
[[nodiscard]] std::optional<std::int64_t> torch_version(py::handle tensor);

// That, and the memory that the tensor has; nothing where it has none, either.
struct TorchMark {
    std::int64_t version = 0;
    const void* data = nullptr;

    friend bool operator==(const TorchMark&, const TorchMark&) = default;
};
[[nodiscard]] std::optional<TorchMark> torch_mark(py::handle tensor);

// Whether inference mode is on.
[[nodiscard]] bool torch_is_inferring();

// Whether the call of a module comes to nothing but `forward` of its class: nobody has hooked, compiled or replaced it,
// nor nn.Module's own call.
[[nodiscard]] bool torch_calls_forward_alone(py::handle module);

// What a linear layer has as parameters, the bias perhaps None; nothing where one of the two is something else.
struct TorchParameters {
    py::object weight;
    py::object bias;
};
[[nodiscard]] std::optional<TorchParameters> torch_parameters(py::handle layer);

// A new, contiguous, uninitialized array on the device of `like`, of its framework or an OwnArray.
[[nodiscard]] py::object allocate(Framework framework, py::handle like, Device device, const Shape& shape,
                                  DType like_dtype, DType dtype);

// A MemoryPointer of CuPy's current allocator, on CuPy's current stream.
[[nodiscard]] py::object cupy_memory(Device device, std::size_t size);

// An OwnArray as an array of the framework of `like`; itself where that has no function for it.
[[nodiscard]] py::object handed_over(const py::object& own, py::handle like);

// The stream that the framework orders its work on; none for the CPU.
[[nodiscard]] Stream stream_of(Framework framework, Device device);

// The number of threads that a framework is set to use, for octavo::ThreadLimit; 0 where it has no such setting.
[[nodiscard]] int threads_of(Framework framework);

}  // namespace octavo::python
