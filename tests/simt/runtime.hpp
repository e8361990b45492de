// What tests can ask of the emulated GPU beyond the CUDA runtime, which runtime.cpp stands in for.
#pragma once

#include <cstddef>

namespace simt {

// What was done since the counters were last reset. Work that was captured counts when its graph is launched.
struct Counters {
    long launches = 0;
    long host_functions = 0;    // cudaLaunchHostFunc: each a product of the stand-in for cuBLASLt (cublaslt.cpp)
    long copies = 0;            // cudaMemcpy*, cudaMemset*
    long synchronizations = 0;  // calls that make the host wait for the device
    long allocations = 0;  // calls that take memory from the device or pin it on the host: cudaMalloc, cudaHostAlloc,
                           // and stream-ordered ones that their pool cannot serve from what it has kept
    long pool_allocations = 0;  // stream-ordered ones, all
    long prefetched = 0;        // bytes that kernels asked for ahead of time
    long contexts = 0;          // calls that make a context on a device that has none: cudaSetDevice
};

}  // namespace simt

// Also for who loads the library without linking with it.
extern "C" {
#pragma GCC visibility push(default)

void octavo_simt_counters(simt::Counters* counters);
void octavo_simt_reset_counters();

// Host memory that kernels may access until it is withdrawn. The race build needs it, and reports accesses to other
// host memory; the other builds allow all.
void octavo_simt_register(void* memory, std::size_t size);
void octavo_simt_unregister(void* memory);

#pragma GCC visibility pop
}
