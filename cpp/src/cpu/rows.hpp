// Rows of a strided matrix as contiguous float32, and scratch memory to hold them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/isa.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

// Uninitialized memory for `size` elements (std::vector would write zeros first).
template <class T>
class Scratch {
public:
    explicit Scratch(std::int64_t size) : data_(new T[static_cast<std::size_t>(size)]) {}
    [[nodiscard]] T* data() const noexcept { return data_.get(); }
    T& operator[](std::int64_t index) const noexcept { return data_[static_cast<std::size_t>(index)]; }

private:
    std::unique_ptr<T[]> data_;  // NOLINT(modernize-avoid-c-arrays)
};

// Address of element (row, col), of an input or an output.
template <class Data>
Data* at(const BasicMatrix<Data>& matrix, std::int64_t row, std::int64_t col) {
    using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
    return static_cast<Byte*>(matrix.data) +
           (row * matrix.row_stride + col * matrix.col_stride) * size_of(matrix.dtype);
}

template <class Data>
Data* at(const BasicVector<Data>& vector, std::int64_t index) {
    using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
    return static_cast<Byte*>(vector.data) + index * vector.stride * size_of(vector.dtype);
}

// Elements of vectors and int8 matrices, which need no alignment.
template <class T>
T get(const ConstVector& vector, std::int64_t index) {
    T value;
    __builtin_memcpy(&value, at(vector, index), sizeof value);
    return value;
}

template <class T>
void put(const Vector& vector, std::int64_t index, T value) {
    __builtin_memcpy(at(vector, index), &value, sizeof value);
}

inline std::int8_t code_at(const ConstMatrix& codes, std::int64_t row, std::int64_t col) {
    return *static_cast<const std::int8_t*>(at(codes, row, col));
}

// Rows of `cols` elements that are worth a thread's waking.
inline std::int64_t row_grain(std::int64_t cols) { return 1 + (std::int64_t{1} << 15) / (cols > 0 ? cols : 1); }

// Columns [begin, begin + size) of a row as float32.
inline void load_row(const ConstMatrix& matrix, std::int64_t row, std::int64_t begin, std::int64_t size, float* dst) {
    kernels().load(matrix.dtype, at(matrix, row, begin), matrix.col_stride, size, dst);
}

// Column numbers in ascending order, each once.
void sort_unique(std::vector<std::int32_t>& columns);

// Rows of int8 codes that are contiguous along k, as the product kernels want them: the caller's own memory where it
// is like that already, else a copy.
class ContiguousCodes {
public:
    explicit ContiguousCodes(const ConstMatrix& codes);
    [[nodiscard]] const std::int8_t* row(std::int64_t index) const noexcept { return data_ + index * stride_; }
    [[nodiscard]] std::int64_t stride() const noexcept { return stride_; }

private:
    std::unique_ptr<Scratch<std::int8_t>> copy_;
    const std::int8_t* data_;
    std::int64_t stride_;
};

}  // namespace octavo::cpu
