// Barriers that are missing, or that not every thread reaches.
#include "defects.hpp"

using defects::Buffer;
using defects::launch_one;

namespace {

constexpr int threads = 128;

// Each thread reads what its neighbour in the next warp wrote.
template <bool broken>
__global__ void read_neighbour(int* out) {
    __shared__ int values[threads];
    const int i = static_cast<int>(threadIdx.x);
    values[i] = i;
    if constexpr (!broken) __syncthreads();
    out[i] = values[(i + 32) % threads];
}

DEFECT(missing_barrier_between_write_and_read, defects::every) {
    Buffer<int> out(threads);
    launch_one(broken, read_neighbour<true>, read_neighbour<false>, {1, threads}, out.data());
    for (int i = 0; i < threads; ++i) {
        if (out[static_cast<std::size_t>(i)] != (i + 32) % threads) return false;
    }
    return true;
}

// A counter is zeroed by the last thread and counted up by all.
template <bool broken>
__global__ void count_threads(int* out) {
    __shared__ int count;
    if (threadIdx.x == threads - 1) count = 0;
    if constexpr (!broken) __syncthreads();
    atomicAdd(&count, 1);
    __syncthreads();
    out[threadIdx.x] = count;
}

DEFECT(missing_barrier_before_accumulation, defects::every) {
    Buffer<int> out(threads);
    launch_one(broken, count_threads<true>, count_threads<false>, {1, threads}, out.data());
    return out.holds(threads);
}

// One tile of shared memory, used again in every step.
template <bool broken>
__global__ void sum_tiles(const int* in, int* out, int steps) {
    __shared__ int tile[threads];
    int sum = 0;
    for (int step = 0; step < steps; ++step) {
        tile[threadIdx.x] = in[step];
        __syncthreads();
        sum += tile[(threadIdx.x + 32) % threads];
        if constexpr (!broken) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

DEFECT(missing_barrier_before_reuse, defects::every) {
    Buffer<int> in(4);
    Buffer<int> out(threads);
    for (std::size_t i = 0; i < 4; ++i) in[i] = static_cast<int>(i * i);
    launch_one(broken, sum_tiles<true>, sum_tiles<false>, {1, threads}, in.data(), out.data(), 4);
    return out.holds(14);
}

// A maximum over a warp through shared memory, lane to lane.
template <bool broken>
__global__ void max_of_warp(int* out) {
    __shared__ int values[32];
    int value = static_cast<int>(threadIdx.x);
    for (int distance = 16; distance > 0; distance /= 2) {
        values[threadIdx.x] = value;
        if constexpr (!broken) __syncwarp();
        value = max(value, values[threadIdx.x ^ static_cast<unsigned>(distance)]);
        if constexpr (!broken) __syncwarp();
    }
    out[threadIdx.x] = value;
}

DEFECT(missing_warp_barrier, defects::every) {
    Buffer<int> out(32);
    launch_one(broken, max_of_warp<true>, max_of_warp<false>, {1, 32}, out.data());
    return out.holds(31);
}

template <bool broken>
__global__ void barrier_where_in_range(int* out, int count) {
    const int i = static_cast<int>(threadIdx.x);
    if constexpr (broken) {
        if (i < count) {
            out[i] = i;
            __syncthreads();
        }
    } else {
        if (i < count) out[i] = i;
        __syncthreads();
    }
    // Without this the threads out of range would exit, and the others not wait for them.
    __syncthreads();
}

DEFECT(barrier_in_divergent_branch, defects::every) {
    Buffer<int> out(100);
    launch_one(broken, barrier_where_in_range<true>, barrier_where_in_range<false>, {1, threads}, out.data(), 100);
    return out[99] == 99;
}

template <bool broken>
__global__ void barriers_in_both_branches(int* out) {
    if (broken && threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

DEFECT(different_barriers, defects::every) {
    Buffer<int> out(threads);
    launch_one(broken, barriers_in_both_branches<true>, barriers_in_both_branches<false>, {1, threads}, out.data());
    return out.holds(1);
}

// Each block reads what the next one wrote.
template <bool broken>
__global__ void read_next_block(int* values, int* out) {
    if (threadIdx.x == 0) values[blockIdx.x] = static_cast<int>(blockIdx.x);
    if constexpr (!broken) octavo::cuda::synchronize_grid();
    if (threadIdx.x == 0) out[blockIdx.x] = values[(blockIdx.x + 1) % gridDim.x];
}

DEFECT(missing_barrier_of_the_grid, defects::every) {
    Buffer<int> values(4, -1);
    Buffer<int> out(4);
    launch_one(broken, read_next_block<true>, read_next_block<false>, {4, threads, 0, false, true}, values.data(),
               out.data());
    for (int i = 0; i < 4; ++i) {
        if (out[static_cast<std::size_t>(i)] != (i + 1) % 4) return false;
    }
    return true;
}

template <bool broken>
__global__ void grid_barrier_of_some(int* out) {
    if (!broken || blockIdx.x != 2) octavo::cuda::synchronize_grid();
    if (threadIdx.x == 0) out[blockIdx.x] = 1;
}

DEFECT(barrier_of_the_grid_without_a_block, defects::every) {
    Buffer<int> out(4);
    launch_one(broken, grid_barrier_of_some<true>, grid_barrier_of_some<false>, {4, threads, 0, false, true},
               out.data());
    return out.holds(1);
}

}  // namespace
