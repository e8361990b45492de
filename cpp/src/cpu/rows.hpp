// Elements and rows of strided views.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <type_traits>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/scratch.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

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

// Rows of `cols` elements that are worth a thread's taking them over: for fewer, what is made of them had better stay
// in one core's caches.
inline std::int64_t row_grain(std::int64_t cols) { return 1 + (std::int64_t{1} << 15) / (cols > 0 ? cols : 1); }

// Columns [begin, begin + size) of a row as float32.
inline void load_row(const ConstMatrix& matrix, std::int64_t row, std::int64_t begin, std::int64_t size, float* dst) {
    kernels().load(matrix.dtype, at(matrix, row, begin), matrix.col_stride, size, dst);
}

// Some columns of a row, likewise, each `stride` behind the one before.
inline void load_columns(const ConstMatrix& matrix, std::int64_t row, std::span<const std::int32_t> columns, float* dst,
                         std::int64_t stride) {
    kernels().load_columns(matrix.dtype, at(matrix, row, 0), matrix.col_stride, columns.data(), std::ssize(columns),
                           dst, stride);
}

// Kernels::rotate of a row in place.
inline void rotate(float* row, std::int64_t size, std::int64_t block) {
    kernels().rotate(DType::f32, row, size, block, nullptr, 0, row);
}

// That a row will be read soon.
inline void fetch_row(const ConstMatrix& matrix, std::int64_t row) {
    if (matrix.col_stride != 1) return;
    const auto* const begin = static_cast<const char*>(at(matrix, row, 0));
    for (std::int64_t i = 0; i < matrix.cols * size_of(matrix.dtype); i += 64) __builtin_prefetch(begin + i);
}

// Rows of a matrix as the kernels take them: the caller's memory where the row is contiguous, else a copy in float32.
class RowReader {
public:
    explicit RowReader(const ConstMatrix& x) : x_(x), dtype_(x.col_stride == 1 ? x.dtype : DType::f32) {}

    [[nodiscard]] DType dtype() const noexcept { return dtype_; }
    [[nodiscard]] const void* row(std::int64_t index) { return x_.col_stride == 1 ? at(x_, index, 0) : floats(index); }
    // A copy in float32, to be changed as one likes; the next call of either function overwrites it.
    [[nodiscard]] float* floats(std::int64_t index) {
        if (copy_.data() == nullptr) copy_ = Scratch<float>(x_.cols);
        load_row(x_, index, 0, x_.cols, copy_.data());
        return copy_.data();
    }

private:
    ConstMatrix x_;
    DType dtype_;
    Scratch<float> copy_{0};  // made when it is first needed
};

// The magnitude whose bit pattern, in a dtype, is given.
float magnitude_of(DType dtype, std::uint32_t bits);

// Column numbers in ascending order, each once.
void sort_unique(std::vector<std::int32_t>& columns);

// Row `row` of int8 codes, contiguous along k: the caller's own memory where it is like that already, else copied to
// `copy` (of `codes.cols` elements).
const std::int8_t* contiguous_codes(const ConstMatrix& codes, std::int64_t row, std::int8_t* copy);

}  // namespace octavo::cpu
