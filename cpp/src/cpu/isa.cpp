#include "cpu/isa.hpp"

#include <cstdlib>
#include <string>
#include <vector>

#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo::cpu {

// The compiled copies of cpp/src/cpu/kernels (CMakeLists.txt says which).
namespace scalar {
extern const Kernels table;
}
#ifdef OCTAVO_X86_64
namespace avx2 {
extern const Kernels table;
}
namespace avx512_vnni {
extern const Kernels table;
}
#endif

namespace {

// What this processor can run, best first. The compiler's cpuid helper also asks whether the operating system saves
// the wide registers.
std::vector<const Kernels*> tables_available() {
    std::vector<const Kernels*> tables;
#ifdef OCTAVO_X86_64
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
        tables.push_back(&avx512_vnni::table);
    }
    if (__builtin_cpu_supports("avx2")) tables.push_back(&avx2::table);
#endif
    tables.push_back(&scalar::table);
    return tables;
}

const Kernels& choose() {
    const auto available = tables_available();
    const char* wanted = std::getenv("OCTAVO_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return *available.front();
    std::string names;
    for (const Kernels* table : available) {
        if (std::string(table->isa) == wanted) return *table;
        names += (names.empty() ? "" : ", ") + std::string(table->isa);
    }
    throw Error(ErrorKind::value, "environment variable OCTAVO_CPU_ISA: expected one this processor has (" + names +
                                      "), got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace octavo::cpu

namespace octavo {

const char* cpu_isa() { return cpu::kernels().isa; }

std::vector<std::string> cpu_isas_available() {
    std::vector<std::string> names;
    for (const cpu::Kernels* table : cpu::tables_available()) names.emplace_back(table->isa);
    return names;
}

}  // namespace octavo
