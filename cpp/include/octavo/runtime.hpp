// What this build and this machine offer, and how many threads the CPU backend uses.
#pragma once

#include <string>
#include <vector>

namespace octavo {

[[nodiscard]] const char* version() noexcept;

// Threads the CPU backend may use, the calling one included. At first: OMP_NUM_THREADS where it is set to a positive
// number, else the processors this process may run on.
[[nodiscard]] int num_threads() noexcept;

// Throws Error (value) unless 1 <= count <= 1024.
void set_num_threads(int count);

// Instruction set of the CPU kernels in use: "avx512_vnni", "avx2" or "scalar". The best one this processor has, or the
// one the environment variable OCTAVO_CPU_ISA names at first use. Throws Error (value) where that name is unknown or
// the processor lacks it.
[[nodiscard]] const char* cpu_isa();

// The instruction sets this processor can run, best first.
[[nodiscard]] std::vector<std::string> cpu_isas_available();

}  // namespace octavo
