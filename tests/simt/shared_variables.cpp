// Finds the variables that kernels declare __shared__ (simt.hpp marks their symbols) in the symbol table of the file
// that they were loaded from.
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>

#include "machine.hpp"

namespace simt {
namespace {

constexpr std::string_view mark = "B11simt_shared";

struct Object {
    std::uintptr_t base = 0;
    std::string path;
    bool found = false;
    std::uintptr_t address = 0;  // looked for
};

Object object_of(const void* address) {
    Object object;
    object.address = reinterpret_cast<std::uintptr_t>(address);
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
            auto& wanted = *static_cast<Object*>(data);
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const ElfW(Phdr) & segment = info->dlpi_phdr[i];
                const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
                if (segment.p_type != PT_LOAD || !Range{begin, begin + segment.p_memsz}.holds(wanted.address)) continue;
                wanted.base = info->dlpi_addr;
                wanted.path = *info->dlpi_name != '\0' ? info->dlpi_name : "/proc/self/exe";
                wanted.found = true;
                return 1;
            }
            return 0;
        },
        &object);
    return object;
}

// A mangled name without what leads it: "_Z" of a function, "_ZZ" or more of what is local to one.
std::string_view stem_of(std::string_view name) {
    if (!name.starts_with("_Z")) return {};
    return name.substr(name.find_first_not_of('Z', 1));
}

std::vector<SharedVariable> read_variables(const Object& object) {
    std::ifstream file(object.path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
    if (bytes.size() < sizeof *header) fail("shared variables: the file of the kernels cannot be read");
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
    std::vector<SharedVariable> variables;
    bool has_symbols = false;
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        has_symbols = true;
        const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
        const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[i].sh_offset);
        const std::size_t count = sections[i].sh_size / sizeof *symbols;
        std::map<std::string_view, const void*> functions;
        for (std::size_t s = 0; s < count; ++s) {
            const std::string_view stem = stem_of(names + symbols[s].st_name);
            if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC && !stem.empty()) {
                functions[stem] = reinterpret_cast<const void*>(object.base + symbols[s].st_value);
            }
        }
        for (std::size_t s = 0; s < count; ++s) {
            const std::string_view name = names + symbols[s].st_name;
            if (ELF64_ST_TYPE(symbols[s].st_info) != STT_OBJECT || name.find(mark) == std::string_view::npos) continue;
#ifdef OCTAVO_SIMT_ASAN
            if (ELF64_ST_BIND(symbols[s].st_info) != STB_LOCAL) {
                std::fprintf(stderr, "SIMT: %s\n", names + symbols[s].st_name);
                fail(
                    "a shared variable that others could define too has no red zone: move its function into an "
                    "unnamed namespace");
            }
#endif
            SharedVariable variable;
            variable.range.begin = object.base + symbols[s].st_value;
            variable.range.end = variable.range.begin + symbols[s].st_size;
            // The functions whose names begin this one's stand before it in order.
            const std::string_view stem = stem_of(name);
            for (auto it = functions.upper_bound(stem); it != functions.begin();) {
                --it;
                if (stem.starts_with(it->first) && stem.substr(it->first.size()).starts_with('E')) {
                    variable.function = it->second;
                    break;
                }
                if (it->first.front() != stem.front()) break;
            }
            variables.push_back(variable);
        }
    }
    if (!has_symbols) fail("shared variables: the file of the kernels is stripped of its symbols");
    return variables;
}

}  // namespace

const std::vector<SharedVariable>& shared_variables(const void* kernel) {
    static std::map<std::uintptr_t, std::vector<SharedVariable>>& of_objects =
        *new std::map<std::uintptr_t, std::vector<SharedVariable>>;
    static std::map<const void*, const std::vector<SharedVariable>*>& of_kernels =
        *new std::map<const void*, const std::vector<SharedVariable>*>;
    if (const auto known = of_kernels.find(kernel); known != of_kernels.end()) return *known->second;
    const Object object = object_of(kernel);
    if (!object.found) fail("launch: the kernel is in no loaded file");
    const auto [it, is_new] = of_objects.try_emplace(object.base);
    if (is_new) it->second = read_variables(object);
    of_kernels[kernel] = &it->second;
    return it->second;
}

std::size_t static_shared(const void* kernel) {
    std::size_t size = 0;
    for (const SharedVariable& variable : shared_variables(kernel)) {
        if (variable.function == kernel) size += variable.range.size();
    }
    return size;
}

}  // namespace simt
