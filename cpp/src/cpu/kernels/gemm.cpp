// The int8 product of one cache-sized tile: blocks of up to 4 rows of A by 4 rows of B, both read along k.
//
// Every row keeps its natural order in memory (nothing is packed yet), so a block is 16 dot products whose vector
// accumulators stay in registers over the whole of k and are summed across lanes once at the end.
// An instruction set supplies a `Dot`: loads of `width` neighbors along k, multiply_add, and the sums over lanes.
#include "cpu/kernels/functions.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t block_cols = 4;

#if defined(__AVX2__)
// sums[j] = the sum of the eight lanes of v[j]
void sum_lanes(const __m256i (&v)[block_cols], std::int32_t* sums) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), all);
}
#endif

#if defined(__AVX512VNNI__)

// vpdpbusd multiplies unsigned by signed bytes: A is shifted by +128, and 128 * sum_k b is taken off at the end.
struct Dot {
    static constexpr std::int64_t width = 64;
    static constexpr bool a_is_shifted = true;
    using Accumulator = __m512i;
    using Operand = __m512i;
    static Accumulator zero() { return _mm512_setzero_si512(); }
    static __mmask64 first(std::int64_t count) { return ~__mmask64{0} >> static_cast<unsigned>(64 - count); }
    static Operand load_a(const std::int8_t* p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
    }
    static Operand load_b(const std::int8_t* p) { return _mm512_loadu_si512(p); }
    // Lanes past `count` hold 0 in B, so what they hold in A does not matter.
    static Operand load_a_part(const std::int8_t* p, std::int64_t count) {
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(count), p), _mm512_set1_epi8(-128));
    }
    static Operand load_b_part(const std::int8_t* p, std::int64_t count) {
        return _mm512_maskz_loadu_epi8(first(count), p);
    }
    // Inline assembly because GCC 12 copies the accumulators of _mm512_dpbusd_epi32 through other registers, which
    // halves the speed.
    static void multiply_add(Accumulator& acc, Operand a, Operand b) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    }
    // The masked form of the extraction, because GCC 12 takes the plain one for a use of uninitialized memory.
    static void totals(const Accumulator (&acc)[block_cols], std::int32_t* sums) {
        __m256i halves[block_cols];
        for (std::int64_t j = 0; j < block_cols; ++j) {
            halves[j] = _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xFF, acc[j], 0),
                                         _mm512_maskz_extracti64x4_epi64(0xFF, acc[j], 1));
        }
        sum_lanes(halves, sums);
    }
};

#elif defined(__AVX2__)

// Bytes are widened to 16 bit and multiplied by vpmaddwd, whose pair sums fit 32 bits (2 * 128 * 128). The byte
// instruction vpmaddubsw would be faster, but its 16-bit pair sums saturate.
struct Dot {
    static constexpr std::int64_t width = 16;
    static constexpr bool a_is_shifted = false;
    using Accumulator = __m256i;
    using Operand = __m256i;
    static Accumulator zero() { return _mm256_setzero_si256(); }
    static Operand load_a(const std::int8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Operand load_b(const std::int8_t* p) { return load_a(p); }
    static Operand load_a_part(const std::int8_t* p, std::int64_t count) {
        std::int8_t padded[width] = {};
        __builtin_memcpy(padded, p, static_cast<unsigned long>(count));
        return load_a(padded);
    }
    static Operand load_b_part(const std::int8_t* p, std::int64_t count) { return load_a_part(p, count); }
    static void multiply_add(Accumulator& acc, Operand a, Operand b) {
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
    }
    static void totals(const Accumulator (&acc)[block_cols], std::int32_t* sums) { sum_lanes(acc, sums); }
};

#else

// Portable: one product at a time, written so that compilers vectorize the loop over k where they can.
struct Dot {
    static constexpr std::int64_t width = 1;
    static constexpr bool a_is_shifted = false;
    using Accumulator = std::int32_t;
    using Operand = std::int32_t;
    static Accumulator zero() { return 0; }
    static Operand load_a(const std::int8_t* p) { return *p; }
    static Operand load_b(const std::int8_t* p) { return *p; }
    static Operand load_a_part(const std::int8_t* p, std::int64_t /*count*/) { return *p; }
    static Operand load_b_part(const std::int8_t* p, std::int64_t /*count*/) { return *p; }
    static void multiply_add(Accumulator& acc, Operand a, Operand b) { acc += a * b; }
    static void totals(const Accumulator (&acc)[block_cols], std::int32_t* sums) {
        for (std::int64_t j = 0; j < block_cols; ++j) sums[j] = acc[j];
    }
};

#endif

// 4 x 4 accumulators and 8 operands fit the 32 registers of AVX-512; the 16 of AVX2 hold 2 x 4.
constexpr std::int64_t block_rows = Dot::a_is_shifted ? 4 : 2;

// acc[i, j] for `Rows` rows of A and `cols` <= 4 rows of B. Missing rows of B are stood in for by the last one.
template <std::int64_t Rows>
void block(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
           const std::int32_t* b_sums, std::int64_t cols, std::int64_t k, std::int32_t* acc, std::int64_t acc_stride) {
    const std::int8_t* b_rows[block_cols];
    for (std::int64_t j = 0; j < block_cols; ++j) b_rows[j] = b + (j < cols ? j : cols - 1) * b_stride;

    typename Dot::Accumulator sums[Rows][block_cols];
    for (auto& row : sums) {
        for (auto& sum : row) sum = Dot::zero();
    }
    std::int64_t depth = 0;
    for (; depth + Dot::width <= k; depth += Dot::width) {
        typename Dot::Operand operand[block_cols];
        for (std::int64_t j = 0; j < block_cols; ++j) operand[j] = Dot::load_b(b_rows[j] + depth);
        for (std::int64_t i = 0; i < Rows; ++i) {
            const auto row = Dot::load_a(a + i * a_stride + depth);
            for (std::int64_t j = 0; j < block_cols; ++j) Dot::multiply_add(sums[i][j], row, operand[j]);
        }
    }
    if (depth < k) {
        typename Dot::Operand operand[block_cols];
        for (std::int64_t j = 0; j < block_cols; ++j) operand[j] = Dot::load_b_part(b_rows[j] + depth, k - depth);
        for (std::int64_t i = 0; i < Rows; ++i) {
            const auto row = Dot::load_a_part(a + i * a_stride + depth, k - depth);
            for (std::int64_t j = 0; j < block_cols; ++j) Dot::multiply_add(sums[i][j], row, operand[j]);
        }
    }
    for (std::int64_t i = 0; i < Rows; ++i) {
        std::int32_t totals[block_cols];
        Dot::totals(sums[i], totals);
        for (std::int64_t j = 0; j < cols; ++j) {
            // The shifted sum may have wrapped; unsigned arithmetic wraps it back.
            auto total = static_cast<std::uint32_t>(totals[j]);
            if constexpr (Dot::a_is_shifted) total -= 128U * static_cast<std::uint32_t>(b_sums[j]);
            acc[i * acc_stride + j] = static_cast<std::int32_t>(total);
        }
    }
}

}  // namespace

void gemm(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
          const std::int32_t* b_sums, std::int64_t m, std::int64_t n, std::int64_t k, std::int32_t* acc,
          std::int64_t acc_stride) {
    std::int64_t i = 0;
    const auto rows = [&](auto block_of_rows, std::int64_t count) {
        for (; i + count <= m; i += count) {
            for (std::int64_t j = 0; j < n; j += block_cols) {
                block_of_rows(a + i * a_stride, a_stride, b + j * b_stride, b_stride, b_sums + j,
                              n - j < block_cols ? n - j : block_cols, k, acc + i * acc_stride + j, acc_stride);
            }
        }
    };
    rows(block<block_rows>, block_rows);
    rows(block<1>, 1);
}

}  // namespace octavo::cpu::OCTAVO_ISA
