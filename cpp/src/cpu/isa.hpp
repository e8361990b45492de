// Which instruction set the CPU backend uses.
#pragma once

#include "cpu/kernels/table.hpp"

namespace octavo::cpu {

// The table in use, chosen once (octavo/runtime.hpp, cpu_isa). Throws Error (value) where OCTAVO_CPU_ISA cannot be met.
const Kernels& kernels();

}  // namespace octavo::cpu
