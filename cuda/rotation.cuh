// Rows in blocks of features times the Hadamard matrix over its root (octavo/quantize.hpp), and back, which is the
// same.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace octavo::cuda {

// sqrt(rotation), a power of two.
__host__ __device__ inline float root_of(int rotation) { return rotation == 16 ? 4.0F : rotation == 64 ? 8.0F : 16.0F; }

// The features of the largest block: whole blocks of every rotation.
inline constexpr int most_rotation = 256;

// What a group is rotated times where its sums, of up to 256 numbers, overflow.
inline constexpr float rotation_factor = 0x1p-8F;

// Of `most_rotation` features of a row, of which each thread of a block has one, this thread's after rotation. In each
// step a thread reads the number that is `distance` away from shared memory, of which there are two so that one barrier
// a step does.
__device__ inline float rotated(float value, int thread, int rotation, float (&shared)[2][most_rotation]) {
    if (rotation == 0) return value;
    int turn = 0;
    for (int distance = 1; distance < rotation; distance *= 2, turn ^= 1) {
        shared[turn][thread] = value;
        __syncthreads();
        const float other = shared[turn][thread ^ distance];
        value = (thread & distance) == 0 ? __fadd_rn(value, other) : __fadd_rn(other, -value);
    }
    return value / root_of(rotation);
}

// Rotates what a warp holds of a row, in place: `parts` pieces, one behind the other, of each of which every lane has
// `count` elements side by side. Blocks are at most as long as all of it. All 32 lanes must take part.
template <int parts, int count>
__device__ void rotate_in_warp(float (*values)[count], int rotation) {
    const auto butterfly = [](float& first, float& second) {
        const float sum = __fadd_rn(first, second);
        second = __fadd_rn(first, -second);
        first = sum;
    };
    const unsigned lane = threadIdx.x % warp_size;
#pragma unroll
    for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int distance = 1; distance < count; distance *= 2) {
#pragma unroll
            for (int i = 0; i < count; ++i) {
                if ((i & distance) == 0) butterfly(values[part][i], values[part][i + distance]);
            }
        }
#pragma unroll 1
        for (int distance = 1; distance < warp_size && distance * count < rotation; distance *= 2) {
            const float sign = (lane & static_cast<unsigned>(distance)) == 0 ? 1.0F : -1.0F;
#pragma unroll
            for (int i = 0; i < count; ++i) {
                float& value = values[part][i];
                value = __fmaf_rn(value, sign, __shfl_xor_sync(whole_warp, value, distance));
            }
        }
    }
    static_assert(parts <= 2 && parts * warp_size * count >= most_rotation);
    if (parts == 2 && rotation > warp_size * count) {
#pragma unroll
        for (int i = 0; i < count; ++i) butterfly(values[0][i], values[parts - 1][i]);
    }
    const float factor = 1.0F / root_of(rotation);  // a power of two: the quotient, too
#pragma unroll
    for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int i = 0; i < count; ++i) values[part][i] *= factor;
    }
}

// The signs of four neighbours in row `place` of Sylvester's matrix: bytes of 1 and -1.
__device__ inline std::uint32_t signs_of_four(unsigned place) {
    const std::uint32_t negative = ((place & 1U) != 0 ? 0xFF00FF00U : 0U) ^ ((place & 2U) != 0 ? 0xFFFF0000U : 0U);
    return 0x01010101U ^ (negative & 0xFEFEFEFEU);
}

// Column `col` of the rotated row of codes + zeropoint, rotated back: the sum of the codes of its block with the signs
// of a row of Sylvester's matrix, exact, times the factor; and the zeropoint, which only the first column of a block
// has.
__device__ inline float rotated_back(const View<const std::int8_t>& codes, std::int64_t row, std::int64_t col,
                                     int rotation, float zeropoint) {
    const unsigned place = static_cast<unsigned>(col) % static_cast<unsigned>(rotation);
    const std::int8_t* const block = codes.at(row, col - place);
    constexpr int wide = 16;
    std::int32_t sum = 0;
    const auto add = [&](unsigned other, std::int32_t part) { sum += __popc(place & other) % 2 == 0 ? part : -part; };
    if (codes.col_stride == 1 && reinterpret_cast<std::uintptr_t>(block) % wide == 0) {
        const auto signs = static_cast<int>(signs_of_four(place));
#pragma unroll 1
        for (int h = 0; h < rotation; h += wide) {
            const auto words = load<wide / 4>(reinterpret_cast<const std::uint32_t*>(block + h));
#pragma unroll
            for (int w = 0; w < wide / 4; ++w) add(h + 4 * w, __dp4a(static_cast<int>(words[w]), signs, 0));
        }
    } else {
        for (int h = 0; h < rotation; ++h) add(h, block[h * codes.col_stride]);
    }
    const float root = root_of(rotation);
    return __fadd_rn(static_cast<float>(sum) / root, place == 0 ? __fmul_rn(zeropoint, root) : 0.0F);
}

}  // namespace octavo::cuda
