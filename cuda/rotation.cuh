// Numbers of a weight whose rows were rotated (octavo/quantize.hpp).
#pragma once

#include <cstdint>

#include "device.cuh"

namespace octavo::cuda {

// sqrt(rotation), a power of two.
__host__ __device__ inline float root_of(int rotation) { return rotation == 16 ? 4.0F : rotation == 64 ? 8.0F : 16.0F; }

// Column `col` of the rotated row of codes + zeropoint, rotated back: the sum of the codes of its block with the signs
// of a row of Sylvester's matrix, exact, times the factor; and the zeropoint, which only the first column of a block
// has.
__device__ inline float rotated_back(const View<const std::int8_t>& codes, std::int64_t row, std::int64_t col,
                                     int rotation, float zeropoint) {
    const auto place = static_cast<int>(col % rotation);
    std::int32_t sum = 0;
    for (int h = 0; h < rotation; ++h) {
        const std::int32_t code = *codes.at(row, col - place + h);
        sum += __popc(static_cast<unsigned>(place & h)) % 2 == 0 ? code : -code;
    }
    const float root = root_of(rotation);
    return __fadd_rn(static_cast<float>(sum) / root, place == 0 ? __fmul_rn(zeropoint, root) : 0.0F);
}

}  // namespace octavo::cuda
