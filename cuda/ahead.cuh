// Weights on their way from memory to the level-2 cache, while launches that find and quantize X leave memory idle. A
// block asks for its share and goes on; nothing waits for what it asked for, and no result depends on it.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "memory.hpp"
#include "operations.hpp"
#include "ptx.cuh"

namespace octavo::cuda {

// All threads of a block may come here; those of its first warp ask.
__device__ inline void ask_for(const Ahead& ahead) {
    if (threadIdx.x >= warp_size) return;
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned step = gridDim.y * gridDim.x * warp_size;
    for (unsigned i = block * warp_size + threadIdx.x; i < ahead.count; i += step) {
        const unsigned chunk = ahead.first + i * ahead.every;
        const unsigned row = chunk / ahead.chunks_of_row;
        const auto begin = static_cast<std::int32_t>(chunk % ahead.chunks_of_row * ahead_chunk);
        const std::int32_t left = ahead.row_bytes - begin;
        prefetch(ahead.codes + row * ahead.row_stride + begin, left < ahead_chunk ? left : ahead_chunk);
    }
}

// How many blocks a launch should have, so that multiprocessors ask together: one could for less than memory gives.
inline std::int64_t blocks_to_ask(const Ahead& ahead) {
    return std::min<std::int64_t>(blocks_for(ahead.count, warp_size), device_facts().multiprocessors);
}

}  // namespace octavo::cuda
