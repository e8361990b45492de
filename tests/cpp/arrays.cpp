#include "arrays.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "device.hpp"

using octavo::DType;

namespace {

struct Format {
    int exponent_bits;
    int mantissa_bits;
    [[nodiscard]] int least_exponent() const { return 2 - (1 << (exponent_bits - 1)); }
    [[nodiscard]] int infinity() const { return ((1 << exponent_bits) - 1) << mantissa_bits; }
};

Format format_of(DType dtype) { return dtype == DType::f16 ? Format{5, 10} : Format{8, 7}; }

struct Placement {
    std::int64_t row_stride;
    std::int64_t col_stride;
    std::int64_t origin;  // of element (0, 0), in elements
    std::int64_t span;    // elements from the first to the last
    std::size_t slack;    // steps behind it
};

Placement place(Layout layout, std::int64_t rows, std::int64_t cols) {
    switch (layout) {
        case Layout::contiguous: return {cols, 1, 0, rows * cols, 0};
        case Layout::padded: return {cols + 3, 1, 0, rows * (cols + 3), 0};
        case Layout::strided: return {2 * cols + 1, 2, 0, rows * (2 * cols + 1), 0};
        case Layout::transposed: return {1, rows, 0, rows * cols, 0};
        case Layout::reversed: return {-cols, -1, rows > 0 && cols > 0 ? rows * cols - 1 : 0, rows * cols, 0};
        case Layout::unaligned: break;
    }
    return {cols, 1, 0, rows * cols, 1};
}

}  // namespace

double decode16(DType dtype, std::uint16_t bits) {
    const Format format = format_of(dtype);
    const int magnitude = bits & 0x7FFF;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    if (magnitude == format.infinity()) return sign * std::numeric_limits<double>::infinity();
    if (magnitude > format.infinity()) return std::copysign(std::numeric_limits<double>::quiet_NaN(), sign);
    const int exponent = magnitude >> format.mantissa_bits;
    const int mantissa = magnitude - (exponent << format.mantissa_bits);
    const int steps = exponent == 0 ? mantissa : mantissa + (1 << format.mantissa_bits);
    return sign *
           std::ldexp(steps, format.least_exponent() + (exponent == 0 ? 0 : exponent - 1) - format.mantissa_bits);
}

std::uint16_t encode16(DType dtype, double value) {
    const Format format = format_of(dtype);
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    const int quiet_nan = format.infinity() | (1 << (format.mantissa_bits - 1));
    if (std::isnan(value)) return static_cast<std::uint16_t>(sign | quiet_nan);
    if (magnitude == 0.0) return static_cast<std::uint16_t>(sign);
    if (std::isinf(value)) return static_cast<std::uint16_t>(sign | format.infinity());
    // How many units in the last place, of those that numbers of this exponent have. A carry into the next exponent is
    // right: bit patterns count on.
    const int exponent = std::max(std::ilogb(magnitude), format.least_exponent());
    const auto steps =
        static_cast<std::int64_t>(std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent)));
    const std::int64_t pattern = (std::int64_t{exponent - format.least_exponent()} << format.mantissa_bits) + steps;
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::min<std::int64_t>(pattern, format.infinity())));
}

double rounded(DType dtype, double value) {
    if (dtype == DType::f32) return static_cast<float>(value);
    return decode16(dtype, encode16(dtype, value));
}

Array::Array(DType dtype, std::int64_t rows, std::int64_t cols, Layout layout) {
    const Placement placement = place(layout, rows, cols);
    const std::int64_t item = octavo::size_of(dtype);
    // By one byte in CPU memory; a GPU wants elements aligned, so by one of these.
    const std::size_t slack =
        placement.slack * (test_device().kind == octavo::DeviceKind::cpu ? 1U : static_cast<std::size_t>(item));
    memory_ = std::make_shared<GuardedMemory>(static_cast<std::size_t>(placement.span * item), slack);
    matrix_ = {memory_->data() + placement.origin * item,
               dtype,
               test_device(),
               rows,
               cols,
               placement.row_stride,
               placement.col_stride};
}

Array::Array(DType dtype, const Values& values, Layout layout) : Array(dtype, values.rows, values.cols, layout) {
    for (std::int64_t i = 0; i < values.rows; ++i) {
        for (std::int64_t j = 0; j < values.cols; ++j) set(i, j, values(i, j));
    }
}

Array::Array(DType dtype, const std::vector<double>& values, Layout layout) : Array(dtype, Values(values), layout) {}

std::byte* Array::at(std::int64_t row, std::int64_t col) const {
    const std::int64_t index = row * matrix_.row_stride + col * matrix_.col_stride;
    return static_cast<std::byte*>(matrix_.data) + index * octavo::size_of(matrix_.dtype);
}

double Array::get(std::int64_t row, std::int64_t col) const {
    wait_for_device();
    const auto read = [&]<class T>(T value) {
        std::memcpy(&value, at(row, col), sizeof value);
        return value;
    };
    switch (matrix_.dtype) {
        case DType::f32: return read(float{});
        case DType::f16:
        case DType::bf16: return decode16(matrix_.dtype, read(std::uint16_t{}));
        case DType::i8: return read(std::int8_t{});
        case DType::i32: return read(std::int32_t{});
    }
    return 0;
}

void Array::set(std::int64_t row, std::int64_t col, double value) {
    const auto write = [&](auto item) { std::memcpy(at(row, col), &item, sizeof item); };
    switch (matrix_.dtype) {
        case DType::f32: return write(static_cast<float>(value));
        case DType::f16:
        case DType::bf16: return write(encode16(matrix_.dtype, value));
        case DType::i8: return write(static_cast<std::int8_t>(value));
        case DType::i32: return write(static_cast<std::int32_t>(value));
    }
}

Values Array::values() const {
    Values result(matrix_.rows, matrix_.cols);
    for (std::int64_t i = 0; i < result.rows; ++i) {
        for (std::int64_t j = 0; j < result.cols; ++j) result(i, j) = get(i, j);
    }
    return result;
}

octavo::Vector Array::vector() const {
    return {matrix_.data, matrix_.dtype, matrix_.device, matrix_.cols, matrix_.col_stride, true};
}

bool Array::gaps_untouched() const {
    wait_for_device();
    std::vector<bool> is_element(memory_->size());
    for (std::int64_t i = 0; i < matrix_.rows; ++i) {
        for (std::int64_t j = 0; j < matrix_.cols; ++j) {
            const auto begin = at(i, j) - memory_->data();
            for (std::int64_t byte = 0; byte < octavo::size_of(matrix_.dtype); ++byte) {
                is_element[static_cast<std::size_t>(begin + byte)] = true;
            }
        }
    }
    for (std::size_t i = 0; i < is_element.size(); ++i) {
        if (!is_element[i] && memory_->data()[i] != std::byte{GuardedMemory::filler}) return false;
    }
    return true;
}

std::string Array::bytes() const {
    wait_for_device();
    return {reinterpret_cast<const char*>(memory_->data()), memory_->size()};
}

Values random_normal(Random& random, std::int64_t rows, std::int64_t cols, double deviation) {
    Values values(rows, cols);
    for (double& value : values.v) value = deviation * random.normal();
    return values;
}

Values random_codes(Random& random, std::int64_t rows, std::int64_t cols) {
    Values values(rows, cols);
    for (double& value : values.v) value = static_cast<double>(random.integer(-128, 127));
    return values;
}
