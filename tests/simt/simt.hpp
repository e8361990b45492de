// CUDA C++ on the CPU: what a kernel's source sees when it is compiled as plain C++ (cuda/launch.cuh, OCTAVO_SIMT).
//
// A thread of CUDA is a fiber (executor.cpp), which runs until it must wait: at a barrier of its block, or in an
// operation of its warp ("collective") that needs the other lanes. What the hardware leaves undefined is made visible:
// shared memory starts as 0xFF bytes (a NaN, or -1), lanes that take no part give 0xFF bytes, and threads of one
// collective or barrier that come from different places of the source are an error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

// A shared variable is a static one whose symbol is marked, so that shared_variables.cpp finds all of them, with their
// sizes. (GCC 12 drops the attribute `section` of statics in templates, but keeps this one.)
#undef __shared__
#define __shared__ static __attribute__((abi_tag("simt_shared")))
#undef __launch_bounds__
#define __launch_bounds__(...)
#define OCTAVO_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())

// What touches memory on behalf of the emulation, so that the race build does not take it for the kernel's doing.
#define SIMT_UNTRACED __attribute__((no_sanitize("thread"), noinline))

// Of the fiber that runs; rewritten when another one does.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

using Loc = std::source_location;

constexpr unsigned whole_warp = 0xFFFFFFFFU;

// --- collectives ----------------------------------------------------------------------------------------------------

// One lane's operands in a collective.
struct Lane {
    const void* in = nullptr;
    void* out = nullptr;
    int arg = 0;
};

// Does the work of a collective, once, when the last lane has come. Bit i of `active`: lane i takes part.
using WarpOp = void (*)(Lane lanes[32], unsigned active);

// Waits for all lanes of `mask` that have not exited, which must call from the same place with the same mask; then `op`
// runs. Without an `op` it orders the memory accesses of these lanes, as __syncwarp does.
void warp_collective(const char* what, unsigned mask, Lane lane, WarpOp op, const Loc& loc);

// The same for instructions that all 32 lanes must execute (mma, ldmatrix): an exited lane is an error.
void whole_warp_collective(const char* what, Lane lane, WarpOp op, const Loc& loc);

struct Votes {
    int count = 0;
    int total = 0;
};

// Waits for all threads of the block that have not exited; counts those whose `vote` is not 0.
Votes block_barrier(int vote, const Loc& loc);

void* dynamic_shared();
unsigned lane_id();

// Stops the test with a message that names the thread.
[[noreturn]] void fail(const char* message);

// --- memory ---------------------------------------------------------------------------------------------------------

// Tells the race build of an access that it cannot see; nothing in other builds.
void note(const volatile void* address, std::size_t size, bool write, bool atomic);

// Counts what is asked for, which must be memory of the device.
void prefetch(const void* source, std::size_t bytes);

// cp.async: copies `bytes` bytes to shared memory and zeroes the rest of `size`. The copy happens at once, or not
// before the wait that it belongs to, depending on the order of threads: a kernel must be right with both.
void defer_copy(void* target, const void* source, int bytes, int size = 16);
void copy_commit();

// Completes all groups of this thread's copies but the last `keep`.
void copy_wait(int keep);

// wgmma: products of matrices in shared memory, which four warps begin and do not wait for. A warp computes its own
// part, at once, or not before the wait that it belongs to, depending on the order of threads: a kernel must be right
// with both. Errors: a product without a fence before it, of memory that copies have written and no fence of the proxy
// has made visible, in a layout that is not emulated; warps of a group that do not begin the same products.
unsigned shared_address(const void* address);
void fence_async_proxy();
void wgmma_fence();
void wgmma(int cols, void* sums, std::uint64_t a, std::uint64_t b, const Loc& loc);  // sums: int32 [cols / 8][4]
void wgmma_commit(const Loc& loc);
void wgmma_wait(int keep, const Loc& loc);

// --- launches -------------------------------------------------------------------------------------------------------

// A kernel with its arguments, which outlive the call of `launch` where it is recorded.
struct Call {
    const void* kernel = nullptr;
    std::shared_ptr<const void> arguments;
    std::size_t arguments_size = 0;
    void (*run)(const void* arguments) = nullptr;  // as one thread
    bool early = false;                            // see octavo::cuda::Grid
    bool cooperative = false;                      // likewise
};

// Waits for all threads of a cooperative launch, which must all come here.
void grid_barrier(const Loc& loc = Loc::current());

// Every thread of a launch that begins early must come here, before it writes to memory that is not its block's, reads
// there what the launch before has written, or lets the next launch begin: then what earlier launches have written is
// there in any case. The race build sees to the first two. Launches run one after the other all the same.
void wait_for_launch_before();
void let_next_launch_begin();

cudaError_t enqueue_kernel(cudaStream_t stream, dim3 grid, dim3 block, std::size_t shared, Call call);

// Runs a kernel, or records it where `stream` is being captured.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, bool early,
                   bool cooperative, cudaStream_t stream, Arguments&&... arguments) {
    struct Bound {
        void (*kernel)(Parameters...);
        std::tuple<std::decay_t<Parameters>...> arguments;
    };
    Call call;
    call.kernel = reinterpret_cast<const void*>(kernel);
    call.arguments = std::make_shared<const Bound>(
        Bound{kernel,
              std::tuple<std::decay_t<Parameters>...>(static_cast<Parameters>(std::forward<Arguments>(arguments))...)});
    call.arguments_size = sizeof(Bound);
    call.early = early;
    call.cooperative = cooperative;
    call.run = [](const void* bound) {
        const auto& self = *static_cast<const Bound*>(bound);
        std::apply(self.kernel, self.arguments);
    };
    return enqueue_kernel(stream, grid, block, shared, std::move(call));
}

// --- parts of the functions below -----------------------------------------------------------------------------------

// Lane i gets the value of lane `arg`.
template <class T>
SIMT_UNTRACED void exchange_op(Lane* lanes, unsigned active) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    std::byte values[32][sizeof(T)];
    std::memset(values, 0xFF, sizeof values);
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) != 0) std::memcpy(values[i], lanes[i].in, sizeof(T));
    }
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) != 0) std::memcpy(lanes[i].out, values[lanes[i].arg & 31], sizeof(T));
    }
}

template <class T>
T exchange(const char* what, unsigned mask, T value, int source, const Loc& loc) {
    T result = value;
    warp_collective(what, mask, {&value, &result, source}, exchange_op<T>, loc);
    return result;
}

template <class T, class Combine>
SIMT_UNTRACED void reduce_op(Lane* lanes, unsigned active) {
    T total = *static_cast<const T*>(lanes[std::countr_zero(active)].in);
    for (int i = std::countr_zero(active) + 1; i < 32; ++i) {
        if ((active >> i & 1U) != 0) total = Combine{}(total, *static_cast<const T*>(lanes[i].in));
    }
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) != 0) *static_cast<T*>(lanes[i].out) = total;
    }
}

template <class Combine, class T>
T reduce(const char* what, unsigned mask, T value, const Loc& loc) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "CUDA reduces int and unsigned only");
    T result = value;
    warp_collective(what, mask, {&value, &result, 0}, reduce_op<T, Combine>, loc);
    return result;
}

struct Sum {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
    }
};
struct Least {
    template <class T>
    T operator()(T a, T b) const {
        return std::min(a, b);
    }
};
struct Greatest {
    template <class T>
    T operator()(T a, T b) const {
        return std::max(a, b);
    }
};

struct Ballot {
    unsigned votes;
    unsigned active;
};
SIMT_UNTRACED inline void ballot_op(Lane* lanes, unsigned active) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) != 0 && *static_cast<const int*>(lanes[i].in) != 0) votes |= 1U << i;
    }
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) != 0) *static_cast<Ballot*>(lanes[i].out) = {votes, active};
    }
}
inline Ballot ballot(const char* what, unsigned mask, int vote, const Loc& loc) {
    Ballot result{};
    warp_collective(what, mask, {&vote, &result, 0}, ballot_op, loc);
    return result;
}

template <class T>
SIMT_UNTRACED void match_op(Lane* lanes, unsigned active) {
    for (int i = 0; i < 32; ++i) {
        if ((active >> i & 1U) == 0) continue;
        unsigned same = 0;
        for (int j = 0; j < 32; ++j) {
            if ((active >> j & 1U) != 0 && std::memcmp(lanes[i].in, lanes[j].in, sizeof(T)) == 0) same |= 1U << j;
        }
        *static_cast<unsigned*>(lanes[i].out) = same;
    }
}

// No other fiber runs between the read and the write.
template <class T, class Change>
SIMT_UNTRACED T atomic(T* address, Change change) {
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) fail("atomic operation on a misaligned address");
    note(address, sizeof(T), true, true);
    const T old = *address;
    *address = change(old);
    return old;
}

void fence();

// A read that the race build sees whole, checked for alignment.
template <class T>
T load(const T* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) fail("load from a misaligned address");
    return *address;
}
template <class T>
void store(T* address, T value) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) fail("store to a misaligned address");
    *address = value;
}

}  // namespace simt

// --- the functions of CUDA ------------------------------------------------------------------------------------------

#define SIMT_LOC const simt::Loc& loc = simt::Loc::current()

inline void __syncthreads(SIMT_LOC) { simt::block_barrier(0, loc); }
inline int __syncthreads_count(int vote, SIMT_LOC) { return simt::block_barrier(vote, loc).count; }
inline int __syncthreads_or(int vote, SIMT_LOC) { return simt::block_barrier(vote, loc).count != 0 ? 1 : 0; }
inline int __syncthreads_and(int vote, SIMT_LOC) {
    const simt::Votes votes = simt::block_barrier(vote, loc);
    return votes.count == votes.total ? 1 : 0;
}
inline void __syncwarp(unsigned mask = simt::whole_warp, SIMT_LOC) {
    simt::warp_collective("__syncwarp", mask, {}, nullptr, loc);
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_LOC) {
    return simt::ballot("__ballot_sync", mask, vote, loc).votes;
}
inline int __any_sync(unsigned mask, int vote, SIMT_LOC) {
    return simt::ballot("__any_sync", mask, vote, loc).votes != 0 ? 1 : 0;
}
inline int __all_sync(unsigned mask, int vote, SIMT_LOC) {
    const simt::Ballot ballot = simt::ballot("__all_sync", mask, vote, loc);
    return ballot.votes == ballot.active ? 1 : 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_LOC) {
    unsigned result = 0;
    simt::warp_collective("__match_any_sync", mask, {&value, &result, 0}, simt::match_op<T>, loc);
    return result;
}

// `width` lanes, a power of two, form a group of their own; a lane that would read outside it keeps its value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SIMT_LOC) {
    const int lane = static_cast<int>(simt::lane_id());
    return simt::exchange("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)), loc);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SIMT_LOC) {
    const int lane = static_cast<int>(simt::lane_id());
    const int source = lane ^ lane_mask;
    return simt::exchange("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, loc);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_LOC) {
    const int lane = static_cast<int>(simt::lane_id());
    const int source = lane + static_cast<int>(delta);
    return simt::exchange("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, loc);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_LOC) {
    const int lane = static_cast<int>(simt::lane_id());
    const int source = lane - static_cast<int>(delta);
    return simt::exchange("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source, loc);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, SIMT_LOC) {
    return simt::reduce<simt::Sum>("__reduce_add_sync", mask, value, loc);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, SIMT_LOC) {
    return simt::reduce<simt::Least>("__reduce_min_sync", mask, value, loc);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, SIMT_LOC) {
    return simt::reduce<simt::Greatest>("__reduce_max_sync", mask, value, loc);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_LOC) {
    return simt::reduce<std::bit_or<unsigned>>("__reduce_or_sync", mask, value, loc);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMT_LOC) {
    return simt::reduce<std::bit_and<unsigned>>("__reduce_and_sync", mask, value, loc);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMT_LOC) {
    return simt::reduce<std::bit_xor<unsigned>>("__reduce_xor_sync", mask, value, loc);
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T old) {
        if constexpr (std::is_integral_v<T>) {
            return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) +
                                  static_cast<std::make_unsigned_t<T>>(value));
        } else {
            return static_cast<T>(old + value);
        }
    });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of this type");
    return simt::atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of this type");
    return simt::atomic(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicXor(T* address, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T old) { return static_cast<T>(old ^ value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return simt::atomic(address, [=](T old) { return old == expected ? value : old; });
}
// Counts up to `most`, then from 0 again.
inline unsigned atomicInc(unsigned* address, unsigned most) {
    return simt::atomic(address, [=](unsigned old) { return old >= most ? 0U : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned most) {
    return simt::atomic(address, [=](unsigned old) { return old == 0 || old > most ? most : old - 1; });
}

// What was written before a fence is seen by who reads, after a fence of its own, an atomic written after it.
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { simt::fence(); }
inline void __nanosleep(unsigned /*nanoseconds*/) {}
[[noreturn]] inline void __trap() { simt::fail("__trap"); }

template <class T>
T __ldg(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldcg(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldcs(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldca(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldcv(const T* address) {
    return simt::load(address);
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
    simt::store(address, value);
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
    simt::store(address, value);
}
template <class T>
void __stwb(T* address, std::type_identity_t<T> value) {
    simt::store(address, value);
}
template <class T>
void __stwt(T* address, std::type_identity_t<T> value) {
    simt::store(address, value);
}

// c + the sum of products of the four bytes; wraps.
inline int __dp4a(int a, int b, int c) {
    auto sum = static_cast<unsigned>(c);
    for (int shift = 0; shift < 32; shift += 8) {
        sum += static_cast<unsigned>(static_cast<std::int8_t>(a >> shift) * static_cast<std::int8_t>(b >> shift));
    }
    return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int shift = 0; shift < 32; shift += 8) c += (a >> shift & 0xFFU) * (b >> shift & 0xFFU);
    return c;
}

namespace simt {
// Out of range: the nearest integer. NaN: 0. As the hardware converts.
template <class Integer>
Integer to_integer(float value) {
    constexpr auto least = static_cast<float>(std::numeric_limits<Integer>::min());
    constexpr auto most = static_cast<float>(std::numeric_limits<Integer>::max());  // rounded up to a power of two
    if (value != value) return 0;
    if (value >= most) return std::numeric_limits<Integer>::max();
    if (value < least) return std::numeric_limits<Integer>::min();
    return static_cast<Integer>(value);
}
}  // namespace simt
inline int __float2int_rn(float value) { return simt::to_integer<int>(std::nearbyint(value)); }
inline int __float2int_rz(float value) { return simt::to_integer<int>(std::trunc(value)); }
inline int __float2int_rd(float value) { return simt::to_integer<int>(std::floor(value)); }
inline int __float2int_ru(float value) { return simt::to_integer<int>(std::ceil(value)); }
inline unsigned __float2uint_rn(float value) { return simt::to_integer<unsigned>(std::nearbyint(value)); }
inline unsigned __float2uint_rz(float value) { return simt::to_integer<unsigned>(std::trunc(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0F / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0F ? (a < 1.0F ? a : 1.0F) : 0.0F; }
inline float rsqrtf(float a) { return 1.0F / std::sqrt(a); }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

// The larger of each pair of 16-bit halves.
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xFFFFU, b & 0xFFFFU);
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline unsigned __brev(unsigned bits) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (bits >> i & 1U) << (31 - i);
    return result;
}
// Byte i of the result is byte (selector >> 4 i) & 7 of y:x; with bit 3 set, that byte's sign, spread.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 0xFU;
        auto byte = static_cast<unsigned>(bytes >> (8 * (choice & 7U)) & 0xFFU);
        if ((choice & 8U) != 0) byte = (byte & 0x80U) != 0 ? 0xFFU : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (shift & 31U) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> (shift & 31U));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(std::int64_t{a} * b >> 32); }

// CUDA's min and max take mixed arithmetic types, and prefer a number to a NaN.
template <class A, class B>
    requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
    requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
