// Array arguments, read as the core's views: NumPy's directly, all others over DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>

#include "bindings/dlpack.hpp"
#include "bindings/frameworks.hpp"
#include "octavo/types.hpp"

namespace octavo::python {

class Array;

inline constexpr auto float_dtype_names = "float32, float16 or bfloat16";

// The place of an argument in messages.
struct Argument {
    const char* function;
    const char* name;
    const char* dtypes = float_dtype_names;  // that the argument may have
    const Array* leader = nullptr;           // on whose stream the call will work: others wait for their own streams
};

// What an argument is used for.
enum class Use {
    read,            // values only: a tensor that requires grad is read as if detached
    keep,            // as read, after the call too: the memory stays even if the tensor is given other memory
    differentiable,  // as read, but refused while autograd would want to record the operation
    write,           // an output: must be writable
    fresh,           // an output that `allocate` has made
};

// An array argument. Holds the array until it is destroyed.
class Array {
public:
    // Throws TypeError where `object` is no array or has a dtype octavo has no use for, ValueError where its memory
    // cannot be used as `use` says.
    Array(py::handle object, Argument argument, Use use = Use::read);

    [[nodiscard]] const py::object& object() const noexcept { return object_; }
    [[nodiscard]] Framework framework() const noexcept { return framework_; }
    [[nodiscard]] Stream stream() const { return stream_of(framework_, device_); }
    [[nodiscard]] DType dtype() const noexcept { return dtype_; }
    [[nodiscard]] Device device() const noexcept { return device_; }
    [[nodiscard]] const Shape& shape() const noexcept { return shape_; }
    [[nodiscard]] const Shape& strides() const noexcept { return strides_; }
    [[nodiscard]] void* data() const noexcept { return data_; }
    [[nodiscard]] bool is_contiguous() const noexcept;

    // The array as `[rows, cols]`, all leading dimensions folded into rows. An array whose leading dimensions have no
    // common stride is copied once by its own framework.
    [[nodiscard]] ConstMatrix matrix();

    // As `matrix`, but only where that needs no copy.
    [[nodiscard]] bool can_be_matrix() const noexcept;
    [[nodiscard]] Matrix mutable_matrix() const;

    // A rank-1 array.
    [[nodiscard]] Vector vector() const;

    // All elements in order, whatever the rank; copied once where they have no common stride.
    [[nodiscard]] ConstVector flat();

private:
    struct Release {
        void operator()(DLManagedTensorVersioned* tensor) const noexcept;
        void operator()(DLManagedTensor* tensor) const noexcept;
    };

    void import_numpy(Use use);
    void import_torch(Use use);
    void import_own();
    void import_capsule(Use use);
    [[nodiscard]] py::object capsule() const;
    [[nodiscard]] Device known_device(DLDevice device) const;
    void check_extents() const;
    void read_header(const DLTensor& tensor);
    [[noreturn]] void refuse_dtype() const;
    [[noreturn]] void refuse_conversion(const py::error_already_set& error) const;
    [[noreturn]] void refuse(const char* kind, const std::string& expected, const std::string& got) const;

    // `object_` reshaped by its framework, held here while it is in use.
    Array& reshaped(const py::tuple& shape);

    // The elements of an array whose framework octavo does not know, contiguous, held likewise.
    Array& copied();

    Argument argument_;
    py::object object_;
    std::unique_ptr<Array> reshaped_;
    Framework framework_{};
    std::unique_ptr<DLManagedTensorVersioned, Release> versioned_;
    std::unique_ptr<DLManagedTensor, Release> legacy_;
    char* data_ = nullptr;
    DType dtype_{};
    Device device_{};
    Shape shape_;
    Shape strides_;
};

// A new, contiguous, uninitialized array for a result beside `like`, on its device; and what the caller gets of it,
// once it is written: an array of the framework of `like`.
py::object allocate(const Array& like, const Shape& shape, DType dtype);
py::object result_of(const Array& result, const Array& like);

// As `allocate`, of dtype int8, aligned to a cache line.
py::object allocate_aligned(const Array& like, const Shape& shape);

// The value of an int32 array of one element, wherever it is; waits for it.
std::int32_t item(const py::object& array);

}  // namespace octavo::python
