// Accesses that nothing orders: within a block, and between blocks.
#include "defects.hpp"

using defects::Buffer;
using defects::launch_one;

namespace {

template <bool broken>
__global__ void count_in_shared(int* out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if constexpr (broken) {
        count += 1;
    } else {
        atomicAdd(&count, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) *out = count;
}

DEFECT(lost_update_in_shared, defects::race) {
    Buffer<int> out(1);
    launch_one(broken, count_in_shared<true>, count_in_shared<false>, {1, 64}, out.data());
    return out.holds(64);
}

template <bool broken>
__global__ void count_blocks(int* out) {
    if (threadIdx.x != 0) return;
    if constexpr (broken) {
        *out += 1;
    } else {
        atomicAdd(out, 1);
    }
}

DEFECT(lost_update_between_blocks, defects::race) {
    Buffer<int> out(1, 0);
    launch_one(broken, count_blocks<true>, count_blocks<false>, {8, 32}, out.data());
    return out.holds(8);
}

// Neighbours write bytes of one word, which is no race; and here the same byte, which is.
template <bool broken>
__global__ void write_bytes(signed char* out) {
    out[broken ? threadIdx.x / 2 : threadIdx.x] = 1;
}

DEFECT(two_threads_write_one_byte, defects::race) {
    Buffer<signed char> out(64, 1);
    launch_one(broken, write_bytes<true>, write_bytes<false>, {1, 64}, out.data());
    return out.holds(1);
}

enum class Missing { nothing, release, acquire };

// The last block to finish adds up what all have written.
template <Missing missing>
__global__ void sum_by_last_block(int* partial, unsigned* finished, int* out) {
    __shared__ bool is_last;
    partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        if constexpr (missing != Missing::release) __threadfence();
        is_last = atomicAdd(finished, 1) == gridDim.x - 1;
        if constexpr (missing != Missing::acquire) __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += partial[i];
    *out = sum;
}

template <Missing missing>
bool run_sum(bool broken) {
    Buffer<int> partial(4 * 64);
    Buffer<unsigned> finished(1, 0);
    Buffer<int> out(1);
    launch_one(broken, sum_by_last_block<missing>, sum_by_last_block<Missing::nothing>, {4, 64}, partial.data(),
               finished.data(), out.data());
    return out.holds(4 * 64);
}

DEFECT(missing_fence_before_release, defects::race) { return run_sum<Missing::release>(broken); }
DEFECT(missing_fence_after_acquire, defects::race) { return run_sum<Missing::acquire>(broken); }

}  // namespace
