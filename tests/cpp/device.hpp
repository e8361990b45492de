// The device that the tests' arrays are on: the CPU, or, with OCTAVO_TEST_DEVICE=cuda, a GPU or the emulated one of
// tests/simt, whichever the backend at OCTAVO_CUDA_LIBRARY is for. Host and device read and write the same memory.
#pragma once

#include <cstddef>
#include <string>

#include "octavo/types.hpp"

octavo::Device test_device();

// Why the tests cannot run on that device here; empty where they can.
std::string missing_device();

// Memory that both a GPU and the host can use, or null where any memory will do: on the CPU, and emulated.
void* allocate_pinned(std::size_t size);
void free_pinned(void* memory);

// Tell the emulator of memory that kernels may use, until it is told otherwise. Elsewhere, nothing.
void announce(void* memory, std::size_t size);
void withdraw(void* memory);

// Wait until the device has done what it was given.
void wait_for_device();
