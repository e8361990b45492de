#include "bindings/tensor.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <string_view>

#include "bindings/torch_symbols.hpp"

namespace octavo::python {
namespace {

constexpr std::uint64_t read_only_flag = 1;

// Objects of the frameworks that are looked up once. A framework is imported by whoever made the array, so looking one
// up costs no import of our own. They are never destroyed: the interpreter may be gone before they would be.
struct TorchNames {
    py::object torch = py::module_::import("torch");
    py::object tensor = torch.attr("Tensor");
    py::object dispatch = tensor.attr("__torch_dispatch__");
    py::object strided = torch.attr("strided");
    py::object is_grad_enabled = torch.attr("is_grad_enabled");
    py::object get_num_threads = torch.attr("get_num_threads");
    py::object new_empty = tensor.attr("new_empty");  // unbound: of any tensor
    py::object dtype_keyword = py::make_tuple(interned("dtype"));
    py::object requires_grad = interned("requires_grad");
    py::object is_neg = interned("is_neg");
    // In the order of octavo::DType.
    std::array<py::object, 5> dtypes{torch.attr("float32"), torch.attr("float16"), torch.attr("bfloat16"),
                                     torch.attr("int8"), torch.attr("int32")};
    const DLPackExchangeAPI* exchange = find_exchange(tensor);
    TorchSymbols symbols = find_torch_symbols();
    bool has_handle = symbols.can_read_tensors() && objects_hold_handles(torch);

    static py::object interned(const char* text) {
        return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
    }

    // Torch before 2.10 has none; its arrays go through `__dlpack__`.
    static const DLPackExchangeAPI* find_exchange(const py::object& tensor_type) {
        if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
        const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
        const auto* api =
            static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr) throw py::error_already_set();
        return api->header.version.major == 1 ? api : nullptr;
    }

    // Whether the Python object of a tensor has its at::Tensor, which is the address of a TensorImpl, right behind the
    // header. So it is in PyTorch 2.13, but nothing promises it: one tensor is looked at before the place is relied on,
    // as `_cdata` tells the address that must be there.
    static bool objects_hold_handles(const py::object& torch) {
        const py::object sample = torch.attr("zeros")(1, py::arg("device") = "cpu");
        const auto size = static_cast<std::size_t>(Py_TYPE(sample.ptr())->tp_basicsize);
        if (size < sizeof(PyObject) + sizeof(std::uintptr_t) || !py::hasattr(sample, "_cdata")) return false;
        return reinterpret_cast<std::uintptr_t>(implementation_of(sample)) ==
               sample.attr("_cdata").cast<std::uintptr_t>();
    }

    static const void* handle_of(py::handle tensor) {
        return reinterpret_cast<const char*>(tensor.ptr()) + sizeof(PyObject);
    }

    static const void* implementation_of(py::handle tensor) {
        const void* implementation = nullptr;
        std::memcpy(static_cast<void*>(&implementation), handle_of(tensor), sizeof implementation);
        return implementation;
    }
};

struct NumpyNames {
    py::module_ numpy = py::module_::import("numpy");
    py::object masked_array = numpy.attr("ma").attr("MaskedArray");
    py::object empty = numpy.attr("empty");
    // In the order of octavo::DType; NumPy has no bfloat16.
    std::array<py::object, 5> dtypes{numpy.attr("dtype")("float32"), numpy.attr("dtype")("float16"), py::none(),
                                     numpy.attr("dtype")("int8"), numpy.attr("dtype")("int32")};
};

struct CupyNames {
    py::module_ cupy = py::module_::import("cupy");
    py::object empty = cupy.attr("empty");
    py::object device = cupy.attr("cuda").attr("Device");
    py::object current_stream = cupy.attr("cuda").attr("get_current_stream");
    // In the order of octavo::DType; CuPy has no bfloat16.
    std::array<py::object, 5> dtypes{cupy.attr("dtype")("float32"), cupy.attr("dtype")("float16"), py::none(),
                                     cupy.attr("dtype")("int8"), cupy.attr("dtype")("int32")};
};

template <class Names>
const Names& names() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> storage;
    return storage.call_once_and_store_result([] { return Names(); }).get_stored();
}

std::string type_name(py::handle object) {
    const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    const auto module = py::str(type.attr("__module__")).cast<std::string>();
    const auto name = py::str(type.attr("__qualname__")).cast<std::string>();
    return module == "builtins" ? name : module + "." + name;
}

// What octavo makes of the objects of one type.
struct TypeFacts {
    std::optional<Framework> framework;  // nothing: no array of a known framework
    bool plain = false;                  // its memory is what it seems: no mask, no FakeTensor, no DTensor
};

// The module of the type or of a base of it tells the framework, without importing one that is not in use.
TypeFacts examine(py::handle type) {
    for (const py::handle base : py::tuple(type.attr("__mro__"))) {
        const auto module = py::str(base.attr("__module__")).cast<std::string>();
        const auto name = py::str(base.attr("__name__")).cast<std::string>();
        if (module == "numpy" && name == "ndarray") {
            const bool masked = PyObject_IsSubclass(type.ptr(), names<NumpyNames>().masked_array.ptr()) != 0;
            return {Framework::numpy, !masked};
        }
        if (module == "cupy" && name == "ndarray") return {Framework::cupy, true};
        if (module == "torch" && name == "Tensor") {
            const auto& torch = names<TorchNames>();
            return {Framework::torch, py::object(type.attr("__torch_dispatch__")).is(torch.dispatch)};
        }
    }
    return {};
}

// `examine`, remembered for the few types that a program uses. The types are kept alive, so that no other type can come
// to have the address of one of them. Entries are only ever added, so that readers need no lock.
TypeFacts facts_of(py::handle object) {
    struct Entry {
        PyTypeObject* type;
        TypeFacts facts;
    };
    static std::array<Entry, 64> entries;
    static std::atomic<std::size_t> count{0};
    static std::mutex adding;
    PyTypeObject* const type = Py_TYPE(object.ptr());
    const std::size_t known = count.load(std::memory_order_acquire);
    for (std::size_t i = 0; i < known; ++i) {
        if (entries[i].type == type) return entries[i].facts;
    }
    const TypeFacts facts = examine(reinterpret_cast<PyObject*>(type));
    const std::lock_guard lock(adding);
    const std::size_t next = count.load(std::memory_order_relaxed);
    if (next < entries.size()) {
        Py_INCREF(type);
        entries[next] = {type, facts};
        count.store(next + 1, std::memory_order_release);
    }
    return facts;
}

py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

bool is_true(const py::object& object) { return object.ptr() == Py_True; }

bool requires_grad(const TorchNames& torch, py::handle tensor) {
    if (torch.has_handle) return torch.symbols.requires_grad(TorchNames::implementation_of(tensor));
    return is_true(checked(PyObject_GetAttr(tensor.ptr(), torch.requires_grad.ptr())));
}

// Whether the values are the negation of what the memory holds, as those of `x.conj().imag` are: DLPack loses that bit.
bool has_negative_bit(const TorchNames& torch, py::handle tensor) {
    if (torch.has_handle) return torch.symbols.is_neg(TorchNames::handle_of(tensor));
    PyObject* const arguments[] = {tensor.ptr()};
    return is_true(checked(PyObject_VectorcallMethod(torch.is_neg.ptr(), arguments, 1, nullptr)));
}

bool grad_is_enabled(const TorchNames& torch) {
    if (torch.symbols.grad_mode_is_enabled != nullptr) return torch.symbols.grad_mode_is_enabled();
    return is_true(torch.is_grad_enabled());
}

// What a tensor is made of, for as long as the caller leaves it alone. Returns false, with Python's error set, where
// DLPack cannot describe it. The exchange does the same, but takes and drops a reference on the way.
bool describe(const TorchNames& torch, py::handle tensor, DLTensor& out) {
    if (torch.has_handle) {
        try {
            torch.symbols.to_dlpack(TorchNames::handle_of(tensor), &out);
            return true;
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return false;
        }
    }
    return torch.exchange->dltensor_from_py_object_no_sync(tensor.ptr(), &out) == 0;
}

std::optional<DType> dtype_from(const py::dtype& dtype) {
    constexpr int numpy_half = 23;                                                  // NPY_HALF
    if (dtype.byteorder() == '>' || dtype.byteorder() == '<') return std::nullopt;  // native is '=' or '|'
    const int number = dtype.normalized_num();
    if (number == py::dtype::num_of<float>()) return DType::f32;
    if (number == numpy_half) return DType::f16;
    if (number == py::dtype::num_of<std::int8_t>()) return DType::i8;
    if (number == py::dtype::num_of<std::int32_t>()) return DType::i32;
    return std::nullopt;
}

std::optional<DType> dtype_from(DLDataType dtype) {
    if (dtype.lanes != 1) return std::nullopt;
    switch (dtype.code) {
        case 0:
            return dtype.bits == 8    ? std::optional(DType::i8)
                   : dtype.bits == 32 ? std::optional(DType::i32)
                                      : std::nullopt;
        case 2:
            return dtype.bits == 32   ? std::optional(DType::f32)
                   : dtype.bits == 16 ? std::optional(DType::f16)
                                      : std::nullopt;
        case 4: return dtype.bits == 16 ? std::optional(DType::bf16) : std::nullopt;
        default: return std::nullopt;
    }
}

std::optional<Device> device_from(DLDevice device) {
    switch (device.device_type) {
        case 1:
        case 3: return Device{DeviceKind::cpu, 0};  // pinned memory is the CPU's too
        case 2: return Device{DeviceKind::cuda, device.device_id};
        default: return std::nullopt;
    }
}

py::tuple to_tuple(const Shape& shape) {
    py::tuple result(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) result[i] = py::int_(shape[i]);
    return result;
}

bool is_empty(const Shape& shape) { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

}  // namespace

void Array::Release::operator()(DLManagedTensorVersioned* tensor) const noexcept {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
}

void Array::Release::operator()(DLManagedTensor* tensor) const noexcept {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
}

void Array::refuse(const char* kind, const std::string& expected, const std::string& got) const {
    const std::string message =
        std::string(argument_.function) + ": " + argument_.name + ": expected " + expected + ", got " + got;
    if (std::string_view(kind) == "type") throw py::type_error(message);
    throw py::value_error(message);
}

Array::Array(py::handle object, Argument argument, Use use)
    : argument_(argument), object_(py::reinterpret_borrow<py::object>(object)) {
    const TypeFacts facts = facts_of(object);
    if (!facts.framework) refuse("type", "a NumPy array, a PyTorch tensor or a CuPy array", type_name(object));
    framework_ = *facts.framework;
    if (!facts.plain) {
        refuse("type", framework_ == Framework::numpy ? "an array without a mask" : "a plain torch.Tensor",
               type_name(object));
    }
    switch (framework_) {
        case Framework::numpy: import_numpy(use); break;
        case Framework::torch: import_torch(use); break;
        case Framework::cupy: import_cupy(use); break;
    }
}

// NumPy's arrays are read directly: their `__dlpack__` costs as much as a small product.
void Array::import_numpy(Use use) {
    const auto array = py::reinterpret_borrow<py::array>(object_);
    if (use == Use::write && !array.writeable()) refuse("value", "a writable array", "a read-only one");
    const auto dtype = dtype_from(array.dtype());
    if (!dtype) refuse_dtype();
    if (array.ndim() < 1) refuse("value", "an array of rank >= 1", "rank 0");
    dtype_ = *dtype;
    device_ = {};
    data_ = static_cast<char*>(const_cast<void*>(array.data()));  // NOLINT(cppcoreguidelines-pro-type-const-cast)
    const auto rank = static_cast<std::size_t>(array.ndim());
    shape_.reset(rank);
    strides_.reset(rank);
    const std::int64_t size = size_of(dtype_);
    for (std::size_t i = 0; i < rank; ++i) {
        shape_[i] = array.shape()[i];
        strides_[i] = array.strides()[i] / size;
        if (array.strides()[i] % size != 0 && shape_[i] > 1) {
            refuse("type", "an array whose strides are whole elements of " + std::to_string(size) + " bytes",
                   "a stride of " + std::to_string(array.strides()[i]) + " bytes");
        }
    }
}

void Array::import_torch(Use use) {
    const auto& torch = names<TorchNames>();
    const bool writes = use == Use::write;
    if ((writes || use == Use::differentiable) && grad_is_enabled(torch) && requires_grad(torch, object_)) {
        refuse("value", "a tensor outside autograd (use .detach(), torch.no_grad() or octavo.torch.Int8Linear)",
               "one that requires grad");
    }
    if (has_negative_bit(torch, object_)) {
        if (writes) refuse("value", "a tensor without the negative bit", "one with it");
        object_ = object_.attr("resolve_neg")();
    }
    if (torch.exchange == nullptr) {
        if (requires_grad(torch, object_)) object_ = object_.attr("detach")();  // `__dlpack__` refuses others
        return import_capsule(use);
    }
    if (use == Use::keep) {
        DLManagedTensorVersioned* tensor = nullptr;
        if (torch.exchange->managed_tensor_from_py_object_no_sync(object_.ptr(), &tensor) != 0) {
            refuse_conversion(py::error_already_set());
        }
        versioned_.reset(tensor);
        return read_header(tensor->dl_tensor);
    }
    DLTensor tensor{};
    if (!describe(torch, object_, tensor)) refuse_conversion(py::error_already_set());
    read_header(tensor);
}

// On CuPy's current stream: nothing has to wait for anything (DLPack: -1), which also lets a graph be captured.
void Array::import_cupy(Use use) {
    py::dict options;
    options["stream"] = -1;
    import_capsule(use, options);
}

void Array::refuse_dtype() const {
    refuse("type", std::string("dtype ") + argument_.dtypes, py::str(object_.attr("dtype")).cast<std::string>());
}

// DLPack could not describe the tensor: say why, in terms of the argument.
void Array::refuse_conversion(const py::error_already_set& error) const {
    if (framework_ == Framework::torch) {
        if (!py::object(object_.attr("layout")).is(names<TorchNames>().strided)) {
            refuse("value", "a dense (strided) tensor", py::str(object_.attr("layout")));
        }
        if (py::str(object_.attr("device").attr("type")).equal(py::str("meta"))) {
            refuse("value", "a tensor with memory", "one on the meta device");
        }
    }
    refuse("type", "an array that DLPack can describe",
           "dtype " + py::str(object_.attr("dtype")).cast<std::string>() + " (" +
               py::str(error.value()).cast<std::string>() + ")");
}

void Array::import_capsule(Use use, const py::dict& options) {
    py::object capsule;
    try {
        capsule = object_.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0), **options);
    } catch (const py::error_already_set& error) {
        refuse_conversion(error);
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
        auto* tensor =
            static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (tensor->version.major != 1) {
            refuse("type", "DLPack version 1", "version " + std::to_string(tensor->version.major));
        }
        PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
        versioned_.reset(tensor);
        if (use == Use::write && (tensor->flags & read_only_flag) != 0)
            refuse("value", "a writable array", "a read-only one");
        return read_header(tensor->dl_tensor);
    }
    auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (tensor == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    legacy_.reset(tensor);
    read_header(tensor->dl_tensor);
}

void Array::read_header(const DLTensor& tensor) {
    const auto dtype = dtype_from(tensor.dtype);
    if (!dtype) refuse_dtype();
    const auto device = device_from(tensor.device);
    if (!device) {
        refuse("value", "an array on the CPU or a CUDA device",
               "DLPack device type " + std::to_string(tensor.device.device_type));
    }
    if (tensor.ndim < 1) refuse("value", "an array of rank >= 1", "rank 0");
    dtype_ = *dtype;
    device_ = *device;
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const auto rank = static_cast<std::size_t>(tensor.ndim);
    shape_.reset(rank);
    strides_.reset(rank);
    std::copy_n(tensor.shape, rank, shape_.begin());
    if (tensor.strides != nullptr) {
        std::copy_n(tensor.strides, rank, strides_.begin());
    } else {
        strides_.back() = 1;
        for (std::size_t i = rank - 1; i > 0; --i) strides_[i - 1] = strides_[i] * shape_[i];
    }
    if (tensor.data == nullptr && !is_empty(shape_)) {
        refuse("value", "an array with memory", "one without (fake or lazy)");
    }
}

bool Array::is_contiguous() const noexcept {
    std::int64_t expected = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
        if (shape_[i] == 0) return true;
        if (shape_[i] != 1 && strides_[i] != expected) return false;
        expected *= shape_[i];
    }
    return true;
}

bool Array::can_be_matrix() const noexcept {
    // From the last leading dimension outwards, each must step over all of the next (size 1 steps nowhere).
    std::int64_t step = 0;
    bool has_step = false;
    for (std::size_t i = shape_.size() - 1; i-- > 0;) {
        if (shape_[i] == 0) return true;
        if (shape_[i] == 1) continue;
        if (has_step && strides_[i] != step) return false;
        step = strides_[i] * shape_[i];
        has_step = true;
    }
    return true;
}

Matrix Array::mutable_matrix() const {
    Matrix matrix{.data = data_,
                  .dtype = dtype_,
                  .device = device_,
                  .rows = 1,
                  .cols = shape_.back(),
                  .row_stride = 0,
                  .col_stride = strides_.back()};
    bool has_stride = false;
    for (std::size_t i = shape_.size() - 1; i-- > 0;) {
        matrix.rows *= shape_[i];
        if (!has_stride && shape_[i] != 1) {
            matrix.row_stride = strides_[i];
            has_stride = true;
        }
    }
    return matrix;
}

ConstMatrix Array::matrix() {
    if (can_be_matrix()) return mutable_matrix();
    std::int64_t rows = 1;
    for (std::size_t i = 0; i + 1 < shape_.size(); ++i) rows *= shape_[i];
    return reshaped(py::make_tuple(rows, shape_.back())).mutable_matrix();
}

ConstVector Array::flat() {
    if (shape_.size() == 1) return vector();
    return reshaped(py::make_tuple(-1)).vector();
}

Array& Array::reshaped(const py::tuple& shape) {
    reshaped_ = std::make_unique<Array>(object_.attr("reshape")(shape), argument_);
    return *reshaped_;
}

Vector Array::vector() const {
    if (shape_.size() != 1) {
        refuse("value", "an array of rank 1", "rank " + std::to_string(shape_.size()));
    }
    return {.data = data_, .dtype = dtype_, .device = device_, .size = shape_[0], .stride = strides_[0]};
}

py::object allocate(const Array& like, const Shape& shape, DType dtype) {
    const auto index = static_cast<std::size_t>(dtype);
    if (like.framework() == Framework::numpy) {
        const auto& numpy = names<NumpyNames>();
        if (dtype == DType::bf16) throw py::type_error("NumPy has no bfloat16; expected dtype float32 or float16");
        const py::tuple extents = to_tuple(shape);
        PyObject* const arguments[] = {extents.ptr(), numpy.dtypes[index].ptr()};
        return checked(PyObject_Vectorcall(numpy.empty.ptr(), arguments, 2, nullptr));
    }
    if (like.framework() == Framework::cupy) {
        const auto& cupy = names<CupyNames>();
        if (dtype == DType::bf16) throw py::type_error("CuPy has no bfloat16; expected dtype float32 or float16");
        const py::object outer = cupy.device();
        const py::object device = cupy.device(like.device().index);
        device.attr("use")();
        const py::tuple extents = to_tuple(shape);
        PyObject* const arguments[] = {extents.ptr(), cupy.dtypes[index].ptr()};
        py::object result;
        try {
            result = checked(PyObject_Vectorcall(cupy.empty.ptr(), arguments, 2, nullptr));
        } catch (...) {
            outer.attr("use")();
            throw;
        }
        outer.attr("use")();
        return result;
    }
    // like.new_empty(*shape, dtype=dtype). Of PyTorch's ways this is the cheapest that keeps its rules (device, mode,
    // resizable storage); a tuple of extents costs it 350 ns more, dtype another 150.
    const auto& torch = names<TorchNames>();
    SmallArray<PyObject*> arguments(shape.size() + 2);
    arguments[0] = like.object().ptr();
    for (std::size_t i = 0; i < shape.size(); ++i) arguments[i + 1] = py::int_(shape[i]).release().ptr();
    arguments.back() = torch.dtypes[index].ptr();
    PyObject* const keywords = dtype == like.dtype() ? nullptr : torch.dtype_keyword.ptr();
    PyObject* const result = PyObject_Vectorcall(torch.new_empty.ptr(), arguments.begin(), shape.size() + 1, keywords);
    for (std::size_t i = 0; i < shape.size(); ++i) Py_DECREF(arguments[i + 1]);
    return checked(result);
}

Stream stream_of(const Array& array) {
    if (array.device().kind == DeviceKind::cpu) return {};
    const int index = array.device().index;
    if (array.framework() == Framework::cupy) {
        const py::object stream = names<CupyNames>().current_stream(index);
        return {reinterpret_cast<void*>(stream.attr("ptr").cast<std::uintptr_t>())};
    }
    const auto& torch = names<TorchNames>();
    void* stream = nullptr;
    if (torch.exchange != nullptr) {
        constexpr std::int32_t cuda = 2;
        if (torch.exchange->current_work_stream(cuda, index, &stream) != 0) throw py::error_already_set();
    } else {
        const py::object current = torch.torch.attr("cuda").attr("current_stream")(index);
        stream = reinterpret_cast<void*>(current.attr("cuda_stream").cast<std::uintptr_t>());
    }
    return {stream};
}

std::int32_t item(const py::object& array) { return array.attr("item")().cast<std::int32_t>(); }

int threads_of(Framework framework) {
    if (framework != Framework::torch) return 0;
    const auto& torch = names<TorchNames>();
    if (torch.symbols.get_num_threads != nullptr) return torch.symbols.get_num_threads();
    return torch.get_num_threads().cast<int>();
}

py::object allocate_aligned(const Array& like, const Shape& shape) {
    if (like.framework() == Framework::torch) return allocate(like, shape, DType::i8);  // PyTorch aligns all its memory
    // NumPy does not: take a line more, and of that the part that begins a line.
    constexpr std::int64_t line = 64;
    std::int64_t size = 1;
    for (const auto extent : shape) size *= extent;
    const py::object memory = allocate(like, {size + line}, DType::i8);
    const Array bytes(memory, {"pack", "packed", "int8"});
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    const auto begin = static_cast<std::int64_t>((line - address % line) % line);
    const py::object part = memory[py::slice(begin, begin + size, 1)];
    return part.attr("reshape")(to_tuple(shape));
}

}  // namespace octavo::python
