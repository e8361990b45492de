// The race detector: a shadow of the memory that kernels may access, which knows who touched each byte last.
//
// The race build compiles kernels with -fsanitize=thread, which calls a function before each access; these functions
// are here, in place of the sanitizer's own. Two accesses of one launch, one of them a write, race where nothing orders
// them:
//   the same block     a barrier of the block between them, or a __syncwarp where both are of one warp
//   different blocks   __threadfence, then an atomic operation, by the first; an atomic operation on the same address,
//                      then __threadfence, by the second; where other threads of either block take part, a barrier
//                      between them and the one with the atomic
// Atomic operations do not race with each other. Host memory that was not registered must not be accessed at all.
#include <cstdint>

#include "machine.hpp"

#ifndef OCTAVO_SIMT_RACE

namespace simt {
void race_begin_launch(const Call& /*call*/) {}
void race_begin_block() {}
void race_end_launch() {}
void race_register(const void* /*memory*/, std::size_t /*size*/) {}
void race_unregister(const void* /*memory*/) {}
void note(const volatile void* /*address*/, std::size_t /*size*/, bool /*write*/, bool /*atomic*/) {}
void fence() {}
}  // namespace simt

#else

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <unordered_map>

namespace simt {
namespace {

// One access. Numbers are kept modulo their width: they are compared for equality, within one launch.
struct Record {
    std::uint32_t code = 0;  // where in the program, relative to the kernel's file; 0: none
    std::uint32_t block = 0;
    std::uint16_t launch = 0;
    std::uint16_t thread : 10 = 0;
    std::uint16_t fences : 6 = 0;  // that the thread had passed
    std::uint16_t warp_epoch = 0;
    std::uint16_t block_epoch = 0;
};
static_assert(sizeof(Record) == 16);

struct Cell {
    Record write;
    Record atomic;
    std::array<Record, 2> reads;  // two, so that a write by the one reader is told from a write by another
};

// Four bytes that were always accessed together, or apart.
struct Word {
    Cell together;
    std::array<Cell, 4>* apart = nullptr;
};

struct Region {
    Range range;
    bool shared = false;
    Word* words = nullptr;
    std::size_t word_count = 0;
    std::deque<std::array<Cell, 4>> cells;

    Region(Range memory, bool is_shared) : range(memory), shared(is_shared) {
        word_count = (range.end + 3) / 4 - range.begin / 4;
        words = static_cast<Word*>(mmap(nullptr, word_count * sizeof(Word) + 1, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (words == MAP_FAILED) fail("not enough memory for the shadow of device memory");
    }
    ~Region() { munmap(words, word_count * sizeof(Word) + 1); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
};

// A thread of another block made what its block had written visible, by an atomic operation after a fence.
struct Release {
    std::uint32_t block = 0;
    std::uint16_t thread = 0;
    std::uint16_t block_epoch = 0;
    std::uint16_t fence_epoch = 0;     // block epoch of the thread's last fence
    std::vector<std::uint8_t> fences;  // of each thread of the block
};

// A thread of this block saw it.
struct Acquisition {
    const Release* release = nullptr;
    std::uint16_t thread = 0;
    std::uint32_t block_epoch = 0;
    unsigned fences = 0;  // that the thread had passed
};

struct ThreadFences {
    unsigned count = 0;
    std::uint32_t last_epoch = 0;
};

constexpr std::size_t most_threads = 1024;
constexpr std::size_t most_reports = 4;

struct Detector {
    std::map<std::uintptr_t, Region> regions;  // by their ends, so that upper_bound finds the one that holds an address
    Region* last_region = nullptr;
    std::uintptr_t base = 0;  // of the kernel's file
    std::vector<Range> images;
    Range host_stack;
    Range arguments;  // of the kernel
    Range registers;  // threadIdx and its like
    long races = 0;
    std::set<std::uint64_t> reported;
    std::array<ThreadFences, most_threads> fences;
    bool any_fence = false;  // in this block
    std::unordered_map<std::uintptr_t, std::deque<Release>> releases;
    std::vector<Acquisition> acquisitions;
    bool busy = false;  // the detector's own accesses are not the kernel's
};
Detector& detector() {
    static Detector& the = *new Detector;
    return the;
}

// --- order ----------------------------------------------------------------------------------------------------------

bool was_released(const Record& record, const Release& release) {
    if (record.block != release.block) return false;
    if (record.block_epoch < release.fence_epoch) return true;  // a barrier, then the releasing thread's fence
    const bool fenced = release.fences[record.thread] % 64 != record.fences;
    if (record.thread == release.thread) return fenced;
    return fenced && record.block_epoch < release.block_epoch;
}

bool was_acquired(const Record& record, const Position& now) {
    const Detector& the = detector();
    for (const Acquisition& acquisition : the.acquisitions) {
        const bool is_own = acquisition.thread == now.thread;
        if (!is_own && now.block_epoch <= acquisition.block_epoch) continue;
        const bool fenced = the.fences[acquisition.thread].count > acquisition.fences ||
                            (!is_own && the.fences[now.thread].count > 0 &&
                             the.fences[now.thread].last_epoch > acquisition.block_epoch);
        if (fenced && was_released(record, *acquisition.release)) return true;
    }
    return false;
}

// Whether the hardware could carry out the recorded access and one by `now` in either order, or at once.
bool unordered(const Record& record, const Position& now, bool shared) {
    if (record.code == 0 || record.launch != static_cast<std::uint16_t>(now.launch)) return false;
    if (record.block != now.block) return !shared && !was_acquired(record, now);
    if (record.thread == now.thread || record.block_epoch != static_cast<std::uint16_t>(now.block_epoch)) return false;
    return record.thread / 32 != now.thread / 32 || record.warp_epoch == static_cast<std::uint16_t>(now.warp_epoch);
}

// --- reports --------------------------------------------------------------------------------------------------------

// file:line of a place in the program, with those it was inlined into.
std::string place_of(std::uint32_t code) {
    const std::uintptr_t address = detector().base + code;
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(address), &info) == 0) return "?";
    const std::uintptr_t offset = address - reinterpret_cast<std::uintptr_t>(info.dli_fbase) - 1;
    std::array<char, 4096> path{};
    const char* file = info.dli_fname;
    if (file == nullptr || *file != '/') file = realpath("/proc/self/exe", path.data());
    std::array<char, 64> number{};
    std::snprintf(number.data(), number.size(), "%#lx", static_cast<unsigned long>(offset));
    const std::string command = std::string("addr2line -sie '") + file + "' " + number.data();
    FILE* const pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return number.data();
    std::string text;
    std::array<char, 256> line{};
    for (int i = 0; i < 4 && std::fgets(line.data(), line.size(), pipe) != nullptr; ++i) {
        line[std::strcspn(line.data(), " \n")] = '\0';
        text += (i > 0 ? " in " : "") + std::string(line.data());
    }
    pclose(pipe);
    return text;
}

void report(const Record& earlier, const Position& now, std::uint32_t code, const char* kind, const Region& region,
            std::uintptr_t address) {
    Detector& the = detector();
    ++the.races;
    // Of the same two places, one report.
    const auto [at, is_new] = the.reported.insert(std::uint64_t{earlier.code} << 32 | code);
    if (!is_new || the.reported.size() > most_reports) return;
    std::fprintf(
        stderr, "SIMT RACE: %s of %s memory, byte %zu of %zu\n  block %u thread %u at %s\n  block %u thread %u at %s\n",
        kind, region.shared ? "shared" : "global", static_cast<std::size_t>(address - region.range.begin),
        region.range.size(), earlier.block, static_cast<unsigned>(earlier.thread), place_of(earlier.code).c_str(),
        now.block, static_cast<unsigned>(now.thread), place_of(code).c_str());
}

// --- accesses -------------------------------------------------------------------------------------------------------

// Whether the calling thread is in a launch. Other threads of the host run launchers, which are instrumented too.
thread_local bool runs_kernels = false;
bool in_kernel() { return runs_kernels && position().in_kernel; }

enum class Kind : std::uint8_t { read, write, atomic };

// Checks an access of a cell and records it. False where it races.
bool access_cell(Cell& cell, const Record& record, Kind kind, const Position& now, const Region& region,
                 std::uintptr_t address) {
    const auto races_with = [&](const Record& earlier, const char* what) {
        if (!unordered(earlier, now, region.shared)) return false;
        report(earlier, now, record.code, what, region, address);
        return true;
    };
    bool races = races_with(cell.write, kind == Kind::read ? "write, then read," : "two writes");
    if (!races && kind != Kind::atomic) {
        races = races_with(cell.atomic, kind == Kind::read ? "atomic write, then read," : "atomic write, then write,");
    }
    if (kind == Kind::read) {
        if (!unordered(cell.reads[0], now, region.shared)) {
            cell.reads[0] = record;
        } else if (!unordered(cell.reads[1], now, region.shared) || now.block != cell.reads[0].block) {
            cell.reads[1] = record;
        }
        return !races;
    }
    for (const Record& read : cell.reads) {
        if (!races) races = races_with(read, "read, then write,");
    }
    (kind == Kind::atomic ? cell.atomic : cell.write) = record;
    return !races;
}

// Whether the launch before may still write the cell, or read what would be written to it.
bool is_too_early(const Cell& cell, Kind kind, const Position& now) {
    const auto is_of_launch_before = [&](const Record& record) {
        return record.code != 0 && record.launch == static_cast<std::uint16_t>(now.launch - 1);
    };
    return kind != Kind::read || is_of_launch_before(cell.write) || is_of_launch_before(cell.atomic);
}

Region* region_of(std::uintptr_t address) {
    Detector& the = detector();
    if (the.last_region != nullptr && the.last_region->range.holds(address)) return the.last_region;
    const auto found = the.regions.upper_bound(address);
    if (found == the.regions.end() || !found->second.range.holds(address)) return nullptr;
    return the.last_region = &found->second;
}

[[noreturn]] void fail_at(const char* message, const void* from) {
    const auto code = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(from) - detector().base);
    std::fprintf(stderr, "SIMT: at %s\n", place_of(code).c_str());
    fail(message);
}

void check_host_access(std::uintptr_t address, Kind kind, const void* from) {
    const Detector& the = detector();
    if (the.host_stack.holds(address) || the.arguments.holds(address)) return;
    for (const Range& image : the.images) {
        if (!image.holds(address)) continue;
        if (kind != Kind::read) fail_at("a kernel writes a variable of the host", from);
        return;
    }
    fail_at("a kernel accesses memory of the host that is not registered, or past the end of device memory", from);
}

void synchronize_blocks(std::uintptr_t address, const Position& now);

void access(std::uintptr_t address, std::size_t size, Kind kind, const void* from) {
    if (!in_kernel()) return;
    const Position& now = position();
    if (fiber_stacks().holds(address)) return;
    Detector& the = detector();
    if (the.registers.holds(address) || the.busy) return;
    the.busy = true;
    Region* const region = region_of(address);
    if (region == nullptr) {
        check_host_access(address, kind, from);
        the.busy = false;
        return;
    }
    if (address + size > region->range.end) fail_at("an access past the end of a variable or of device memory", from);
    Record record;
    record.code = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(from) - the.base);
    record.block = now.block;
    record.launch = static_cast<std::uint16_t>(now.launch);
    record.thread = now.thread & 1023U;
    record.fences = the.fences[now.thread].count & 63U;
    record.warp_epoch = static_cast<std::uint16_t>(now.warp_epoch);
    record.block_epoch = static_cast<std::uint16_t>(now.block_epoch);
    const std::uintptr_t first_word = region->range.begin / 4;
    const auto access_at = [&](Cell& cell, std::uintptr_t at) {
        if (now.too_early && !region->shared && is_too_early(cell, kind, now)) {
            fail_at("an access of memory before the launch before has ended", from);
        }
        return access_cell(cell, record, kind, now, *region, at);
    };
    bool good = true;  // one report for an access is enough
    for (std::uintptr_t at = address; at < address + size && good;) {
        Word& word = region->words[at / 4 - first_word];
        if (at % 4 == 0 && address + size - at >= 4 && word.apart == nullptr) {
            good = access_at(word.together, at);
            at += 4;
            continue;
        }
        if (word.apart == nullptr) {
            word.apart = &region->cells.emplace_back();
            word.apart->fill(word.together);
        }
        good = access_at((*word.apart)[at % 4], at);
        ++at;
    }
    if (kind == Kind::atomic && !region->shared) synchronize_blocks(address, now);
    the.busy = false;
}

// An atomic operation passes on what blocks before it released at this address, and releases in its turn.
void synchronize_blocks(std::uintptr_t address, const Position& now) {
    Detector& the = detector();
    if (const auto found = the.releases.find(address); found != the.releases.end()) {
        for (const Release& release : found->second) {
            if (release.block == now.block) continue;
            the.acquisitions.push_back({&release, now.thread, now.block_epoch, the.fences[now.thread].count});
        }
    }
    if (!the.any_fence) return;
    Release release;
    release.block = now.block;
    release.thread = now.thread;
    release.block_epoch = static_cast<std::uint16_t>(now.block_epoch);
    release.fence_epoch = static_cast<std::uint16_t>(the.fences[now.thread].last_epoch);
    for (const ThreadFences& thread : the.fences) release.fences.push_back(static_cast<std::uint8_t>(thread.count));
    the.releases[address].push_back(std::move(release));
}

Range own_stack() {
    thread_local const Range range = [] {
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        void* begin = nullptr;
        std::size_t size = 0;
        pthread_attr_getstack(&attributes, &begin, &size);
        pthread_attr_destroy(&attributes);
        const auto address = reinterpret_cast<std::uintptr_t>(begin);
        return Range{address, address + size};
    }();
    return range;
}

void add_region(Range range, bool shared) {
    Detector& the = detector();
    the.last_region = nullptr;
    the.regions.erase(range.end);
    the.regions.try_emplace(range.end, range, shared);
}

// The segments of every loaded file, and where the one with the kernel begins.
void find_images(const void* kernel) {
    Detector& the = detector();
    the.images.clear();
    Dl_info info{};
    dladdr(kernel, &info);
    the.base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
    dl_iterate_phdr(
        [](dl_phdr_info* object, std::size_t, void* data) {
            for (int i = 0; i < object->dlpi_phnum; ++i) {
                const ElfW(Phdr) & segment = object->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) continue;
                const std::uintptr_t begin = object->dlpi_addr + segment.p_vaddr;
                static_cast<std::vector<Range>*>(data)->push_back({begin, begin + segment.p_memsz});
            }
            return 0;
        },
        &the.images);
}

}  // namespace

void race_begin_launch(const Call& call) {
    runs_kernels = true;
    const void* const kernel = call.kernel;
    Detector& the = detector();
    static const void* last_kernel = nullptr;
    static Range dynamic;
    if (kernel != last_kernel) {
        find_images(kernel);
        for (const SharedVariable& variable : shared_variables(kernel)) {
            if (!the.regions.contains(variable.range.end)) add_region(variable.range, true);
        }
        const auto begin =
            std::min({reinterpret_cast<std::uintptr_t>(&threadIdx), reinterpret_cast<std::uintptr_t>(&blockIdx),
                      reinterpret_cast<std::uintptr_t>(&blockDim), reinterpret_cast<std::uintptr_t>(&gridDim)});
        the.registers = {begin, begin + 4 * sizeof(dim3)};
        last_kernel = kernel;
    }
    if (const Range range = dynamic_shared_range(); range.begin != dynamic.begin || range.end != dynamic.end) {
        if (dynamic.size() > 0) the.regions.erase(dynamic.end);
        if (range.size() > 0) add_region(range, true);
        the.last_region = nullptr;
        dynamic = range;
    }
    the.host_stack = own_stack();
    const auto arguments = reinterpret_cast<std::uintptr_t>(call.arguments.get());
    the.arguments = {arguments, arguments + call.arguments_size};
    the.races = 0;
    the.releases.clear();
}

void race_begin_block() {
    Detector& the = detector();
    the.acquisitions.clear();
    if (the.any_fence) the.fences.fill({});
    the.any_fence = false;
}

void race_end_launch() {
    runs_kernels = false;
    if (const long races = detector().races; races > 0) {
        std::fprintf(stderr, "SIMT ERROR: %ld accesses race\n", races);
        std::abort();
    }
}

void race_register(const void* memory, std::size_t size) {
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    if (size > 0) add_region({begin, begin + size}, false);
}

void race_unregister(const void* memory) {
    Detector& the = detector();
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    the.last_region = nullptr;
    const auto found = the.regions.upper_bound(begin);
    if (found != the.regions.end() && found->second.range.begin == begin) the.regions.erase(found);
}

void note(const volatile void* address, std::size_t size, bool write, bool atomic) {
    access(reinterpret_cast<std::uintptr_t>(address), size,
           atomic  ? Kind::atomic
           : write ? Kind::write
                   : Kind::read,
           __builtin_return_address(0));
}

void fence() {
    Detector& the = detector();
    const Position& now = position();
    ++the.fences[now.thread].count;
    the.fences[now.thread].last_epoch = now.block_epoch;
    the.any_fence = true;
}

namespace {
void aligned_access(void* address, std::size_t size, Kind kind, const void* from) {
    const auto number = reinterpret_cast<std::uintptr_t>(address);
    if (number % size != 0 && in_kernel()) fail_at("a misaligned access", from);
    access(number, size, kind, from);
}
}  // namespace

}  // namespace simt

// --- what instrumented code calls -----------------------------------------------------------------------------------

#define SIMT_FROM __builtin_return_address(0)
#define SIMT_ACCESS(size)                                                                               \
    void __tsan_read##size(void* at) { simt::aligned_access(at, size, simt::Kind::read, SIMT_FROM); }   \
    void __tsan_write##size(void* at) { simt::aligned_access(at, size, simt::Kind::write, SIMT_FROM); } \
    void __tsan_unaligned_read##size(void* at) {                                                        \
        simt::access(reinterpret_cast<std::uintptr_t>(at), size, simt::Kind::read, SIMT_FROM);          \
    }                                                                                                   \
    void __tsan_unaligned_write##size(void* at) {                                                       \
        simt::access(reinterpret_cast<std::uintptr_t>(at), size, simt::Kind::write, SIMT_FROM);         \
    }

// The atomic operations of the host's C++ in these files (the guards of static variables, reference counts).
#define SIMT_ATOMIC(bits, T)                                                                                          \
    T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }         \
    void __tsan_atomic##bits##_store(volatile T* at, T value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_exchange(volatile T* at, T value, int) {                                                  \
        return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                      \
    }                                                                                                                 \
    T __tsan_atomic##bits##_fetch_add(volatile T* at, T value, int) {                                                 \
        return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                                 \
    T __tsan_atomic##bits##_fetch_sub(volatile T* at, T value, int) {                                                 \
        return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                       \
    }                                                                                                                 \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* expected, T value, int, int) {               \
        return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ? 1 : 0;   \
    }

extern "C" {
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
SIMT_ATOMIC(8, std::uint8_t)
SIMT_ATOMIC(16, std::uint16_t)
SIMT_ATOMIC(32, std::uint32_t)
SIMT_ATOMIC(64, std::uint64_t)

void __tsan_read_range(void* at, std::size_t size) {
    simt::access(reinterpret_cast<std::uintptr_t>(at), size, simt::Kind::read, SIMT_FROM);
}
void __tsan_write_range(void* at, std::size_t size) {
    simt::access(reinterpret_cast<std::uintptr_t>(at), size, simt::Kind::write, SIMT_FROM);
}
void* __tsan_memcpy(void* target, const void* source, std::size_t size) {
    simt::access(reinterpret_cast<std::uintptr_t>(source), size, simt::Kind::read, SIMT_FROM);
    simt::access(reinterpret_cast<std::uintptr_t>(target), size, simt::Kind::write, SIMT_FROM);
    return std::memcpy(target, source, size);
}
void* __tsan_memset(void* target, int value, std::size_t size) {
    simt::access(reinterpret_cast<std::uintptr_t>(target), size, simt::Kind::write, SIMT_FROM);
    return std::memset(target, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
}

#endif
