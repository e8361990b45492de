// The kernel tables that this build has and this processor can run.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/isa.hpp"

// The first is the scalar one.
inline std::vector<const octavo::cpu::Kernels*> tables() {
    auto all = octavo::cpu::tables_available();
    std::ranges::reverse(all);
    return all;
}
