// Declarations of the kernels of the instruction set OCTAVO_ISA, explained in table.hpp.
#pragma once

#include "cpu/kernels/table.hpp"

namespace octavo::cpu::OCTAVO_ISA {

void load(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst);
void store(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride);
Range range(const float* x, std::int64_t size);
void mark_outliers(const float* x, std::int64_t size, float threshold, std::uint8_t* mask);
void encode_absmax(const float* x, std::int64_t size, float absmax, std::int8_t* codes);
void encode_zeropoint(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes);
void scale_sums(const std::int32_t* acc, std::int64_t size, float a, const float* scale, float* y);
void add_scaled(std::int64_t size, float a, const float* x, float* y);
void add_products(std::int64_t size, std::int64_t count, const float* values, const std::int32_t* positions,
                  const float* rows, std::int64_t stride, float* y);
float dot(const float* a, const float* b, std::int64_t size);
std::int32_t sum(const std::int8_t* codes, std::int64_t size);
void gemm(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
          const std::int32_t* b_sums, std::int64_t m, std::int64_t n, std::int64_t k, std::int32_t* acc,
          std::int64_t acc_stride);

}  // namespace octavo::cpu::OCTAVO_ISA
