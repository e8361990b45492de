// Which instruction set the CPU backend uses.
#pragma once

#include <vector>

#include "cpu/kernels/table.hpp"

namespace octavo::cpu {

// The table in use, chosen once (octavo/runtime.hpp, cpu_isa). Throws Error (value) where OCTAVO_CPU_ISA cannot be met.
const Kernels& kernels();

// Those that this build has and this processor can run, best first; the last is the scalar one.
std::vector<const Kernels*> tables_available();

// Whether the processor by itself reads a few streams of memory that lie side by side as fast as memory is, so that
// asking for their lines ahead only costs. AMD's do (Zen 4: 24.7 GB/s, with lines asked for 2 KiB ahead 20.6).
bool fetches_streams();

}  // namespace octavo::cpu
