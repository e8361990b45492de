// The functions of cuda/ptx.cuh on the CPU: exact, over the registers of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "simt.hpp"

namespace octavo::cuda {

inline unsigned shared_address(const void* pointer) { return simt::shared_address(pointer); }

inline void copy_async_16(void* target, const void* source, int bytes) {
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): the hardware faults on these
    if (((reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source)) & 15U) != 0) {
        simt::fail("copy_async_16 of misaligned addresses");
    }
    simt::defer_copy(target, source, bytes);
}
inline void prefetch(const std::int8_t* source, int bytes) {
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): the hardware faults on these
    if (((reinterpret_cast<std::uintptr_t>(source) | static_cast<unsigned>(bytes)) & 15U) != 0 || bytes <= 0) {
        simt::fail("prefetch of what is not aligned, or nothing");
    }
    simt::prefetch(source, static_cast<std::size_t>(bytes));
}
inline void wait_for_launch_before() { simt::wait_for_launch_before(); }
inline void let_next_launch_begin() { simt::let_next_launch_begin(); }
inline void copy_async_commit() { simt::copy_commit(); }
template <int pending>
void copy_async_wait() {
    simt::copy_wait(pending);
}

inline void load_matrices(std::uint32_t (&registers)[4], const void* row) {
    for (int word = 0; word < 4; ++word) simt::note(static_cast<const char*>(row) + 4 * word, 4, false, false);
    simt::whole_warp_collective(
        "load_matrices", {row, registers, 0},
        [](simt::Lane* lanes, unsigned) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int matrix = 0; matrix < 4; ++matrix) {
                    std::memcpy(static_cast<std::uint32_t*>(lanes[lane].out) + matrix,
                                static_cast<const char*>(lanes[matrix * 8 + lane / 4].in) + lane % 4 * 4, 4);
                }
            }
        },
        simt::Loc::current());
}

inline void load_matrices_if(bool is_wanted, std::uint32_t (&registers)[4], const void* row) {
    if (is_wanted) return load_matrices(registers, row);
    std::memset(registers, 0x5A, sizeof registers);  // nobody may rely on them
}

inline void multiply_add_s8(std::int32_t (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    struct Operands {
        std::uint32_t a[4];
        std::uint32_t b[2];
    };
    Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    simt::whole_warp_collective(
        "multiply_add_s8", {&mine, sums, 0},
        [](simt::Lane* lanes, unsigned) {
            std::int8_t whole_a[16][32];
            std::int8_t whole_b[8][32];
            for (int lane = 0; lane < 32; ++lane) {
                const auto& from = *static_cast<const Operands*>(lanes[lane].in);
                for (int r = 0; r < 4; ++r) {
                    std::memcpy(&whole_a[lane / 4 + 8 * (r % 2)][lane % 4 * 4 + 16 * (r / 2)], &from.a[r], 4);
                }
                for (int r = 0; r < 2; ++r) std::memcpy(&whole_b[lane / 4][lane % 4 * 4 + 16 * r], &from.b[r], 4);
            }
            for (int lane = 0; lane < 32; ++lane) {
                for (int r = 0; r < 4; ++r) {
                    const int row = lane / 4 + 8 * (r / 2);
                    const int col = lane % 4 * 2 + r % 2;
                    std::int32_t sum = 0;
                    for (int h = 0; h < 32; ++h) sum += whole_a[row][h] * whole_b[col][h];
                    auto& total = static_cast<std::int32_t*>(lanes[lane].out)[r];
                    total =
                        static_cast<std::int32_t>(static_cast<std::uint32_t>(total) + static_cast<std::uint32_t>(sum));
                }
            }
        },
        simt::Loc::current());
}

inline void multiply_add_s8_if(bool is_wanted, std::int32_t (&sums)[4], const std::uint32_t (&a)[4],
                               const std::uint32_t (&b)[2]) {
    if (is_wanted) multiply_add_s8(sums, a, b);
}

// --- products of warpgroups -----------------------------------------------------------------------------------------

inline std::uint64_t wgmma_matrix(const void* rows) {
    return std::uint64_t{simt::shared_address(rows)} >> 4 | std::uint64_t{1} << 16 | std::uint64_t{64} << 32 |
           std::uint64_t{1} << 62;
}
inline void fence_async_proxy() { simt::fence_async_proxy(); }
inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit(SIMT_LOC) { simt::wgmma_commit(loc); }
template <int pending>
void wgmma_wait(SIMT_LOC) {
    simt::wgmma_wait(pending, loc);
}
template <int cols>
void wgmma_s8(std::int32_t (&sums)[cols / 8][4], std::uint64_t a, std::uint64_t b, SIMT_LOC) {
    static_assert(cols == 128 || cols == 256);
    simt::wgmma(cols, sums, a, b, loc);
}

// --- 16-bit products ------------------------------------------------------------------------------------------------

inline std::uint64_t read_once_policy() { return 0; }
inline void copy_async_16_once(void* target, const void* source, int bytes, std::uint64_t /*policy*/) {
    copy_async_16(target, source, bytes);
}

inline uint4 load_16_once(const void* source, std::uint64_t /*policy*/) {
    // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): the hardware faults on these
    if ((reinterpret_cast<std::uintptr_t>(source) & 15U) != 0) simt::fail("load_16_once from a misaligned address");
    return *static_cast<const uint4*>(source);
}

inline std::uint32_t select_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = std::uint64_t{high} << 32U | low;
    std::uint32_t result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned which = selector >> (4 * i) & 7U;
        result |= static_cast<std::uint32_t>(bytes >> (8 * which) & 0xFFU) << (8 * i);
    }
    return result;
}

inline std::uint32_t mask_or(std::uint32_t value, std::uint32_t mask, std::uint32_t bits) {
    return (value & mask) | bits;
}
inline std::uint32_t in_register(std::uint32_t constant) { return constant; }
inline std::int64_t made_again(std::int64_t number) { return number; }
inline int made_again(int number) { return number; }

// Sums are rounded after each product here; the order and the precision of the hardware's sums are its own. `depth`
// elements of type T fill 32 bytes of a row, which lie in the registers as those of `multiply_add_s8` do.
template <class T>
void multiply_add_floats(const char* what, float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    struct Operands {
        std::uint32_t a[4];
        std::uint32_t b[2];
        float sums[4];
    };
    Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {sums[0], sums[1], sums[2], sums[3]}};
    simt::whole_warp_collective(
        what, {&mine, sums, 0},
        [](simt::Lane* lanes, unsigned) {
            constexpr int depth = 32 / sizeof(T);
            T whole_a[16][depth];
            T whole_b[8][depth];
            for (int lane = 0; lane < 32; ++lane) {
                const auto& from = *static_cast<const Operands*>(lanes[lane].in);
                for (int r = 0; r < 4; ++r) {
                    std::memcpy(static_cast<void*>(
                                    &whole_a[lane / 4 + 8 * (r % 2)][lane % 4 * depth / 8 + depth / 2 * (r / 2)]),
                                &from.a[r], 4);
                }
                for (int r = 0; r < 2; ++r) {
                    std::memcpy(static_cast<void*>(&whole_b[lane / 4][lane % 4 * depth / 8 + depth / 2 * r]),
                                &from.b[r], 4);
                }
            }
            for (int lane = 0; lane < 32; ++lane) {
                for (int r = 0; r < 4; ++r) {
                    const int row = lane / 4 + 8 * (r / 2);
                    const int col = lane % 4 * 2 + r % 2;
                    float sum = static_cast<const Operands*>(lanes[lane].in)->sums[r];
                    for (int k = 0; k < depth; ++k) {
                        sum += static_cast<float>(whole_a[row][k]) * static_cast<float>(whole_b[col][k]);
                    }
                    static_cast<float*>(lanes[lane].out)[r] = sum;
                }
            }
        },
        simt::Loc::current());
}
inline void multiply_add_f16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    multiply_add_floats<__half>("multiply_add_f16", sums, a, b);
}
inline void multiply_add_bf16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    multiply_add_floats<__nv_bfloat16>("multiply_add_bf16", sums, a, b);
}
inline void multiply_add_tf32(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    for (const std::uint32_t bits : {a[0], a[1], a[2], a[3], b[0], b[1]}) {
        const bool is_finite = (bits & 0x7F800000U) != 0x7F800000U;  // NaN may have any bits
        if (is_finite && (bits & 0x1FFFU) != 0) simt::fail("multiply_add_tf32 of a number that is none of tf32");
    }
    multiply_add_floats<float>("multiply_add_tf32", sums, a, b);
}

}  // namespace octavo::cuda
