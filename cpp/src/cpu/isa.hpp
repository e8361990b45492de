// Which instruction set the CPU backend uses.
#pragma once

#include <vector>

#include "cpu/kernels/table.hpp"

namespace octavo::cpu {

// The table in use, chosen once (octavo/runtime.hpp, cpu_isa). Throws Error (value) where OCTAVO_CPU_ISA cannot be met.
const Kernels& kernels();

// Those that this build has and this processor can run, best first; the last is the scalar one.
std::vector<const Kernels*> tables_available();

}  // namespace octavo::cpu
