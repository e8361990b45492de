// Arrays of octavo's own, for results beside inputs whose framework octavo does not know how to make arrays of.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/small_array.hpp"
#include "octavo/types.hpp"

namespace octavo::python {

namespace py = pybind11;
using Shape = SmallArray<std::int64_t>;

// A contiguous array in CPU memory that hands itself out over DLPack. Python's octavo.DLPackArray.
class OwnArray : public std::enable_shared_from_this<OwnArray> {
public:
    // Uninitialized, aligned to a cache line. Throws std::bad_alloc where there is not so much memory.
    OwnArray(const Shape& shape, DType dtype);

    [[nodiscard]] void* data() const noexcept { return data_.get(); }
    [[nodiscard]] const Shape& shape() const noexcept { return shape_; }
    [[nodiscard]] const Shape& strides() const noexcept { return strides_; }
    [[nodiscard]] DType dtype() const noexcept { return dtype_; }
    [[nodiscard]] std::int64_t bytes() const noexcept { return bytes_; }

    // A capsule "dltensor_versioned", or "dltensor" for consumers from before DLPack 1.0, that shares the memory.
    [[nodiscard]] py::object capsule(bool versioned);

private:
    struct Free {
        void operator()(void* data) const noexcept;
    };

    Shape shape_;
    Shape strides_;
    DType dtype_;
    std::int64_t bytes_;
    std::unique_ptr<void, Free> data_;
};

// Define the class DLPackArray in `module`.
void define_own_array(py::module_& module);

}  // namespace octavo::python
