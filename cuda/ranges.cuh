// The range of some values, as it is found: by integer maxima of bit patterns, in any order of threads.
#pragma once

#include <cstdint>

#include "bits.cuh"
#include "octavo/types.hpp"
#include "operations.hpp"

namespace octavo::cuda {

__device__ inline void widen(std::uint32_t& bound, std::uint32_t other) { bound = bound > other ? bound : other; }

__device__ inline void widen(Range& range, const Range& other) {
    widen(range.high, other.high);
    widen(range.low, other.low);
}

// Unsigned numbers in the order of floats: NaN and Inf lie beyond all others, at the end of their sign.
__device__ inline std::uint32_t ordered(float value) {
    const std::uint32_t bits = __float_as_uint(value);
    return bits ^ ((bits & 0x80000000U) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}
__device__ inline float from_ordered(std::uint32_t order) {
    return __uint_as_float(order ^ ((order & 0x80000000U) != 0 ? 0x80000000U : 0xFFFFFFFFU));
}

// Takes in a number of type T.
template <class T, Scheme scheme>
__device__ void widen(Range& range, Bits<T> bits) {
    if constexpr (scheme == Scheme::absmax) {
        range.high = max_magnitudes<T>(range.high, bits);
    } else {
        const std::uint32_t order = ordered(number_of<T>(bits));
        widen(range.high, order);
        widen(range.low, ~order);
    }
}

}  // namespace octavo::cuda
