#include "cpu/isa.hpp"

#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef OCTAVO_X86_64
#include <cpuid.h>
#endif

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
#ifndef OCTAVO_FEWER_TABLES
namespace avx_vnni {
extern const Kernels table;
}
namespace avx512bw {
extern const Kernels table;
}
#endif
namespace avx512_vnni {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
#endif
#ifdef OCTAVO_AARCH64
namespace neon_dotprod {
extern const Kernels table;
}
namespace neon_i8mm {
extern const Kernels table;
}
#endif

namespace {

#ifdef OCTAVO_X86_64

// What the compiler's cpuid helper does not know by name in all versions: bits of leaf 7.
struct Leaf7 {
    bool avx_vnni = false;
    bool avx512_bf16 = false;
    bool amx_int8 = false;
};

Leaf7 leaf_7() {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    Leaf7 found;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return found;
    const unsigned last_subleaf = eax;
    constexpr unsigned amx_tile = 1U << 24U;
    constexpr unsigned amx_int8 = 1U << 25U;
    found.amx_int8 = (edx & amx_tile) != 0 && (edx & amx_int8) != 0;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) {
        constexpr unsigned avx_vnni = 1U << 4U;
        constexpr unsigned avx512_bf16 = 1U << 5U;
        found.avx_vnni = (eax & avx_vnni) != 0;
        found.avx512_bf16 = (eax & avx512_bf16) != 0;
    }
    return found;
}

// Tile registers are a process's only after it has asked for them: their 8 KiB are not in everybody's signal frames.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

#endif

}  // namespace

// The compiler's cpuid helper also asks whether the operating system saves the wide registers.
std::vector<const Kernels*> tables_available() {
    std::vector<const Kernels*> tables;
#ifdef OCTAVO_X86_64
    __builtin_cpu_init();
    const Leaf7 leaf = leaf_7();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512bw = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_vnni = avx512bw && __builtin_cpu_supports("avx512vnni");
    const bool avx512_bf16 = avx512_vnni && leaf.avx512_bf16;
    if (avx512_bf16 && leaf.amx_int8 && may_use_tiles()) tables.push_back(&amx::table);
    if (avx512_bf16) tables.push_back(&avx512_bf16::table);
    if (avx512_vnni) tables.push_back(&avx512_vnni::table);
#ifndef OCTAVO_FEWER_TABLES
    if (avx2 && leaf.avx_vnni) tables.push_back(&avx_vnni::table);
    if (avx512bw) tables.push_back(&avx512bw::table);
#endif
    if (avx2) tables.push_back(&avx2::table);
#endif
#ifdef OCTAVO_AARCH64
    const bool dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    if (dotprod && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0) tables.push_back(&neon_i8mm::table);
    if (dotprod) tables.push_back(&neon_dotprod::table);
#endif
    tables.push_back(&scalar::table);
    return tables;
}

namespace {

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

bool fetches_streams() {
#ifdef OCTAVO_X86_64
    static const bool is_amd = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
    return is_amd;
#else
    return false;
#endif
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
