// AVX2 has no instruction for four byte products: vpmaddubsw multiplies unsigned by signed bytes and adds two products
// in 16 bit, where they saturate.
//
// Few rows: |w| times x with the sign of w. The sum of two such products fits 16 bit for codes of X within [-127, 127]
// and any code of W (2 * 127 * 128 = 32512), and W is read as it is packed.
//
// More rows: pairs, with half the multiplications:
//
//   x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1
//
// The sums of two codes fit 16 bit; vpmaddwd multiplies them and adds two products in 32 bit. x0 x1 is summed once for
// each row and w0 w1 once for each output feature (the numbers of which Plan's sums are too large). Everything is
// modulo 2^32, so it is exact for all codes. (S. Winograd, A New Algorithm for Inner Product, 1968.)
#pragma once

#include <immintrin.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

struct SignedDot {
    static constexpr int rows = 4;
    static constexpr int blocks = 1;
    static constexpr int vectors = 2;
    static constexpr bool x_is_unsigned = false;
    static constexpr bool x_is_symmetric = true;
    using Accumulator = __m256i;
    using X = __m256i;
    struct W {
        __m256i magnitude;
        __m256i value;
    };
    static Accumulator zero() { return _mm256_setzero_si256(); }
    static X broadcast(const std::int8_t* p) { return _mm256_set1_epi32(group_at(p)); }
    static W load(const std::int8_t* p) {
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_abs_epi8(value), value};
    }
    static void multiply_add(Accumulator& acc, X x, const W& w) {
        const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        // Assembly for the reason given in avx512_vnni.hpp.
        __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(sums));
    }
    static void store(std::int32_t* p, Accumulator acc) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), acc); }
    static void add(std::int32_t* p, Accumulator acc) {
        auto* const target = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), acc));
    }
};

namespace pairs {

constexpr std::int64_t rows = 4;

// The even and the odd ones of 32 codes in 16 bit: of each group of 4 neighbors, (0, 2) and (1, 3).
struct Halves {
    __m256i even;
    __m256i odd;
};
inline Halves halves(const std::int8_t* p) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), _mm256_srai_epi16(codes, 8)};
}

// panel[k / 4][row][(0, 2), (1, 3)], so that `multiply` reads it from the first byte to the last.
inline std::int32_t place_row(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    constexpr std::int64_t group = 8;  // bytes
    constexpr std::int64_t stride = rows * group;
    __m256i products = _mm256_setzero_si256();
    std::int8_t* target = panel + row * group;
    for (std::int64_t k = 0; k < depth; k += 32, target += 8 * stride) {
        const Halves x = halves(codes + k);
        products = _mm256_add_epi32(products, _mm256_madd_epi16(x.even, x.odd));
        const __m256i low = _mm256_unpacklo_epi32(x.even, x.odd);   // groups 0, 1, 4, 5
        const __m256i high = _mm256_unpackhi_epi32(x.even, x.odd);  // groups 2, 3, 6, 7
        const __m128i quarters[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                                     _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
        unroll<4>([&](auto i) OCTAVO_INLINE {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(target + 2 * i * stride), quarters[i]);
            _mm_storeh_pd(reinterpret_cast<double*>(target + (2 * i + 1) * stride), _mm_castsi128_pd(quarters[i]));
        });
    }
    std::int32_t lanes[8];
    __builtin_memcpy(lanes, &products, sizeof lanes);
    std::uint32_t sum = 0;
    for (const std::int32_t lane : lanes) sum += static_cast<std::uint32_t>(lane);
    return static_cast<std::int32_t>(sum);
}

// target[k / 4][feature / 8][(1, 3) of 8 features, (0, 2) of 8 features].
inline void regroup(const std::int8_t* w, std::int64_t /*w_stride*/, std::int64_t /*cols*/, std::int64_t depth,
                    std::int8_t* target, std::int32_t* offsets) {
    auto* const out = reinterpret_cast<__m256i*>(target);
    unroll<2>([&](auto half) OCTAVO_INLINE {
        auto* const sums = reinterpret_cast<__m256i*>(offsets + half * 8);
        __m256i products = _mm256_loadu_si256(sums);
        for (std::int64_t group = 0; group < depth / 4; ++group) {
            const Halves codes = halves(w + group * 64 + half * 32);
            _mm256_store_si256(out + group * 4 + half * 2, codes.odd);
            _mm256_store_si256(out + group * 4 + half * 2 + 1, codes.even);
            products = _mm256_add_epi32(products, _mm256_madd_epi16(codes.even, codes.odd));
        }
        _mm256_storeu_si256(sums, products);
    });
}

// One row of X by 16 output features, 4 along k: W in ymm8 to ymm11.
#define OCTAVO_PAIRS_ROW(offset, left, right) \
    "vpbroadcastd " #offset                   \
    "(%[x]), %%ymm12\n\t"                     \
    "vpbroadcastd 4+" #offset                 \
    "(%[x]), %%ymm13\n\t"                     \
    "vpaddw %%ymm12, %%ymm8, %%ymm14\n\t"     \
    "vpaddw %%ymm12, %%ymm10, %%ymm12\n\t"    \
    "vpaddw %%ymm13, %%ymm9, %%ymm15\n\t"     \
    "vpaddw %%ymm13, %%ymm11, %%ymm13\n\t"    \
    "vpmaddwd %%ymm14, %%ymm15, %%ymm14\n\t"  \
    "vpmaddwd %%ymm12, %%ymm13, %%ymm12\n\t"  \
    "vpaddd %%ymm14, %[" #left "], %[" #left  \
    "]\n\t"                                   \
    "vpaddd %%ymm12, %[" #right "], %[" #right "]\n\t"

// 4 x 16 sums. Assembly because it takes all 16 registers, and GCC 12 keeps some of them in memory.
inline void multiply(const ProductTile& tile) {
    const std::int8_t* x = tile.x;
    const std::int8_t* w = tile.w;
    std::int64_t groups = tile.depth / 4;
    __m256i s0 = _mm256_setzero_si256();
    __m256i s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    __asm__ volatile(
        ".p2align 5\n"
        "1:\n\t"
        "vmovdqa (%[w]), %%ymm8\n\t"
        "vmovdqa 32(%[w]), %%ymm9\n\t"
        "vmovdqa 64(%[w]), %%ymm10\n\t"
        "vmovdqa 96(%[w]), %%ymm11\n\t"
        // clang-format off
        OCTAVO_PAIRS_ROW(0, s0, s1)
        OCTAVO_PAIRS_ROW(8, s2, s3)
        OCTAVO_PAIRS_ROW(16, s4, s5)
        OCTAVO_PAIRS_ROW(24, s6, s7)
        // clang-format on
        "add $32, %[x]\n\t"
        "add $128, %[w]\n\t"
        "dec %[groups]\n\t"
        "jnz 1b"
        : [x] "+r"(x), [w] "+r"(w), [groups] "+r"(groups), [s0] "+x"(s0), [s1] "+x"(s1), [s2] "+x"(s2), [s3] "+x"(s3),
          [s4] "+x"(s4), [s5] "+x"(s5), [s6] "+x"(s6), [s7] "+x"(s7)
        :
        : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
    const __m256i sums[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
    auto* const acc = reinterpret_cast<__m256i*>(tile.acc);
    if (tile.first) {
        unroll<8>([&](auto i) OCTAVO_INLINE { _mm256_store_si256(acc + i, sums[i]); });
    } else {
        unroll<8>([&](auto i) OCTAVO_INLINE {
            _mm256_store_si256(acc + i, _mm256_add_epi32(_mm256_load_si256(acc + i), sums[i]));
        });
    }
}
#undef OCTAVO_PAIRS_ROW

}  // namespace pairs

constinit const Plan few = dot_plan<SignedDot>(16);
constinit const Plan many{.rows = pairs::rows,
                          .cols = 16,
                          .depth = 512,  // 16 KiB of W
                          .block_rows = 256,
                          .x_size = 2,
                          .regrouped = 2,
                          .x_is_unsigned = false,
                          .x_is_symmetric = false,
                          .place_row = pairs::place_row,
                          .regroup = pairs::regroup,
                          .multiply = pairs::multiply,
                          .enter = nullptr,
                          .leave = nullptr};

}  // namespace octavo::cpu::OCTAVO_ISA
