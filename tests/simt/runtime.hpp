// What tests can ask of the emulated GPU beyond the CUDA runtime, which runtime.cpp stands in for.
#pragma once

#include <cstddef>

#define SIMT_EXPORT __attribute__((visibility("default")))

namespace simt {

// What was done since the last `reset_counters`. Work that was captured counts when its graph is launched.
struct Counters {
    long launches = 0;
    long copies = 0;            // cudaMemcpy*, cudaMemset*
    long synchronizations = 0;  // calls that make the host wait for the device
    long allocations = 0;  // calls that take memory from the device or pin it on the host: cudaMalloc, cudaHostAlloc,
                           // and stream-ordered ones that their pool cannot serve from what it has kept
    long pool_allocations = 0;  // stream-ordered ones, all
};
SIMT_EXPORT Counters counters();
SIMT_EXPORT void reset_counters();

// Host memory that kernels may access from now on. The race build needs it, and reports accesses to other host memory;
// the other builds allow all.
SIMT_EXPORT void register_memory(const void* memory, std::size_t size);
SIMT_EXPORT void unregister_memory(const void* memory);

}  // namespace simt
