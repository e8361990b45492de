#include "bindings/tensor.hpp"

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <string_view>

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
    py::object empty = torch.attr("empty");
    // In the order of octavo::DType.
    std::array<py::object, 5> dtypes{torch.attr("float32"), torch.attr("float16"), torch.attr("bfloat16"),
                                     torch.attr("int8"), torch.attr("int32")};
    const DLPackExchangeAPI* exchange = find_exchange(tensor);

    // Torch before 2.10 has none; its arrays go through `__dlpack__`.
    static const DLPackExchangeAPI* find_exchange(const py::object& tensor_type) {
        if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
        const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
        const auto* api =
            static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api == nullptr) throw py::error_already_set();
        return api->header.version.major == 1 ? api : nullptr;
    }
};

struct NumpyNames {
    py::object ndarray = py::module_::import("numpy").attr("ndarray");
    py::object masked_array = py::module_::import("numpy").attr("ma").attr("MaskedArray");
    py::object empty = py::module_::import("numpy").attr("empty");
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
        if (module == "torch" && name == "Tensor") {
            const auto& torch = names<TorchNames>();
            return {Framework::torch, py::object(type.attr("__torch_dispatch__")).is(torch.dispatch)};
        }
    }
    return {};
}

// `examine`, remembered for the few types that a program uses. The types are kept alive, so that no other type can come
// to have the address of one of them.
TypeFacts facts_of(py::handle object) {
    struct Entry {
        PyTypeObject* type;
        TypeFacts facts;
    };
    constexpr std::size_t most_entries = 64;
    static std::mutex mutex;
    static std::vector<Entry> entries;
    PyTypeObject* const type = Py_TYPE(object.ptr());
    {
        const std::lock_guard lock(mutex);
        for (const Entry& entry : entries) {
            if (entry.type == type) return entry.facts;
        }
    }
    const TypeFacts facts = examine(reinterpret_cast<PyObject*>(type));
    const std::lock_guard lock(mutex);
    if (entries.size() < most_entries) {
        Py_INCREF(type);
        entries.push_back({type, facts});
    }
    return facts;
}

bool is_true(const py::object& object) { return object.ptr() == Py_True; }

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
    if (!facts.framework) refuse("type", "a NumPy array or a PyTorch tensor", type_name(object));
    framework_ = *facts.framework;
    if (!facts.plain) {
        refuse("type", framework_ == Framework::numpy ? "an array without a mask" : "a plain torch.Tensor",
               type_name(object));
    }
    import(use);
}

void Array::import(Use use) {
    if (framework_ == Framework::torch) return import_torch(use);
    if (use == Use::write && !object_.attr("flags").attr("writeable").cast<bool>()) {
        refuse("value", "a writable array", "a read-only one");
    }
    import_capsule(use);
}

void Array::import_torch(Use use) {
    const auto& torch = names<TorchNames>();
    if (is_true(object_.attr("is_neg")())) {
        if (use == Use::write) refuse("value", "a tensor without the negative bit", "one with it");
        object_ = object_.attr("resolve_neg")();
    }
    if (is_true(object_.attr("requires_grad"))) {
        if (use != Use::read && is_true(torch.is_grad_enabled())) {
            refuse("value", "a tensor outside autograd (use .detach(), torch.no_grad() or octavo.torch.Int8Linear)",
                   "one that requires grad");
        }
        object_ = object_.attr("detach")();
    }
    if (torch.exchange == nullptr) return import_capsule(use);
    DLManagedTensorVersioned* tensor = nullptr;
    if (torch.exchange->managed_tensor_from_py_object_no_sync(object_.ptr(), &tensor) != 0) {
        refuse_conversion(py::error_already_set());
    }
    versioned_.reset(tensor);
    read_header(tensor->dl_tensor);
}

// DLPack could not describe the array: say why, in terms of the argument.
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

void Array::import_capsule(Use use) {
    py::object capsule;
    try {
        capsule = object_.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
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
    if (!dtype) {
        refuse("type", std::string("dtype ") + argument_.dtypes, py::str(object_.attr("dtype")).cast<std::string>());
    }
    const auto device = device_from(tensor.device);
    if (!device) {
        refuse("value", "an array on the CPU or a CUDA device",
               "DLPack device type " + std::to_string(tensor.device.device_type));
    }
    if (tensor.ndim < 1) refuse("value", "an array of rank >= 1", "rank 0");
    dtype_ = *dtype;
    device_ = *device;
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
    if (tensor.strides != nullptr) {
        strides_.assign(tensor.strides, tensor.strides + tensor.ndim);
    } else {
        strides_.assign(shape_.size(), 1);
        for (std::size_t i = shape_.size() - 1; i > 0; --i) strides_[i - 1] = strides_[i] * shape_[i];
    }
    const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
    if (!empty && tensor.data == nullptr) refuse("value", "an array with memory", "one without (fake or lazy)");
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
    if (like.framework() == Framework::torch) {
        const auto& torch = names<TorchNames>();
        return torch.empty(to_tuple(shape), py::arg("dtype") = torch.dtypes[static_cast<std::size_t>(dtype)],
                           py::arg("device") = like.object().attr("device"));
    }
    if (dtype == DType::bf16) throw py::type_error("NumPy has no bfloat16; expected dtype float32 or float16");
    return names<NumpyNames>().empty(to_tuple(shape), name_of(dtype));
}

}  // namespace octavo::python
