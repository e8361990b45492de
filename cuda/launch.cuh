// How kernels are written and launched, so that one source runs on a GPU and, in tests, on the CPU.
//
// Kernels are plain CUDA C++ but for three things: they are launched by `launch`, they declare dynamic shared memory by
// OCTAVO_DYNAMIC_SHARED, and PTX instructions stand behind the functions of ptx.cuh. tests/simt then compiles the same
// files as C++ (OCTAVO_SIMT), with its own threads, barriers and warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef OCTAVO_SIMT

#include "simt.hpp"

#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

// `T* name`: the dynamic shared memory of the block, aligned to 16 bytes.
#define OCTAVO_DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char octavo_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(octavo_dynamic_shared)

#endif

#include "check.hpp"

namespace octavo::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xFFFFFFFFU;

// What this code is compiled for, as DeviceFacts::architecture; 0 for the host, whose code never depends on it.
#ifdef __CUDA_ARCH__
constexpr int compiled_for = __CUDA_ARCH__ / 10;
#else
constexpr int compiled_for = 0;
#endif

// For the bodies of kernels on architectures that never launch them: ends the launch with an error, should one do so
// after all, instead of leaving the output as it was.
__device__ inline void must_not_run() {
#ifdef OCTAVO_SIMT
    simt::fail("a kernel runs on an architecture that it has no code for");
#else
    __trap();
#endif
}

// What a launch is made of. `shared` is the dynamic shared memory of a block, in bytes. `early`: it may begin before
// the one before it in the stream has ended (sm_90); its threads call `wait_for_launch_before` (ptx.cuh) before
// anything else. `cooperative`: all blocks run at once, and can wait for each other (`synchronize_grid`); a launch of
// more than are resident together is refused.
struct Grid {
    dim3 blocks;
    dim3 threads;
    std::size_t shared = 0;
    bool early = false;
    bool cooperative = false;
};

// Waits for all threads of the grid, which must all come here; what they wrote before is seen by all behind it. Only
// in cooperative launches.
__device__ inline void synchronize_grid(
#ifdef OCTAVO_SIMT
    const simt::Loc& loc = simt::Loc::current()) {
    simt::grid_barrier(loc);
#else
) {
    cooperative_groups::this_grid().sync();
#endif
}

// Blocks of `size` that cover `count`.
constexpr std::int64_t blocks_for(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Enqueue a kernel. Throws Error (device) where the launch is refused. Every block may use more than 48 KiB of dynamic
// shared memory where `allow_shared` was called for the kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, Arguments&&... arguments) {
#ifdef OCTAVO_SIMT
    check(simt::launch(kernel, grid.blocks, grid.threads, grid.shared, grid.early, grid.cooperative, stream,
                       static_cast<Parameters>(std::forward<Arguments>(arguments))...),
          "launch");
#else
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (grid.early) {
        cudaLaunchAttribute& early = attributes[config.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (grid.cooperative) {
        cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
        cooperative.id = cudaLaunchAttributeCooperative;
        cooperative.val.cooperative = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...),
          "cudaLaunchKernelEx");
#endif
}

// Let blocks of a kernel use `bytes` of dynamic shared memory, beyond the 48 KiB that need no asking.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), std::size_t bytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "cudaFuncSetAttribute");
}

}  // namespace octavo::cuda
