// What the parts of the emulated GPU share: the fiber that runs, the launch it belongs to, memory and its shadow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "simt.hpp"

// How the build is instrumented (CMakeLists.txt): OCTAVO_SIMT_ASAN, OCTAVO_SIMT_RACE, or neither.
#ifdef OCTAVO_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

struct Range {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;

    [[nodiscard]] bool holds(std::uintptr_t address) const { return address >= begin && address < end; }
    [[nodiscard]] std::size_t size() const { return end - begin; }
};

// --- executor.cpp ---------------------------------------------------------------------------------------------------

// Launches and the calls of the runtime exclude each other, whichever host thread makes them.
std::recursive_mutex& machine_mutex();

// Where the running fiber stands.
struct Position {
    bool in_kernel = false;  // else the host runs
    std::uint32_t launch = 0;
    std::uint32_t block = 0;
    std::uint16_t thread = 0;
    std::uint32_t block_epoch = 0;  // barriers that this block has passed
    std::uint32_t warp_epoch = 0;   // __syncwarp that this thread has passed
    bool too_early = false;         // the launch before may not have ended, as far as this thread knows
};
const Position& position();

// Whether the hardware would refuse a launch, and how.
cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared);

// Runs a kernel to its end. The caller holds the mutex.
void run_kernel(dim3 grid, dim3 block, std::size_t shared, const Call& call);

// Let the kernel's blocks use this much dynamic shared memory.
void allow_dynamic_shared(const void* kernel, std::size_t bytes);
Range dynamic_shared_range();
Range fiber_stacks();

// --- shared_variables.cpp -------------------------------------------------------------------------------------------

struct SharedVariable {
    Range range;
    const void* function = nullptr;  // that declares it; null where it has no symbol of its own
};

// Of the executable or library that holds `kernel`.
const std::vector<SharedVariable>& shared_variables(const void* kernel);

// Bytes of those that the kernel declares itself; what functions declare that it calls is not known to be its own.
std::size_t static_shared(const void* kernel);

// --- race.cpp: nothing of it does anything but in the race build -----------------------------------------------------

void race_begin_launch(const Call& call);
void race_begin_block();

// Stops the test where the launch had a race.
void race_end_launch();
void race_register(const void* memory, std::size_t size);
void race_unregister(const void* memory);

}  // namespace simt
