// Accesses past the end, and at addresses that hardware refuses.
#include "defects.hpp"

using defects::Buffer;
using defects::launch_one;

namespace {

template <bool broken>
__global__ void copy(const float* in, float* out, int count) {
    for (int i = static_cast<int>(threadIdx.x); broken ? i <= count : i < count; i += static_cast<int>(blockDim.x)) {
        out[i] = in[i];
    }
}

DEFECT(read_past_global, defects::every) {
    Buffer<float> in(64, 2.0F);
    Buffer<float> out(128);
    launch_one(broken, copy<true>, copy<false>, {1, 32}, in.data(), out.data(), 64);
    return out[63] == 2.0F;
}

DEFECT(write_past_global, defects::every) {
    Buffer<float> in(128, 2.0F);
    Buffer<float> out(64);
    launch_one(broken, copy<true>, copy<false>, {1, 32}, in.data(), out.data(), 64);
    return out.holds(2.0F);
}

// 63 elements leave a few bytes before the page that ends the memory.
DEFECT(write_past_global_of_odd_size, defects::every) {
    Buffer<float> in(128, 2.0F);
    Buffer<float> out(63);
    launch_one(broken, copy<true>, copy<false>, {1, 32}, in.data(), out.data(), 63);
    return out.holds(2.0F);
}

template <bool broken>
__global__ void reverse(const int* in, int* out) {
    __shared__ int values[32];
    const int i = static_cast<int>(threadIdx.x);
    values[i] = in[i];
    __syncthreads();
    out[i] = values[broken ? 32 - i : 31 - i];
}

DEFECT(read_past_shared, defects::plain | defects::asan) {
    Buffer<int> in(32, 7);
    Buffer<int> out(32);
    launch_one(broken, reverse<true>, reverse<false>, {1, 32}, in.data(), out.data());
    return out.holds(7);
}

template <bool broken>
__global__ void fill_pointed_to(int* out) {
    __shared__ int values[32];
    int* const at = values + threadIdx.x;  // so that the compiler cannot see the array's bounds
    at[broken ? 1 : 0] = 5;
    __syncthreads();
    out[threadIdx.x] = broken ? 5 : values[threadIdx.x];
}

DEFECT(write_past_shared, defects::asan) {
    Buffer<int> out(32);
    launch_one(broken, fill_pointed_to<true>, fill_pointed_to<false>, {1, 32}, out.data());
    return out.holds(5);
}

__global__ void fill_dynamic(int* out) {
    OCTAVO_DYNAMIC_SHARED(int, values);
    values[threadIdx.x] = 3;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

DEFECT(too_little_dynamic_shared, defects::every) {
    Buffer<int> out(64);
    octavo::cuda::launch(fill_dynamic, {1, 64, sizeof(int) * (broken ? 60 : 64)}, nullptr, out.data());
    return out.holds(3);
}

struct alignas(16) Four {
    float values[4];
};

__global__ void copy_wide(const float* in, Four* out) {
    out[threadIdx.x] = reinterpret_cast<const Four*>(in)[threadIdx.x];
}

DEFECT(misaligned_vector_load, defects::asan | defects::race) {
    Buffer<float> in(132, 1.0F);
    Buffer<Four> out(32);
    octavo::cuda::launch(copy_wide, {1, 32}, nullptr, in.data() + (broken ? 1 : 4), out.data());
    return out[31].values[3] == 1.0F;
}

}  // namespace
