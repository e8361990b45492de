// Collectives of a warp that not all their lanes reach, or not together.
#include "defects.hpp"

using defects::Buffer;
using defects::launch_one;

namespace {

template <bool broken>
__global__ void sum_in_range(int* out, int count) {
    const int lane = static_cast<int>(threadIdx.x);
    int value = lane < count ? 1 : 0;
    if (!broken || lane < count) {
        for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, distance);
    }
    __syncwarp();
    out[lane] = value;
}

DEFECT(shuffle_in_divergent_branch, defects::every) {
    Buffer<int> out(32);
    launch_one(broken, sum_in_range<true>, sum_in_range<false>, {1, 32}, out.data(), 20);
    return out.holds(20);
}

// Lanes that are done early are not there to be read from.
template <bool broken>
__global__ void sum_after_exit(int* out, int count) {
    const int lane = static_cast<int>(threadIdx.x);
    if (broken && lane >= count) return;
    int value = lane < count ? 1 : 0;
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, distance);
    if (lane == 0) *out = value;
}

DEFECT(shuffle_after_exit, defects::every) {
    Buffer<int> out(1);
    launch_one(broken, sum_after_exit<true>, sum_after_exit<false>, {1, 32}, out.data(), 20);
    return out.holds(20);
}

template <bool broken>
__global__ void shuffles_in_both_branches(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    int value = 0;
    if (broken && lane % 2 == 0) {
        value = __shfl_sync(0xFFFFFFFFU, lane, 3);
    } else {
        value = __shfl_sync(0xFFFFFFFFU, lane, 3);
    }
    out[lane] = value;
}

DEFECT(different_shuffles, defects::every) {
    Buffer<int> out(32);
    launch_one(broken, shuffles_in_both_branches<true>, shuffles_in_both_branches<false>, {1, 32}, out.data());
    return out.holds(3);
}

template <bool broken>
__global__ void ballot_of_half(unsigned* out) {
    const unsigned mask = broken || threadIdx.x < 16 ? 0x0000FFFFU : 0xFFFF0000U;
    out[threadIdx.x] = __ballot_sync(mask, 1) != 0 ? 1 : 0;
}

DEFECT(lane_outside_its_mask, defects::every) {
    Buffer<unsigned> out(32);
    launch_one(broken, ballot_of_half<true>, ballot_of_half<false>, {1, 32}, out.data());
    return out.holds(1);
}

// Stands for an instruction such as mma, which all 32 lanes must execute.
__device__ void whole_warp_instruction() {
    simt::whole_warp_collective("mma", {}, [](simt::Lane*, unsigned) {}, simt::Loc::current());
}

template <bool broken>
__global__ void whole_warp_in_range(int* out, int count) {
    if (broken && static_cast<int>(threadIdx.x) >= count) return;
    whole_warp_instruction();
    if (threadIdx.x == 0) *out = 1;
}

DEFECT(instruction_of_whole_warp_without_some_lanes, defects::every) {
    Buffer<int> out(1);
    launch_one(broken, whole_warp_in_range<true>, whole_warp_in_range<false>, {1, 32}, out.data(), 31);
    return out.holds(1);
}

}  // namespace
