// What this build and this machine offer, and how many threads the CPU backend uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace [[gnu::visibility("default")]] octavo {

[[nodiscard]] const char* version() noexcept;

// Threads that the CPU backend may use in a call made by this thread, the calling one included: what set_num_threads
// was given; where it was not called, what a ThreadLimit of this thread says; without one, OMP_NUM_THREADS where it is
// set to a positive number, else the processors this process may run on.
[[nodiscard]] int num_threads() noexcept;

// For all threads of the process, and before every ThreadLimit. Throws Error (value) unless 1 <= count <= 1024.
void set_num_threads(int count);

// How a framework lends its threads: call work(context, i), which never throws, for numbers i below `threads`, each at
// most once, in threads of which one may be the calling one, and return true when all of these calls have ended. A
// number is best always given to the same thread, which finds in its caches what it left there. One call does all that
// there is to do; more do it together. Or return false, having called nothing.
using RunTogether = bool (*)(int threads, void (*work)(void* context, int thread), void* context);

// While it lives, the calls of the thread that made it use up to `count` threads instead of the default number: for a
// framework that has its own setting. Others' calls, and a number given to set_num_threads, are not affected. Counts
// above 1024 mean 1024; below 1, no limit but the default. Where `together` is not null, these are the framework's
// threads: two that wait for work on one processor keep it from each other. octavo's own are used where set_num_threads
// asks for more than `count`, and in a forked child, which has none of the framework's. Of several in one thread the
// innermost holds; they end in the thread that made them, in reverse order.
class ThreadLimit {
public:
    explicit ThreadLimit(int count, RunTogether together = nullptr) noexcept;
    ~ThreadLimit();
    ThreadLimit(const ThreadLimit&) = delete;
    ThreadLimit& operator=(const ThreadLimit&) = delete;

private:
    int outer_;
    RunTogether outer_together_;
};

// What an interrupted call throws; its outputs are then unspecified.
class __attribute__((visibility("default"))) Interrupted : public std::exception {
public:
    [[nodiscard]] const char* what() const noexcept override { return "octavo: interrupted"; }
};

// While it lives, calls of the thread that made it which take long on the CPU ask `unwanted` about ten times a second,
// in that thread, whether to end with Interrupted. Several nest as ThreadLimit does.
class Interruptible {
public:
    explicit Interruptible(bool (*unwanted)()) noexcept;
    ~Interruptible();
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

private:
    bool (*outer_)();
};

// Instruction set of the CPU kernels in use: "amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", on
// 64-bit Arm "neon_i8mm", "neon_dotprod", or "scalar". The best one this processor has, or the one the environment
// variable OCTAVO_CPU_ISA names at first use. Throws Error (value) where that name is unknown or the processor lacks
// it.
[[nodiscard]] const char* cpu_isa();

// The instruction sets this processor can run, best first.
[[nodiscard]] std::vector<std::string> cpu_isas_available();

// A GPU that the CUDA driver shows this process; `memory` in bytes.
struct CudaDevice {
    std::string name;
    int major = 0;  // compute capability
    int minor = 0;
    int multiprocessors = 0;
    std::int64_t memory = 0;
};

struct CudaInfo {
    std::string missing;              // why calls on CUDA memory cannot work here; empty: they can
    std::vector<CudaDevice> devices;  // in the order of their indices
    std::string cublaslt;             // version of the cuBLASLt in use, or why there is none; devices that it refused
    std::string wgmma;  // of which devices, of those used so far, the matrix instructions of Hopper are used
};

// Loads the CUDA backend (liboctavo_cuda.so, beside the library that octavo is part of, or where the environment
// variable OCTAVO_CUDA_LIBRARY says), as the first call on CUDA memory does. Never throws for what is missing.
[[nodiscard]] CudaInfo cuda_info();

// Who gives calls on CUDA memory the memory that they need between their kernels. Neither function may throw.
//   allocate  at least `size` bytes on the device of that index, aligned to 256 bytes, for what is enqueued on `stream`
//             (Stream::handle) from now on; null where there is not enough memory
//   release   takes them back: they are free as soon as what is on `stream` by now is done
struct Scratch {
    void* (*allocate)(void* context, std::size_t size, std::int32_t device, void* stream) = nullptr;
    void (*release)(void* context, void* memory, std::size_t size, std::int32_t device, void* stream) = nullptr;
    void* context = nullptr;
};

// While it lives, calls of the thread that made it take that memory from `scratch`, which must outlive it. Null, as
// without: octavo has a pool of its own on each device, which keeps what it got until release_cuda_memory(). Several
// nest as ThreadLimit does.
class ScratchFrom {
public:
    explicit ScratchFrom(const Scratch* scratch) noexcept;
    ~ScratchFrom();
    ScratchFrom(const ScratchFrom&) = delete;
    ScratchFrom& operator=(const ScratchFrom&) = delete;

private:
    const Scratch* outer_;
};

// Which capture of a CUDA graph records what is enqueued on a CUDA stream (Stream::handle): a number that no other
// capture of the process has; 0: none does, or no call has been made on CUDA memory yet.
[[nodiscard]] std::uint64_t capture_of(void* stream) noexcept;

// Give back to the driver the scratch memory that the CUDA backend keeps for further calls, on all devices. Nothing
// where it is not loaded. Throws Error (device) where the driver fails.
void release_cuda_memory();

}  // namespace octavo
