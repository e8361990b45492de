// PTX instructions that CUDA C++ has no word for, each behind a small function. In tests the same functions run on the
// CPU (tests/simt/ptx.hpp). What an older architecture lacks is made of what it has, with the same result.
#pragma once

#include <cstdint>

#include "launch.cuh"

#ifdef OCTAVO_SIMT

#include "ptx.hpp"

#else

namespace octavo::cuda {

// The address of shared memory as instructions take it.
__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// --- copies from global to shared memory that a thread does not wait for (sm_80) ------------------------------------

// Copies 16 bytes, of which those from `bytes` on are zeros and not read. Both addresses must be multiples of 16.
__device__ inline void copy_async_16(void* target, const void* source, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
                 "r"(bytes)
                 : "memory");
#else
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
        static_cast<char*>(target)[i] = i < bytes ? static_cast<const char*>(source)[i] : '\0';
    }
#endif
}

// Ends a group of the thread's copies.
__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the thread's last `pending` groups have landed. Other threads see them after a barrier.
template <int pending>
__device__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// --- matrices in the registers of a warp ----------------------------------------------------------------------------

// Reads four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16,
// and receives bytes 4 * (l % 4) .. + 3 of row l / 4 of each.
__device__ inline void load_matrices(std::uint32_t (&registers)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same where `is_wanted`, which is the same for all lanes; else the registers have any contents.
__device__ inline void load_matrices_if(bool is_wanted, std::uint32_t (&registers)[4], const void* row) {
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %5, 0;\n"
        "@wanted ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
        : "r"(shared_address(row)), "r"(static_cast<int>(is_wanted))
        : "memory");
}

// sums[16, 8] += a[16, 32] * b[8, 32]^T  of int8, exact modulo 2^32.
//
// With g = lane / 4 and q = lane % 4, a register holds 4 bytes of a row, from a column on:
//   a      rows g, g + 8, g, g + 8; columns 4q, 4q, 4q + 16, 4q + 16
//   b      row g; columns 4q, 4q + 16
//   sums   row g, columns 2q and 2q + 1; row g + 8, the same
__device__ inline void multiply_add_s8(std::int32_t (&sums)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // Four products of half the rows and half the depth, whose registers are these.
    const auto part = [](std::int32_t& sum0, std::int32_t& sum1, std::uint32_t a_part, std::uint32_t b_part) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(sum0), "+r"(sum1)
            : "r"(a_part), "r"(b_part));
    };
    part(sums[0], sums[1], a[0], b[0]);
    part(sums[2], sums[3], a[1], b[0]);
    part(sums[0], sums[1], a[2], b[1]);
    part(sums[2], sums[3], a[3], b[1]);
#endif
}

// The same where `is_wanted`, which is the same for all lanes.
__device__ inline void multiply_add_s8_if(bool is_wanted, std::int32_t (&sums)[4], const std::uint32_t (&a)[4],
                                          const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %10, 0;\n"
        "@wanted mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(static_cast<int>(is_wanted)));
#else
    if (is_wanted) multiply_add_s8(sums, a, b);
#endif
}

// --- products of warpgroups (sm_90a) ---------------------------------------------------------------------------------
//
// Four warps, the first of which has a number that is a multiple of four, multiply matrices that are in shared memory,
// and do not wait for the sums. The order of things is
//
//   wgmma_fence, wgmma_s8 as often as wanted, wgmma_commit, ..., wgmma_wait
//
// Until the wait neither the sums may be touched nor the memory be written. What threads wrote to that memory, by
// stores or by `copy_async_16`, each of them makes visible by `fence_async_proxy`, before a barrier.

// A matrix of bytes whose rows are 128 bytes apart, from a multiple of 1024 on: bytes 16 c to 16 c + 15 of row r are at
// 128 r + 16 (c ^ r % 8). For columns from 32 s on, 2 s is added.
__device__ inline std::uint64_t wgmma_matrix(const void* rows) {
    constexpr std::uint64_t between_8_rows = 1024;
    constexpr std::uint64_t swizzled_by_128_bytes = 1;
    return std::uint64_t{shared_address(rows)} >> 4 | std::uint64_t{1} << 16 | between_8_rows >> 4 << 32 |
           swizzled_by_128_bytes << 62;
}

// Makes what this thread has written to shared memory, with the copies that it has waited for, visible to products.
__device__ inline void fence_async_proxy() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Orders this thread's accesses of the sums before the products that follow.
__device__ inline void wgmma_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ inline void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until all but the last `pending` groups are done.
template <int pending>
__device__ void wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// sums[64, cols] += a[64, 32] * b[cols, 32]^T  of int8, exact modulo 2^32. Warp w of the four has rows 16 w to
// 16 w + 15: of these and 8 columns a fragment, in the registers as `multiply_add_s8` has its sums.
template <int cols>
__device__ void wgmma_s8(std::int32_t (&sums)[cols / 8][4], std::uint64_t a, std::uint64_t b) {
    static_assert(cols == 128 || cols == 256);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define OCTAVO_SUMS(u) "+r"(sums[u][0]), "+r"(sums[u][1]), "+r"(sums[u][2]), "+r"(sums[u][3])
    // clang-format off
    if constexpr (cols == 128) {
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "%64, %65, adds;\n}"
            : OCTAVO_SUMS(0), OCTAVO_SUMS(1), OCTAVO_SUMS(2), OCTAVO_SUMS(3),
              OCTAVO_SUMS(4), OCTAVO_SUMS(5), OCTAVO_SUMS(6), OCTAVO_SUMS(7),
              OCTAVO_SUMS(8), OCTAVO_SUMS(9), OCTAVO_SUMS(10), OCTAVO_SUMS(11),
              OCTAVO_SUMS(12), OCTAVO_SUMS(13), OCTAVO_SUMS(14), OCTAVO_SUMS(15)
            : "l"(a), "l"(b), "r"(1));
    } else {
        asm volatile(
            "{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "%128, %129, adds;\n}"
            : OCTAVO_SUMS(0), OCTAVO_SUMS(1), OCTAVO_SUMS(2), OCTAVO_SUMS(3),
              OCTAVO_SUMS(4), OCTAVO_SUMS(5), OCTAVO_SUMS(6), OCTAVO_SUMS(7),
              OCTAVO_SUMS(8), OCTAVO_SUMS(9), OCTAVO_SUMS(10), OCTAVO_SUMS(11),
              OCTAVO_SUMS(12), OCTAVO_SUMS(13), OCTAVO_SUMS(14), OCTAVO_SUMS(15),
              OCTAVO_SUMS(16), OCTAVO_SUMS(17), OCTAVO_SUMS(18), OCTAVO_SUMS(19),
              OCTAVO_SUMS(20), OCTAVO_SUMS(21), OCTAVO_SUMS(22), OCTAVO_SUMS(23),
              OCTAVO_SUMS(24), OCTAVO_SUMS(25), OCTAVO_SUMS(26), OCTAVO_SUMS(27),
              OCTAVO_SUMS(28), OCTAVO_SUMS(29), OCTAVO_SUMS(30), OCTAVO_SUMS(31)
            : "l"(a), "l"(b), "r"(1));
    }
    // clang-format on
#undef OCTAVO_SUMS
#endif
}

// --- data that is read once -----------------------------------------------------------------------------------------

// The policy of data that is read once: the level-2 cache gives it up first (sm_80).
__device__ inline std::uint64_t read_once_policy() {
    std::uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    return policy;
}

// `copy_async_16` of data that is read once.
__device__ inline void copy_async_16_once(void* target, const void* source, int bytes, std::uint64_t policy) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(target)),
        "l"(source), "r"(bytes), "l"(policy)
        : "memory");
#else
    static_cast<void>(policy);
    copy_async_16(target, source, bytes);
#endif
}

// Reads 16 bytes that no kernel writes meanwhile, past the level-1 cache. The address must be a multiple of 16.
__device__ inline uint4 load_16_once(const void* source, std::uint64_t policy) {
    uint4 value;
#if __CUDA_ARCH__ >= 800
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(source), "l"(policy));
#else
    static_cast<void>(policy);
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(source));
#endif
    return value;
}

// Asks for `bytes` bytes to be brought to the level-2 cache, and goes on. Address and bytes are multiples of 16.
__device__ inline void prefetch(const std::int8_t* source, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(source), "r"(bytes) : "memory");
#else
    constexpr int line = 128;
    for (int i = 0; i < bytes; i += line) asm volatile("prefetch.global.L2 [%0];" : : "l"(source + i) : "memory");
#endif
}

// --- launches that begin before the one before them has ended (sm_90) ------------------------------------------------

// Waits until the launch before, with all that it waited for, has ended, and what it wrote can be read.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may begin, as soon as all blocks of this one have come here or ended.
__device__ inline void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- bits -----------------------------------------------------------------------------------------------------------

// Four bytes of the eight of `low` (0 to 3) and `high` (4 to 7): hexadecimal digit i of `selector` says which is byte
// i.
__device__ inline std::uint32_t select_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    return __byte_perm(low, high, selector);
}

// (value & mask) | bits, in one instruction, which two constants make the compiler miss.
__device__ inline std::uint32_t mask_or(std::uint32_t value, std::uint32_t mask, std::uint32_t bits) {
    std::uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
    return result;
}

// A constant that the compiler is to keep in a register: it puts only one constant into an instruction, and moves the
// other into a register at every use.
__device__ inline std::uint32_t in_register(std::uint32_t constant) {
    std::uint32_t result;
    asm("mov.b32 %0, %1;" : "=r"(result) : "r"(constant));
    return result;
}

// The same number, of which the compiler does not know that it is the same: what was made of it before is made again
// behind it, instead of being kept in registers.
__device__ inline std::int64_t made_again(std::int64_t number) {
    asm volatile("" : "+l"(number));
    return number;
}
__device__ inline int made_again(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// --- 16-bit products in the registers of a warp ---------------------------------------------------------------------

// sums[16, 8] += a[16, 16] * b[8, 16]^T  of f16 or of bf16, products exact, sums float32.
//
// With g = lane / 4 and q = lane % 4, a register of a or b holds 2 elements of a row, from a column on, the first in
// its low half:
//   a      rows g, g + 8, g, g + 8; columns 2q, 2q, 2q + 8, 2q + 8
//   b      row g; columns 2q, 2q + 8
//   sums   row g, columns 2q and 2q + 1; row g + 8, the same
__device__ inline void multiply_add_f16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half) {  // of the depth
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

__device__ inline void multiply_add_bf16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // No tensor core knows bf16 here: every lane gathers the rows and columns of its sums.
    const auto add = [](float& sum, std::uint32_t pair_a, std::uint32_t pair_b) {
        sum += __uint_as_float(pair_a << 16) * __uint_as_float(pair_b << 16);
        sum += __uint_as_float(pair_a & 0xFFFF0000U) * __uint_as_float(pair_b & 0xFFFF0000U);
    };
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    for (int part = 0; part < 8; ++part) {
        const int half = part / 4;
        const int column = part % 4;
        const std::uint32_t upper = __shfl_sync(whole_warp, a[2 * half], lane / 4 * 4 + column);
        const std::uint32_t lower = __shfl_sync(whole_warp, a[2 * half + 1], lane / 4 * 4 + column);
        const std::uint32_t left = __shfl_sync(whole_warp, b[half], lane % 4 * 8 + column);
        const std::uint32_t right = __shfl_sync(whole_warp, b[half], lane % 4 * 8 + 4 + column);
        add(sums[0], upper, left);
        add(sums[1], upper, right);
        add(sums[2], lower, left);
        add(sums[3], lower, right);
    }
#endif
}

// sums[16, 8] += a[16, 8] * b[8, 8]^T  of tf32 (sm_80): numbers of float32 whose last 13 bits are 0. The sums are those
// of the other products, and a and b lie in the registers as bytes do: with four bytes to an element, what
// `multiply_add_s8` says of them holds.
__device__ inline void multiply_add_tf32(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace octavo::cuda

#endif
