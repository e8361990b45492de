// The inner loops of the CPU backend, one table of them per instruction set.
//
// The two sources beside this header are compiled once per instruction set with other flags (CMakeLists.txt) and fill
// one table each; isa.cpp picks the table at run time. They work on contiguous float32 rows and int8 tiles, know no
// threads and allocate nothing. All tables give identical codes and integers.
//
// Rule for those sources: include no standard header with inline functions. A copy of std::max compiled for AVX-512
// could be the one the linker keeps for the whole program, and then crash on an older processor.
#pragma once

#include <cstdint>

#include "octavo/types.hpp"

namespace octavo::cpu {

// Least and greatest value of a run of floats; `finite` is false where it holds NaN or Inf (min, max then unspecified).
struct Range {
    float min;
    float max;
    bool finite;
};

struct Kernels {
    const char* isa;

    // dst[i] = src[i * stride] as float32; src is f32, f16 or bf16 and needs no alignment.
    void (*load)(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst);
    // dst[i * stride] = src[i], rounded half to even to f32, f16 or bf16.
    void (*store)(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride);
    // size >= 1.
    Range (*range)(const float* x, std::int64_t size);
    // mask[i] |= not (|x[i]| < threshold)
    void (*mark_outliers)(const float* x, std::int64_t size, float threshold, std::uint8_t* mask);
    // codes[i] = rint(x[i] * 127 / absmax), for absmax > 0 and |x[i]| <= absmax.
    void (*encode_absmax)(const float* x, std::int64_t size, float absmax, std::int8_t* codes);
    // codes[i] = clip(rint(nd * x[i]) - zeropoint, -127, 127), for finite nd * x[i].
    void (*encode_zeropoint)(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes);
    // y[i] = float(acc[i]) * (a * scale[i])
    void (*scale_sums)(const std::int32_t* acc, std::int64_t size, float a, const float* scale, float* y);
    // y[i] += a * x[i]
    void (*add_scaled)(std::int64_t size, float a, const float* x, float* y);
    // y[i] += values[0] * rows[positions[0] * stride + i] + values[1] * ..., one after the other, for i < size;
    // positions null: 0, 1, 2, ...
    void (*add_products)(std::int64_t size, std::int64_t count, const float* values, const std::int32_t* positions,
                         const float* rows, std::int64_t stride, float* y);
    // sum_i a[i] * b[i] in float32, over 64 interleaved partial sums.
    float (*dot)(const float* a, const float* b, std::int64_t size);
    // sum_i codes[i]; size <= 2^24.
    std::int32_t (*sum)(const std::int8_t* codes, std::int64_t size);
    // acc[i * acc_stride + j] = sum_k a[i * a_stride + k] * b[j * b_stride + k], for k <= max_int32_depth.
    // b_sums[j] = sum_k b[j * b_stride + k].
    void (*gemm)(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
                 const std::int32_t* b_sums, std::int64_t m, std::int64_t n, std::int64_t k, std::int32_t* acc,
                 std::int64_t acc_stride);
};

// The largest k for which a sum of products of int8 values (-128 included) fits an int32: floor((2^31 - 1) / 2^14).
inline constexpr std::int64_t max_int32_depth = 131071;

}  // namespace octavo::cpu
