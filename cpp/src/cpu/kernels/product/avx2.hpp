// AVX2 has no instruction for four byte products: vpmaddubsw multiplies unsigned by signed bytes and adds two products
// in 16 bit, where they saturate. Both ways around that are exact for all codes, modulo 2^32.
//
// Few rows: x + 128 as two halves of 4 bits, 16 high + low. The sums of products of half bytes fit 16 bit eight times
// over (8 * 2 * 15 * 128 = 30720), and W is read as it is packed.
//
// More rows: pairs, with half the multiplications:
//
//   x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1
//
// The sums of two codes fit 16 bit; vpmaddwd multiplies them and adds two products in 32 bit. x0 x1 is summed once for
// each row and w0 w1 once for each output feature (the numbers by which Plan's sums are too large). (S. Winograd, A New
// Algorithm for Inner Product, 1968.)
#pragma once

#include <immintrin.h>

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// Rows of 16 sums, two vectors each, into rows of a tile that are `stride` sums apart.
template <int Rows>
void put_sums(const __m256i* sums, bool first, std::int32_t* acc, std::int64_t stride) {
    unroll<Rows * 2>([&](auto i) OCTAVO_INLINE {
        auto* const target = reinterpret_cast<__m256i*>(acc + i / 2 * stride + i % 2 * 8);
        _mm256_store_si256(target, first ? sums[i] : _mm256_add_epi32(_mm256_load_si256(target), sums[i]));
    });
}

namespace half_bytes {

constexpr std::int64_t rows = 2;
constexpr std::int64_t cols = 64;
constexpr std::int64_t group = 8;  // bytes of 4 neighbors: their low halves, then their high ones

// panel[k / 4][row][low, high][k % 4]
inline std::int32_t place_row(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    const __m128i low_half = _mm_set1_epi8(15);
    std::int8_t* target = panel + row * group;
    for (std::int64_t k = 0; k < depth; k += 16, target += 4 * rows * group) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k));
        const __m128i u = _mm_xor_si128(x, _mm_set1_epi8(-128));
        const __m128i low = _mm_and_si128(u, low_half);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(u, 4), low_half);
        const __m128i groups[2] = {_mm_unpacklo_epi32(low, high), _mm_unpackhi_epi32(low, high)};
        unroll<2>([&](auto i) OCTAVO_INLINE {
            std::int8_t* const first = target + 2 * i * rows * group;
            _mm_storel_epi64(reinterpret_cast<__m128i*>(first), groups[i]);
            _mm_storeh_pd(reinterpret_cast<double*>(first + rows * group), _mm_castsi128_pd(groups[i]));
        });
    }
    return 0;
}

// One half of a row of X by 16 output features, 4 along k: W in ymm12 and ymm13, sums of 16 bit.
#define OCTAVO_HALF(offset, left, right)          \
    "vpbroadcastd " #offset                       \
    "(%[x]), %%ymm14\n\t"                         \
    "vpmaddubsw %%ymm12, %%ymm14, %%ymm15\n\t"    \
    "vpmaddubsw %%ymm13, %%ymm14, %%ymm14\n\t"    \
    "vpaddw %%ymm15, %%ymm" #left ", %%ymm" #left \
    "\n\t"                                        \
    "vpaddw %%ymm14, %%ymm" #right ", %%ymm" #right "\n\t"
#define OCTAVO_STEP(ahead, halves)    \
    "vmovdqu (%[w]), %%ymm12\n\t"     \
    "vmovdqu 32(%[w]), %%ymm13\n\t"   \
    "prefetcht0 " ahead "\n\t" halves \
    "add $64, %[w]\n\t"               \
    "add $16, %[x]\n\t"
// Eight steps of 4 along k, before the sums are full. A line of each of four blocks to come is fetched in four.
#define OCTAVO_EIGHT_STEPS(halves) \
    ".rept 2\n\t"                                 \
    OCTAVO_STEP("(%[ahead])", halves)             \
    OCTAVO_STEP("(%[ahead], %[stride])", halves)  \
    OCTAVO_STEP("(%[ahead], %[stride], 2)", halves) \
    OCTAVO_STEP("(%[ahead], %[stride3])", halves) \
    "add $64, %[ahead]\n\t"                       \
    ".endr\n\t"
#define OCTAVO_ZERO(sum) "vpxor %%xmm" #sum ", %%xmm" #sum ", %%xmm" #sum "\n\t"
// sums += low + 16 high, in 32 bit.
#define OCTAVO_WIDEN(low, high, sums)                   \
    "vpmaddwd %[ones], %%ymm" #low ", %%ymm" #low       \
    "\n\t"                                              \
    "vpmaddwd %[sixteens], %%ymm" #high ", %%ymm" #high \
    "\n\t"                                              \
    "vpaddd %%ymm" #low ", %[" #sums "], %[" #sums      \
    "]\n\t"                                             \
    "vpaddd %%ymm" #high ", %[" #sums "], %[" #sums "]\n\t"

// Rows by the 16 output features from column j of the tile on, over `depth` along k from `begin` on. Of four blocks
// from `ahead` on, depth / 16 lines each are fetched meanwhile. Assembly because GCC 12 keeps the sums of 2 rows in
// memory.
template <int Rows>
void multiply_rows(const ProductTile& tile, std::int64_t j, std::int64_t begin, std::int64_t depth,
                   const std::int8_t* ahead) {
    const std::int8_t* x = tile.x + begin / 4 * rows * group;
    const std::int8_t* w = tile.w + j / 16 * tile.w_stride + begin * 16;
    const std::int64_t stride = tile.w_stride;
    const std::int64_t stride3 = 3 * stride;
    std::int64_t turns = depth / 32;
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i sixteens = _mm256_set1_epi16(16);
    // NOLINTBEGIN(misc-const-correctness): the assembly adds to them
    __m256i s0 = _mm256_setzero_si256();
    __m256i s1 = s0, s2 = s0, s3 = s0;
    // NOLINTEND(misc-const-correctness)
    // clang-format off
    if constexpr (Rows == 1) {
        __asm__ volatile(
            "1:\n\t"
            OCTAVO_ZERO(4) OCTAVO_ZERO(5) OCTAVO_ZERO(6) OCTAVO_ZERO(7)
            OCTAVO_EIGHT_STEPS(OCTAVO_HALF(0, 4, 5) OCTAVO_HALF(4, 6, 7))
            OCTAVO_WIDEN(4, 6, s0) OCTAVO_WIDEN(5, 7, s1)
            "dec %[turns]\n\t"
            "jnz 1b"
            : [x] "+r"(x), [w] "+r"(w), [ahead] "+r"(ahead), [turns] "+r"(turns), [s0] "+x"(s0), [s1] "+x"(s1)
            : [ones] "m"(ones), [sixteens] "m"(sixteens), [stride] "r"(stride), [stride3] "r"(stride3)
            : "xmm4", "xmm5", "xmm6", "xmm7", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
    } else {
        __asm__ volatile(
            "1:\n\t"
            OCTAVO_ZERO(4) OCTAVO_ZERO(5) OCTAVO_ZERO(6) OCTAVO_ZERO(7)
            OCTAVO_ZERO(8) OCTAVO_ZERO(9) OCTAVO_ZERO(10) OCTAVO_ZERO(11)
            OCTAVO_EIGHT_STEPS(OCTAVO_HALF(0, 4, 5) OCTAVO_HALF(4, 6, 7) OCTAVO_HALF(8, 8, 9) OCTAVO_HALF(12, 10, 11))
            OCTAVO_WIDEN(4, 6, s0) OCTAVO_WIDEN(5, 7, s1) OCTAVO_WIDEN(8, 10, s2) OCTAVO_WIDEN(9, 11, s3)
            "dec %[turns]\n\t"
            "jnz 1b"
            : [x] "+r"(x), [w] "+r"(w), [ahead] "+r"(ahead), [turns] "+r"(turns), [s0] "+x"(s0), [s1] "+x"(s1),
              [s2] "+x"(s2), [s3] "+x"(s3)
            : [ones] "m"(ones), [sixteens] "m"(sixteens), [stride] "r"(stride), [stride3] "r"(stride3)
            : "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
              "memory", "cc");
    }
    // clang-format on
    const __m256i sums[4] = {s0, s1, s2, s3};
    put_sums<Rows>(sums, tile.first && begin == 0, tile.acc + j, cols);
}
#undef OCTAVO_HALF
#undef OCTAVO_STEP
#undef OCTAVO_EIGHT_STEPS
#undef OCTAVO_ZERO
#undef OCTAVO_WIDEN

// Four blocks slice by slice, so that they are fetched as four streams side by side, as fast as memory is.
inline void multiply(const ProductTile& tile) {
    constexpr std::int64_t slice = 256;  // 16 KiB of W
    for (std::int64_t begin = 0; begin < tile.depth; begin += slice) {
        const std::int64_t left = tile.depth - begin;
        const std::int64_t depth = left < slice ? left : slice;
        for (std::int64_t j = 0; j < tile.cols; j += 16) {
            // The same places of the next slice, behind the last of what comes next, most likely the next four blocks.
            const std::int64_t next = begin + slice + j / 16 * (depth / 4);
            const std::int8_t* ahead = tile.w + next * 16;
            if (next >= tile.depth) {
                const std::int8_t* const behind = tile.ahead == nullptr ? tile.w + 4 * tile.w_stride : tile.ahead;
                ahead = behind + (next - tile.depth) * 16;
            }
            tile.rows == 1 ? multiply_rows<1>(tile, j, begin, depth, ahead)
                           : multiply_rows<2>(tile, j, begin, depth, ahead);
        }
    }
}

}  // namespace half_bytes

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
    // NOLINTBEGIN(misc-const-correctness): the assembly adds to them
    __m256i s0 = _mm256_setzero_si256();
    __m256i s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    // NOLINTEND(misc-const-correctness)
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
    put_sums<4>(sums, tile.first, tile.acc, 16);
}
#undef OCTAVO_PAIRS_ROW

}  // namespace pairs

constexpr Plan few{.rows = half_bytes::rows,
                   .cols = half_bytes::cols,
                   .depth = 256,  // 16 KiB of W
                   .block_rows = 16,
                   .x_size = 2,
                   .x_is_unsigned = true,
                   .place_row = half_bytes::place_row,
                   .multiply = half_bytes::multiply};
constexpr Plan many{.rows = pairs::rows,
                    .cols = 16,
                    .depth = 512,  // 16 KiB of W
                    .block_rows = 256,
                    .x_size = 2,
                    .regrouped = 2,
                    .place_row = pairs::place_row,
                    .regroup = pairs::regroup,
                    .multiply = pairs::multiply};

}  // namespace octavo::cpu::OCTAVO_ISA
