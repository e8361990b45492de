// The kernel tables that this build has and this processor can run.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/kernels/table.hpp"
#include "octavo/runtime.hpp"

namespace octavo::cpu {
namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx_vnni {
extern const Kernels table;
}
namespace avx512bw {
extern const Kernels table;
}
namespace avx512_vnni {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon_dotprod {
extern const Kernels table;
}
namespace neon_i8mm {
extern const Kernels table;
}
#endif
}  // namespace octavo::cpu

// The first is the scalar one.
inline std::vector<const octavo::cpu::Kernels*> tables() {
    std::vector<const octavo::cpu::Kernels*> all{&octavo::cpu::scalar::table};
#if defined(__x86_64__)
    all.push_back(&octavo::cpu::avx2::table);
    all.push_back(&octavo::cpu::avx_vnni::table);
    all.push_back(&octavo::cpu::avx512bw::table);
    all.push_back(&octavo::cpu::avx512_vnni::table);
    all.push_back(&octavo::cpu::amx::table);
#elif defined(__aarch64__)
    all.push_back(&octavo::cpu::neon_dotprod::table);
    all.push_back(&octavo::cpu::neon_i8mm::table);
#endif
    const auto available = octavo::cpu_isas_available();
    std::erase_if(all, [&](const auto* table) { return std::ranges::find(available, table->isa) == available.end(); });
    return all;
}
