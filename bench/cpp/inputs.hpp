// What every benchmark needs: arrays with reproducible contents, views of them, and a way to stop at a wrong result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "octavo/octavo.hpp"
#include "random.hpp"

namespace bench {

// A wrong result is never timed: google-benchmark would report an error and exit with 0.
[[noreturn]] inline void fail(const std::string& message) {
    std::fprintf(stderr, "error: %s\n", message.c_str());
    std::exit(1);
}
inline void require(bool condition, const std::string& message) {
    if (!condition) fail(message);
}

// A row-major array [rows, cols] that begins on a cache line, as a framework's tensors do.
class Array {
public:
    Array(octavo::DType dtype, std::int64_t rows, std::int64_t cols) : dtype_(dtype), rows_(rows), cols_(cols) {
        memory_.reset(static_cast<std::byte*>(::operator new(std::max<std::size_t>(bytes(), 1), alignment)));
        std::memset(memory_.get(), 0, bytes());
    }
    [[nodiscard]] octavo::Matrix matrix() const { return {memory_.get(), dtype_, {}, rows_, cols_, cols_, 1}; }
    [[nodiscard]] octavo::Vector vector() const { return {memory_.get(), dtype_, {}, rows_ * cols_, 1, true}; }
    [[nodiscard]] std::int64_t rows() const { return rows_; }
    [[nodiscard]] std::int64_t cols() const { return cols_; }
    [[nodiscard]] std::size_t bytes() const {
        return static_cast<std::size_t>(rows_ * cols_ * octavo::size_of(dtype_));
    }
    template <class T>
    [[nodiscard]] T* as() const {
        return reinterpret_cast<T*>(memory_.get());
    }
    // Element (row, col) of an array of f32 or bf16.
    [[nodiscard]] float at(std::int64_t row, std::int64_t col) const {
        const std::int64_t index = row * cols_ + col;
        if (dtype_ == octavo::DType::f32) return as<float>()[index];
        const std::uint32_t bits = std::uint32_t{as<std::uint16_t>()[index]} << 16U;
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    // bf16: the bits that do not fit are dropped, which for made-up values is as good as rounding.
    void set(std::int64_t row, std::int64_t col, float value) {
        const std::int64_t index = row * cols_ + col;
        if (dtype_ == octavo::DType::f32) {
            as<float>()[index] = value;
            return;
        }
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        as<std::uint16_t>()[index] = static_cast<std::uint16_t>(bits >> 16U);
    }

private:
    static constexpr std::align_val_t alignment{64};
    struct Free {
        void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
    };
    octavo::DType dtype_;
    std::int64_t rows_;
    std::int64_t cols_;
    std::unique_ptr<std::byte, Free> memory_;
};

inline Array normal(octavo::DType dtype, std::int64_t rows, std::int64_t cols, float deviation = 1.0F) {
    Array values(dtype, rows, cols);
    Random random(1);
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) values.set(i, j, deviation * static_cast<float>(random.normal()));
    }
    return values;
}

// All codes that quantization gives, equally likely.
inline Array codes(std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
    Array values(octavo::DType::i8, rows, cols);
    Random random(seed);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
        values.as<std::int8_t>()[i] = static_cast<std::int8_t>(random.integer(-127, 127));
    }
    return values;
}

// The columns, spread over all k, that `plant_outliers` makes outlying; ascending.
inline std::int64_t outlier_column(std::int64_t index, std::int64_t count, std::int64_t k) {
    return (2 * index + 1) * k / (2 * count);
}

// Activations [m, k] whose `count` outlier columns lie around 20 and whose other elements stay below the threshold 6.
inline Array activations(octavo::DType dtype, std::int64_t m, std::int64_t k, std::int64_t count) {
    Array x = normal(dtype, m, k);
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t o = 0; o < count; ++o) {
            const std::int64_t column = outlier_column(o, count, k);
            x.set(i, column, 20.0F + x.at(i, column));
        }
    }
    return x;
}

// Codes in packed order, as a matrix of one row.
inline Array packed(const Array& codes) {
    const std::int64_t size = octavo::packed_size(codes.rows(), codes.cols());
    Array result(octavo::DType::i8, 1, size);
    octavo::pack(codes.matrix(), result.vector());
    return result;
}

// An int8 weight [n, k] made of the float weight `original`, vector-wise.
struct Weight {
    explicit Weight(const Array& original)
        : codes(octavo::DType::i8, original.rows(), original.cols()),
          scale(octavo::DType::f32, 1, original.rows()),
          code_sums(octavo::DType::i32, 1, original.rows()) {
        octavo::quantize_weight(original.matrix(), octavo::Scheme::absmax, octavo::Granularity::vector, codes.matrix(),
                                scale.vector(), octavo::absent_vector, code_sums.vector());
        packed_codes = packed(codes);
    }
    // As `linear` takes it: the one place that knows how the codes lie in memory.
    [[nodiscard]] octavo::WeightView view() const {
        octavo::WeightView view{.codes = codes.matrix(), .scale = scale.vector(), .code_sums = code_sums.vector()};
        view.codes.data = packed_codes.vector().data;
        view.layout = octavo::Layout::packed;
        return view;
    }

    Array codes;
    Array scale;
    Array code_sums;
    Array packed_codes{octavo::DType::i8, 1, 0};
};

}  // namespace bench
