#include "bindings/tensor.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

namespace octavo::python {
namespace {

constexpr std::uint64_t read_only_flag = 1;
constexpr std::int32_t most_dimensions = 64;  // as of NumPy and PyTorch

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
    if (!facts.framework) refuse("type", "an array (of NumPy, PyTorch, or with __dlpack__)", type_name(object));
    framework_ = *facts.framework;
    if (!facts.plain) {
        refuse("type", framework_ == Framework::numpy ? "an array without a mask" : "a plain torch.Tensor",
               type_name(object));
    }
    switch (framework_) {
        case Framework::numpy: import_numpy(use); break;
        case Framework::torch: import_torch(use); break;
        case Framework::own: import_own(); break;
        case Framework::cupy:
        case Framework::other: import_capsule(use); break;
    }
    check_extents();
}

// That offsets of elements and products of extents fit 64 bits, as whoever made the array should have checked.
void Array::check_extents() const {
    std::int64_t elements = size_of(dtype_);
    std::int64_t reach = 0;
    bool fits = true;
    for (std::size_t i = 0; i < shape_.size(); ++i) {
        if (shape_[i] < 0) refuse("value", "extents >= 0", std::to_string(shape_[i]));
        std::int64_t step = 0;
        fits = fits && !__builtin_mul_overflow(elements, std::max<std::int64_t>(shape_[i], 1), &elements);
        fits = fits && !__builtin_mul_overflow(std::max<std::int64_t>(shape_[i] - 1, 0), strides_[i], &step);
        fits = fits && !__builtin_mul_overflow(step, size_of(dtype_), &step) && step != INT64_MIN;
        fits = fits && !__builtin_add_overflow(reach, step < 0 ? -step : step, &reach);
    }
    if (!fits) refuse("value", "an array of less than 2^63 bytes", "one with more");
}

// NumPy's arrays are read directly: their `__dlpack__` costs as much as a small product.
void Array::import_numpy(Use use) {
    const auto array = py::reinterpret_borrow<py::array>(object_);
    if (use == Use::write && !array.writeable()) refuse("value", "a writable array", "a read-only one");
    const auto dtype = dtype_of(array.dtype());
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

void Array::import_own() {
    const auto& array = object_.cast<const OwnArray&>();
    dtype_ = array.dtype();
    device_ = {};
    data_ = static_cast<char*>(array.data());
    shape_.assign(array.shape());
    strides_.assign(array.strides());
}

void Array::import_torch(Use use) {
    const bool writes = use == Use::write;
    if ((writes || use == Use::differentiable) && torch_records(object_)) {
        refuse("value", "a tensor outside autograd (use .detach(), torch.no_grad() or octavo.torch.Int8Linear)",
               "one that requires grad");
    }
    if (use != Use::fresh && torch_is_negated(object_)) {
        if (writes) refuse("value", "a tensor without the negative bit", "one with it");
        object_ = object_.attr("resolve_neg")();
    }
    const DLPackExchangeAPI* const exchange = torch_exchange();
    const Array* const leader = argument_.leader;
    if (exchange == nullptr || (leader != nullptr && leader->framework() != Framework::torch)) {
        if (torch_requires_grad(object_)) object_ = object_.attr("detach")();  // `__dlpack__` refuses others
        return import_capsule(use);
    }
    if (use == Use::keep) {
        DLManagedTensorVersioned* tensor = nullptr;
        if (exchange->managed_tensor_from_py_object_no_sync(object_.ptr(), &tensor) != 0) {
            refuse_conversion(py::error_already_set());
        }
        versioned_.reset(tensor);
        read_header(tensor->dl_tensor);
    } else {
        DLTensor tensor{};
        if (exchange->dltensor_from_py_object_no_sync(object_.ptr(), &tensor) != 0) {
            refuse_conversion(py::error_already_set());
        }
        read_header(tensor);
    }
}

void Array::refuse_dtype() const {
    const py::object dtype = py::getattr(object_, "dtype", py::none());
    refuse("type", std::string("dtype ") + argument_.dtypes,
           dtype.is_none() ? "another of " + type_name(object_) : py::str(dtype).cast<std::string>());
}

// DLPack could not describe the array: say why, in terms of the argument.
void Array::refuse_conversion(const py::error_already_set& error) const {
    if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;  // such as an interrupt
    if (framework_ == Framework::torch) {
        if (!torch_is_dense(object_)) {
            refuse("value", "a dense (strided) tensor", py::str(object_.attr("layout")));
        }
        if (py::str(object_.attr("device").attr("type")).equal(py::str("meta"))) {
            refuse("value", "a tensor with memory", "one on the meta device");
        }
    }
    const py::object dtype = py::getattr(object_, "dtype", py::none());
    refuse("type", "an array that DLPack can describe",
           (dtype.is_none() ? type_name(object_) : "dtype " + py::str(dtype).cast<std::string>()) + " (" +
               py::str(error.value()).cast<std::string>() + ")");
}

Device Array::known_device(DLDevice device) const {
    switch (device.device_type) {
        case 1:
        case 3: return {DeviceKind::cpu, 0};  // pinned memory is the CPU's too
        case 2: return {DeviceKind::cuda, device.device_id};
        default:
            refuse("value", "an array on the CPU or a CUDA device",
                   "DLPack device type " + std::to_string(device.device_type));
    }
}

// What `__dlpack__` gives: a capsule of DLPack 1 or, where the producer is older, of an earlier version.
py::object Array::capsule() const {
    py::dict options;
    const py::tuple device = object_.attr("__dlpack_device__")();
    const auto type = device.size() == 2 ? py::int_(py::object(device[0])).cast<std::int32_t>() : 0;
    const bool is_on_cpu = known_device({type, 0}).kind == DeviceKind::cpu;
    if (!is_on_cpu) {
        // The stream that will read the array; -1 is the producer's own, which nothing has to wait for (and which lets
        // a graph be captured), 1 is CUDA's default stream.
        const Array* const leader = argument_.leader;
        const bool same = leader == nullptr || leader->framework() == framework_;
        const auto stream = same ? 0 : reinterpret_cast<std::intptr_t>(leader->stream().handle);
        options["stream"] = same && framework_ != Framework::other ? -1 : std::max<std::intptr_t>(stream, 1);
    }
    const py::object give = object_.attr("__dlpack__");
    try {
        return give(py::arg("max_version") = py::make_tuple(1, 0), **options);
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
    }
    return give(**options);
}

void Array::import_capsule(Use use) {
    py::object capsule;
    try {
        capsule = this->capsule();
    } catch (const py::error_already_set& error) {
        refuse_conversion(error);
    } catch (const py::cast_error&) {
        refuse("type", "an array that DLPack can describe", "a " + type_name(object_) + " without a device");
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
        auto* tensor =
            static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
        if (tensor->version.major != 1) {  // whose other fields may lie elsewhere
            refuse("type", "DLPack version 1", "version " + std::to_string(tensor->version.major));
        }
        PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
        versioned_.reset(tensor);
        if (use == Use::write && (tensor->flags & read_only_flag) != 0)
            refuse("value", "a writable array", "a read-only one");
        return read_header(tensor->dl_tensor);
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor") == 0) {
        refuse("type", "a capsule of DLPack from __dlpack__", py::repr(capsule).cast<std::string>());
    }
    // Whether its memory may be written, such a capsule does not say: that of JAX and TensorFlow may not.
    if (use == Use::write && framework_ == Framework::other) {
        refuse("value", "a writable array", "one of " + type_name(object_) + ", whose __dlpack__ does not say so");
    }
    auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    legacy_.reset(tensor);
    read_header(tensor->dl_tensor);
}

void Array::read_header(const DLTensor& tensor) {
    const auto dtype = dtype_from(tensor.dtype);
    if (!dtype) refuse_dtype();
    if (tensor.ndim < 1) refuse("value", "an array of rank >= 1", "rank " + std::to_string(tensor.ndim));
    if (tensor.ndim > most_dimensions || tensor.shape == nullptr) {
        refuse("value", "a shape of at most " + std::to_string(most_dimensions) + " extents",
               tensor.shape == nullptr ? "none" : std::to_string(tensor.ndim));
    }
    dtype_ = *dtype;
    device_ = known_device(tensor.device);
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const auto rank = static_cast<std::size_t>(tensor.ndim);
    shape_.reset(rank);
    strides_.reset(rank);
    std::copy_n(tensor.shape, rank, shape_.begin());
    if (tensor.strides != nullptr) {
        std::copy_n(tensor.strides, rank, strides_.begin());
    } else {
        strides_.back() = 1;
        for (std::size_t i = rank - 1; i > 0; --i) {
            if (__builtin_mul_overflow(strides_[i], shape_[i], &strides_[i - 1])) {
                refuse("value", "an array of less than 2^63 bytes", "one with more");
            }
        }
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
    Array& array = is_contiguous() ? *this : reshaped(py::make_tuple(-1));
    if (array.shape_.size() == 1) return array.vector();
    std::int64_t size = 1;
    for (const auto extent : array.shape_) size *= extent;
    return {.data = array.data_, .dtype = dtype_, .device = device_, .size = size};
}

Array& Array::reshaped(const py::tuple& shape) {
    if (framework_ == Framework::own || framework_ == Framework::other) return copied();
    reshaped_ = std::make_unique<Array>(object_.attr("reshape")(shape), argument_);
    return *reshaped_;
}

Array& Array::copied() {
    if (device_.kind != DeviceKind::cpu) refuse("value", "leading dimensions of one stride", "others");
    auto copy = std::make_shared<OwnArray>(shape_, dtype_);
    const auto size = static_cast<std::size_t>(size_of(dtype_));
    Shape index(shape_.size());
    std::fill(index.begin(), index.end(), 0);
    char* target = static_cast<char*>(copy->data());
    for (const char* const end = target + copy->bytes(); target != end; target += size) {
        std::int64_t offset = 0;
        for (std::size_t i = 0; i < shape_.size(); ++i) offset += index[i] * strides_[i];
        std::memcpy(target, data_ + offset * static_cast<std::int64_t>(size), size);
        for (std::size_t i = shape_.size(); i-- > 0 && ++index[i] == shape_[i];) index[i] = 0;
    }
    reshaped_ = std::make_unique<Array>(py::cast(std::move(copy)), argument_);
    return *reshaped_;
}

Vector Array::vector() const {
    if (shape_.size() != 1) {
        refuse("value", "an array of rank 1", "rank " + std::to_string(shape_.size()));
    }
    return {.data = data_, .dtype = dtype_, .device = device_, .size = shape_[0], .stride = strides_[0]};
}

py::object allocate(const Array& like, const Shape& shape, DType dtype) {
    return allocate(like.framework(), like.object(), like.device(), shape, like.dtype(), dtype);
}

py::object result_of(const Array& result, const Array& like) {
    if (result.framework() != Framework::own || like.framework() != Framework::other) return result.object();
    return handed_over(result.object(), like.object());
}

std::int32_t item(const py::object& array) { return array.attr("item")().cast<std::int32_t>(); }

py::object allocate_aligned(const Array& like, const Shape& shape) {
    // Only NumPy does not align its memory: take a line more, and of that the part that begins a line.
    if (like.framework() != Framework::numpy) return allocate(like, shape, DType::i8);
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
