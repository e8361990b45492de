// Floating-point numbers as bit patterns, packed in 32-bit words as they come from memory.
//
// Without its sign bit a number's pattern orders like its magnitude, with Inf and NaN on top. So a largest magnitude is
// found by integer instructions, two 16-bit numbers at a time, and shows whether anything was NaN or Inf.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "device.cuh"

namespace octavo::cuda {

// What an element of type T is in memory.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>;

// 16 bytes of a row: `per_access<T>` elements.
using Quad = Pack<std::uint32_t, 4>;

template <class T>
__device__ inline std::uint32_t element_bits(const Quad& quad, int index) {
    if constexpr (sizeof(T) == 4) {
        return quad[index];
    } else {
        return quad[index / 2] >> (16 * (index % 2)) & 0xFFFFU;
    }
}

// An element of a quad that is 0 there so far.
template <class T>
__device__ inline void put_element(Quad& quad, int index, Bits<T> bits) {
    if constexpr (sizeof(T) == 4) {
        quad[index] = bits;
    } else {
        quad[index / 2] |= static_cast<std::uint32_t>(bits) << (16 * (index % 2));
    }
}

template <class T>
__device__ inline void clear_element(Quad& quad, int index) {
    if constexpr (sizeof(T) == 4) {
        quad[index] = 0;
    } else {
        quad[index / 2] &= index % 2 == 0 ? 0xFFFF0000U : 0x0000FFFFU;
    }
}

// The number whose pattern is given.
template <class T>
__device__ inline float number_of(std::uint32_t bits) {
    if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __uint_as_float(bits << 16);
    } else {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    }
}

template <class T>
__device__ inline float element(const Quad& quad, int index) {
    return number_of<T>(element_bits<T>(quad, index));
}

__device__ inline bool is_finite(float value) { return (__float_as_uint(value) & 0x7F800000U) != 0x7F800000U; }

// The larger of each pair of 16-bit halves.
__device__ inline std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) { return __vmaxu2(a, b); }

// The larger magnitudes of the elements in a word: `largest` holds magnitudes, `word` numbers.
template <class T>
__device__ inline std::uint32_t max_magnitudes(std::uint32_t largest, std::uint32_t word) {
    if constexpr (sizeof(T) == 4) {
        const std::uint32_t magnitude = word & 0x7FFFFFFFU;
        return largest > magnitude ? largest : magnitude;
    } else {
        return max_halves(largest, word & 0x7FFF7FFFU);
    }
}

// The largest element of a word of magnitudes.
template <class T>
__device__ inline std::uint32_t max_of_word(std::uint32_t word) {
    if constexpr (sizeof(T) == 4) {
        return word;
    } else {
        return (word & 0xFFFFU) > (word >> 16) ? word & 0xFFFFU : word >> 16;
    }
}

// All 32 lanes must take part; every lane gets the result.
__device__ inline std::uint32_t max_of_warp(std::uint32_t value) {
#if defined(OCTAVO_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
    return __reduce_max_sync(whole_warp, value);
#else
    return reduce_warp(value, [](std::uint32_t a, std::uint32_t b) { return a > b ? a : b; });
#endif
}

}  // namespace octavo::cuda
