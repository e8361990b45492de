// Neon with SDOT (Armv8.2): 4 x 16 sums in 16 of the 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

struct Dot {
    static constexpr int rows = 4;
    static constexpr int blocks = 1;
    static constexpr int vectors = 4;
    using Accumulator = int32x4_t;
    using X = int8x16_t;
    using W = int8x16_t;
    static Accumulator zero() { return vdupq_n_s32(0); }
    static X broadcast(const std::int8_t* p) {
        std::int32_t group = 0;
        __builtin_memcpy(&group, p, sizeof group);
        return vreinterpretq_s8_s32(vdupq_n_s32(group));
    }
    static W load(const std::int8_t* p) { return vld1q_s8(p); }
    static void multiply_add(Accumulator& acc, X x, W w) { acc = vdotq_s32(acc, x, w); }
    static void add(std::int32_t* p, Accumulator acc) { vst1q_s32(p, vaddq_s32(vld1q_s32(p), acc)); }
};

}  // namespace octavo::cpu::OCTAVO_ISA
