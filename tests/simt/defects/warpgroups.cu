// Products of warpgroups: the order in which their operands are written, multiplied and read, and written again.
#include "defects.hpp"
#include "ptx.cuh"

using defects::Buffer;

namespace {

enum class Mistake {
    none,
    no_fence,            // before the product
    no_fence_of_copies,  // by the threads that copied the operands
    no_barrier,          // between these copies and the product
    no_wait,             // before the sums are read
    late_wait,           // behind the copy of what is multiplied next
    warps_differ         // in how many products they begin
};

constexpr int cols = 128;
constexpr int row_bytes = 128;
constexpr int threads = 128;
constexpr int stage_bytes = (64 + cols) * row_bytes;

// Sums of products of two slices, which are in one place one after the other. All rows of a slice are the same, so the
// order of banks does not matter.
template <Mistake mistake>
__global__ void multiply_two(const std::int8_t* slices, std::int32_t* out) {
    OCTAVO_DYNAMIC_SHARED(std::int8_t, memory);
    std::int8_t* const shared = memory + (1024 - octavo::cuda::shared_address(memory) % 1024) % 1024;
    const int thread = static_cast<int>(threadIdx.x);
    const auto copy = [&](int slice) {
        for (int i = thread * 16; i < stage_bytes; i += threads * 16) {
            octavo::cuda::copy_async_16(shared + i, slices + slice * 16, 16);
        }
        octavo::cuda::copy_async_commit();
    };
    std::int32_t sums[cols / 8][4] = {};
    copy(0);
    for (int slice = 0; slice < 2; ++slice) {
        octavo::cuda::copy_async_wait<0>();
        if (mistake != Mistake::no_fence_of_copies) octavo::cuda::fence_async_proxy();
        if (mistake != Mistake::no_barrier) __syncthreads();
        if (mistake != Mistake::no_fence) octavo::cuda::wgmma_fence();
        if (mistake != Mistake::warps_differ || thread < 96) {
            octavo::cuda::wgmma_s8<cols>(sums, octavo::cuda::wgmma_matrix(shared),
                                         octavo::cuda::wgmma_matrix(shared + 64 * row_bytes));
        }
        octavo::cuda::wgmma_commit();
        if (mistake == Mistake::late_wait) {
            __syncthreads();
            if (slice == 0) copy(1);
        }
        if (mistake != Mistake::no_wait) octavo::cuda::wgmma_wait<0>();
        if (mistake != Mistake::late_wait) {
            __syncthreads();
            if (slice == 0) copy(1);
        }
    }
    for (int u = 0; u < cols / 8; ++u) {
        for (int r = 0; r < 4; ++r) out[(thread * cols / 8 + u) * 4 + r] = sums[u][r];
    }
}

template <Mistake mistake>
bool run(bool broken) {
    Buffer<std::int8_t> slices(32, 2);
    for (std::size_t i = 16; i < 32; ++i) slices[i] = -3;
    Buffer<std::int32_t> out(64 * cols);
    const octavo::cuda::Grid grid{1, threads, stage_bytes + 1024};
    octavo::cuda::allow_shared(multiply_two<mistake>, grid.shared);
    octavo::cuda::allow_shared(multiply_two<Mistake::none>, grid.shared);
    defects::launch_one(broken, multiply_two<mistake>, multiply_two<Mistake::none>, grid,
                        static_cast<const std::int8_t*>(slices.data()), out.data());
    return out.holds(32 * (4 + 9));
}

}  // namespace

DEFECT(wgmma_without_fence, defects::every) { return run<Mistake::no_fence>(broken); }
DEFECT(wgmma_of_copies_without_fence, defects::every) { return run<Mistake::no_fence_of_copies>(broken); }
DEFECT(wgmma_without_barrier, defects::every) { return run<Mistake::no_barrier>(broken); }
DEFECT(wgmma_without_wait, defects::every) { return run<Mistake::no_wait>(broken); }
DEFECT(wgmma_waits_too_late, defects::every) { return run<Mistake::late_wait>(broken); }
DEFECT(wgmma_of_some_warps, defects::every) { return run<Mistake::warps_differ>(broken); }
