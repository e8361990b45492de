// Declarations of the kernels of the instruction set OCTAVO_ISA, explained in table.hpp.
#pragma once

#include "cpu/kernels/table.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// Two registers, or one that is shorter twice as often.
#if defined(__AVX512F__)
constexpr int gradient_cols = 32;
#else
constexpr int gradient_cols = 16;
#endif

// How this instruction set multiplies (product.cpp).
extern const Plan few;
extern const Plan some;
extern const Plan many;

void load(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst);
void load_transposed(DType dtype, const void* src, std::int64_t stride, std::int64_t cols, std::int64_t count,
                     const std::int32_t* places, float* dst, std::int64_t dst_stride);
void load_columns(DType dtype, const void* src, std::int64_t stride, const std::int32_t* columns, std::int64_t count,
                  float* dst, std::int64_t dst_stride);
void store(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride);
Range range(const float* x, std::int64_t size);
std::uint32_t largest_magnitude(DType dtype, const void* x, std::int64_t size);
std::uint32_t largest_masked(DType dtype, const void* x, const void* mask, std::int64_t size);
void raise_maxima(DType dtype, const void* x, std::int64_t size, void* maxima);
void upper_halves(DType dtype, const void* x, std::int64_t size, std::uint16_t* halves);
Survey survey(const void* halves, std::int64_t size, std::uint16_t bound);
std::int64_t find_halves(const void* halves, std::int64_t size, std::uint16_t limit, std::int32_t* places);
std::uint32_t rotate(DType dtype, const void* x, std::int64_t size, std::int64_t block, const std::int32_t* excluded,
                     std::int64_t count, float* target);
void encode_absmax(DType dtype, const void* x, std::int64_t size, float absmax, std::int8_t* codes);
void encode_rotated(const float* x, std::int64_t size, float absmax, std::int8_t* codes);
void encode_stochastic(const float* x, std::int64_t size, float scale, std::int64_t row, std::uint64_t seed,
                       std::int8_t* codes);
void encode_zeropoint(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes);
std::int32_t sum(const std::int8_t* codes, std::int64_t size);
void pack(const std::int8_t* codes, std::int64_t stride, std::int64_t cols, std::int64_t k, std::int8_t* packed);
void transpose(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, std::int8_t* target);
void widen(const std::int8_t* w, std::int64_t depth, const float* zeropoint, float* target);
void dequantize_square(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, const float* zeropoint,
                       const float* scale, float* target);
#if defined(__AVX512BF16__)
bool pair(const float* x, std::int64_t depth, std::uint16_t* pairs);
#else
constexpr bool (*pair)(const float* x, std::int64_t depth, std::uint16_t* pairs) = nullptr;
#endif
void multiply_floats(const FloatTile& tile);
void finish_floats(const float* sums, std::int64_t rows, const float* scale, float* y);
void dequantize_columns(const std::int8_t* w, std::int64_t w_stride, const std::int32_t* columns,
                        const std::int32_t* rows, std::int64_t count, std::int64_t cols, const float* zeropoint,
                        const float* scale, float* target);
void rotate_back_column(const std::int8_t* w, std::int64_t w_stride, std::int64_t block, std::int64_t place,
                        std::int64_t cols, const float* zeropoint, const float* scale, float* target);
void epilogue(const EpilogueTile& tile, DType dtype, void* y, std::int64_t y_stride);

}  // namespace octavo::cpu::OCTAVO_ISA
