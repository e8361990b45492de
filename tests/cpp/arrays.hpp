// Arrays of every dtype and layout, which tests read and write as double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "octavo/types.hpp"
#include "random.hpp"

// A dense row-major matrix of doubles: what the tests compute with.
struct Values {
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::vector<double> v;

    Values() = default;
    Values(std::int64_t row_count, std::int64_t col_count)
        : rows(row_count), cols(col_count), v(static_cast<std::size_t>(rows * cols)) {}
    Values(std::int64_t row_count, std::int64_t col_count, std::vector<double> values)
        : rows(row_count), cols(col_count), v(std::move(values)) {}
    explicit Values(const std::vector<double>& row) : Values(1, static_cast<std::int64_t>(row.size()), row) {}

    double& operator()(std::int64_t i, std::int64_t j) { return v[static_cast<std::size_t>(i * cols + j)]; }
    double operator()(std::int64_t i, std::int64_t j) const { return v[static_cast<std::size_t>(i * cols + j)]; }
};

// Bit patterns of the 16-bit types and the numbers they stand for, by arithmetic on the number (independent of the
// library's bit tricks). `encode16` rounds half to even.
double decode16(octavo::DType dtype, std::uint16_t bits);
std::uint16_t encode16(octavo::DType dtype, double value);

// The number that `dtype` holds after rounding `value`.
double rounded(octavo::DType dtype, double value);

// How the elements lie in memory. All but `contiguous` leave or shift bytes that nobody may read or write.
enum class Layout : std::uint8_t { contiguous, padded, strided, transposed, reversed, unaligned };
inline constexpr Layout layouts[] = {Layout::contiguous, Layout::padded,   Layout::strided,
                                     Layout::transposed, Layout::reversed, Layout::unaligned};

// An array [rows, cols] in guarded memory. A vector is an array of one row.
class Array {
public:
    Array(octavo::DType dtype, std::int64_t rows, std::int64_t cols, Layout layout = Layout::contiguous);
    Array(octavo::DType dtype, const Values& values, Layout layout = Layout::contiguous);
    Array(octavo::DType dtype, const std::vector<double>& values, Layout layout = Layout::contiguous);
    Array(octavo::DType dtype, std::initializer_list<double> values, Layout layout = Layout::contiguous)
        : Array(dtype, std::vector<double>(values), layout) {}

    [[nodiscard]] double get(std::int64_t row, std::int64_t col) const;
    [[nodiscard]] double get(std::int64_t col) const { return get(0, col); }
    void set(std::int64_t row, std::int64_t col, double value);
    [[nodiscard]] Values values() const;

    [[nodiscard]] octavo::Matrix matrix() const { return matrix_; }
    [[nodiscard]] octavo::Vector vector() const;

    // Whether the bytes between the elements are as they were at first.
    [[nodiscard]] bool gaps_untouched() const;
    [[nodiscard]] std::string bytes() const;

private:
    [[nodiscard]] std::byte* at(std::int64_t row, std::int64_t col) const;

    std::shared_ptr<GuardedMemory> memory_;
    octavo::Matrix matrix_;
};

inline constexpr octavo::DType float_dtypes[] = {octavo::DType::f32, octavo::DType::f16, octavo::DType::bf16};

// Bell-shaped values of the given standard deviation.
Values random_normal(Random& random, std::int64_t rows, std::int64_t cols, double deviation = 1.0);

// All int8 values, -128 included, equally likely.
Values random_codes(Random& random, std::int64_t rows, std::int64_t cols);
