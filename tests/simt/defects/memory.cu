// Memory that holds nothing yet, is gone already, or is not the device's; and numbers that do not fit.
#include <memory>

#include "defects.hpp"
#include "ptx.cuh"

using defects::Buffer;
using defects::launch_one;

namespace {

template <bool broken>
__global__ void sum_of_block(const float* in, float* out) {
    __shared__ float parts[8];  // one per warp; the block has fewer
    if (!broken && threadIdx.x < 8) parts[threadIdx.x] = 0.0F;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0F;
        for (const float part : parts) sum += part;
        *out = sum;
    }
}

DEFECT(uninitialized_shared, defects::every) {
    Buffer<float> in(64, 2.0F);
    Buffer<float> out(1);
    launch_one(broken, sum_of_block<true>, sum_of_block<false>, {1, 64}, in.data(), out.data());
    return out.holds(4.0F);
}

__global__ void add_into(const float* in, float* out) { out[threadIdx.x] += in[threadIdx.x]; }

DEFECT(uninitialized_global, defects::every) {
    Buffer<float> in(32, 1.0F);
    Buffer<float> out(32);
    if (!broken) cudaMemset(out.data(), 0, 32 * sizeof(float));
    octavo::cuda::launch(add_into, {1, 32}, nullptr, in.data(), out.data());
    return out.holds(1.0F);
}

template <bool broken>
__global__ void stage(const int4* in, int* out) {
    __shared__ int4 tile[32];
    simt::defer_copy(&tile[threadIdx.x], in + threadIdx.x, 16);
    simt::copy_commit();
    simt::copy_wait(broken ? 1 : 0);
    __syncthreads();
    out[threadIdx.x] = tile[31 - threadIdx.x].y;
}

DEFECT(missing_wait_for_copy, defects::every) {
    Buffer<int4> in(32, {1, 2, 3, 4});
    Buffer<int> out(32);
    launch_one(broken, stage<true>, stage<false>, {1, 32}, in.data(), out.data());
    return out.holds(2);
}

__global__ void fill(int* out) { out[threadIdx.x] = 1; }

DEFECT(use_after_free, defects::every) {
    int* memory = nullptr;
    cudaMallocAsync(reinterpret_cast<void**>(&memory), 128, nullptr);
    if (broken) cudaFreeAsync(memory, nullptr);
    octavo::cuda::launch(fill, {1, 32}, nullptr, memory);
    if (!broken) cudaFreeAsync(memory, nullptr);
    return true;
}

DEFECT(pointer_of_the_host, defects::race) {
    const auto host = std::make_unique<int[]>(32);
    const Buffer<int> device(32);
    octavo::cuda::launch(fill, {1, 32}, nullptr, broken ? host.get() : device.data());
    return true;
}

template <bool broken>
__global__ void quantize(const float* in, signed char* out) {
    const float value = in[threadIdx.x] * 100.0F;
    out[threadIdx.x] = static_cast<signed char>(broken ? value : static_cast<float>(min(max(value, -127.0F), 127.0F)));
}

DEFECT(conversion_that_overflows, defects::asan) {
    Buffer<float> in(32, 2.0F);
    Buffer<signed char> out(32);
    launch_one(broken, quantize<true>, quantize<false>, {1, 32}, in.data(), out.data());
    return broken || out.holds(127);
}

// Of a launch that may begin before the one that writes `in` has ended, but not before that of `older`.
template <bool broken>
__global__ void take_over(const int* older, const int* in, int* out) {
    const int least = older[threadIdx.x];
    if (!broken) octavo::cuda::wait_for_launch_before();
    const int value = in[threadIdx.x];
    if (broken) octavo::cuda::wait_for_launch_before();
    out[threadIdx.x] = max(least, value);
}

constexpr octavo::cuda::Grid early{1, 32, 0, true};

DEFECT(reads_before_waiting, defects::race) {
    Buffer<int> older(32);
    Buffer<int> in(32);
    Buffer<int> out(32);
    octavo::cuda::launch(fill, {1, 32}, nullptr, older.data());
    octavo::cuda::launch(fill, {1, 32}, nullptr, in.data());
    launch_one(broken, take_over<true>, take_over<false>, early, older.data(), in.data(), out.data());
    return out.holds(1);
}

// `older` need not be there when a third launch begins.
template <bool broken>
__global__ void let_go(int* out) {
    if (broken) octavo::cuda::let_next_launch_begin();
    octavo::cuda::wait_for_launch_before();
    if (!broken) octavo::cuda::let_next_launch_begin();
    out[threadIdx.x] = 1;
}

DEFECT(lets_the_next_launch_begin_before_waiting, defects::every) {
    Buffer<int> out(32);
    launch_one(broken, let_go<true>, let_go<false>, early, out.data());
    return out.holds(1);
}

template <bool broken>
__global__ void fill_early(int* out) {
    if (!broken) octavo::cuda::wait_for_launch_before();
    out[threadIdx.x] = 1;
}

DEFECT(never_waits_for_the_launch_before, defects::every) {
    Buffer<int> out(32);
    launch_one(broken, fill_early<true>, fill_early<false>, early, out.data());
    return out.holds(1);
}

}  // namespace
