// The int8 product of one cache-sized tile, in one of two ways.
//
// Few rows of A: blocks of up to 4 rows of A by 4 rows of B, all in their natural order in memory. A block is 16 dot
// products whose vector accumulators stay in registers over the whole of k and are summed across lanes once at the end;
// B is read once. An instruction set supplies a `Dot`: loads of `width` neighbors along k, multiply_add, and the sums.
//
// Many rows of A (AVX-512 VNNI): B is first brought into the order of the instruction, see `packed_gemm`.
#include "cpu/kernels/functions.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr int block_cols = 4;

// An index that is part of its type.
template <int Value>
struct IndexConstant {
    constexpr operator int() const { return Value; }  // NOLINT(google-explicit-constructor): it stands for the number
};

#if defined(__AVX2__)
// The sums of the eight lanes of each of four vectors.
void sum_lanes(__m256i v0, __m256i v1, __m256i v2, __m256i v3, std::int32_t* sums) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v0, v1), _mm256_hadd_epi32(v2, v3));
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
    static __m256i add_halves(Accumulator v) {
        return _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xFF, v, 0),
                                _mm512_maskz_extracti64x4_epi64(0xFF, v, 1));
    }
    static void totals(Accumulator v0, Accumulator v1, Accumulator v2, Accumulator v3, std::int32_t* sums) {
        sum_lanes(add_halves(v0), add_halves(v1), add_halves(v2), add_halves(v3), sums);
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
    static void totals(Accumulator v0, Accumulator v1, Accumulator v2, Accumulator v3, std::int32_t* sums) {
        sum_lanes(v0, v1, v2, v3, sums);
    }
};

#else

// Portable: one product at a time.
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
    static void totals(Accumulator v0, Accumulator v1, Accumulator v2, Accumulator v3, std::int32_t* sums) {
        sums[0] = v0;
        sums[1] = v1;
        sums[2] = v2;
        sums[3] = v3;
    }
};

#endif

// 4 x 4 accumulators and 8 operands fit the 32 registers of AVX-512; the 16 of AVX2 hold 2 x 4.
constexpr int block_rows = Dot::a_is_shifted ? 4 : 2;

// Lambdas that must dissolve into their caller before GCC decides which arrays live in registers.
#define OCTAVO_INLINE __attribute__((always_inline))

// Call body(0), ..., body(Count - 1) with indices the compiler knows: an array of accumulators lives in registers only
// where GCC never sees a variable index into it.
template <int Count, int Index = 0, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
    if constexpr (Index < Count) {
        body(IndexConstant<Index>{});
        unroll<Count, Index + 1>(body);
    }
}

// acc[i, j] for `Rows` rows of A and `cols` <= 4 rows of B. Missing rows of B are stood in for by the last one.
template <int Rows>
void block(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
           const std::int32_t* b_sums, std::int64_t cols, std::int64_t k, std::int32_t* acc, std::int64_t acc_stride) {
    const std::int8_t* b_rows[block_cols];
    for (std::int64_t j = 0; j < block_cols; ++j) b_rows[j] = b + (j < cols ? j : cols - 1) * b_stride;

    Dot::Accumulator sums[Rows * block_cols];
    unroll<Rows * block_cols>([&](auto i) OCTAVO_INLINE { sums[i] = Dot::zero(); });
    const auto multiply_add = [&](auto load_a, auto load_b) OCTAVO_INLINE {
        Dot::Operand operands[block_cols];
        unroll<block_cols>([&](auto j) OCTAVO_INLINE { operands[j] = load_b(b_rows[j]); });
        unroll<Rows>([&](auto i) OCTAVO_INLINE {
            const auto row = load_a(a + i * a_stride);
            unroll<block_cols>([&](auto j)
                                   OCTAVO_INLINE { Dot::multiply_add(sums[i * block_cols + j], row, operands[j]); });
        });
    };
    std::int64_t depth = 0;
    for (; depth + Dot::width <= k; depth += Dot::width) {
        multiply_add([&](const std::int8_t* row) OCTAVO_INLINE { return Dot::load_a(row + depth); },
                     [&](const std::int8_t* row) OCTAVO_INLINE { return Dot::load_b(row + depth); });
    }
    if (depth < k) {
        multiply_add([&](const std::int8_t* row) OCTAVO_INLINE { return Dot::load_a_part(row + depth, k - depth); },
                     [&](const std::int8_t* row) OCTAVO_INLINE { return Dot::load_b_part(row + depth, k - depth); });
    }
    unroll<Rows>([&](auto i) OCTAVO_INLINE {
        std::int32_t totals[block_cols];
        Dot::totals(sums[i * block_cols], sums[i * block_cols + 1], sums[i * block_cols + 2], sums[i * block_cols + 3],
                    totals);
        for (std::int64_t j = 0; j < cols; ++j) {
            // The shifted sum may have wrapped; unsigned arithmetic wraps it back.
            auto total = static_cast<std::uint32_t>(totals[j]);
            if constexpr (Dot::a_is_shifted) total -= 128U * static_cast<std::uint32_t>(b_sums[j]);
            acc[i * acc_stride + j] = static_cast<std::int32_t>(total);
        }
    });
}

#if defined(__AVX512VNNI__)

// Many rows of A: B is copied, a slice of k at a time, to where the vector instruction wants it, 4 neighbors along k of
// 16 rows of B to a register. A block then needs no sums across lanes, which for k of a few hundred cost as much as the
// products themselves. The copy is small beside the products of 64 or more rows of A.
constexpr std::int64_t rows_worth_packing = 64;
constexpr std::int64_t packed_cols = 64;
constexpr std::int64_t slice_groups = 128;  // of 4 along k: 32 KiB of packed B
constexpr int packed_vectors = packed_cols / 16;

// packed[group][j] = b[j, 4 * group ... 4 * group + 3]; zeros where there is no such row or column.
void pack(const std::int8_t* b, std::int64_t b_stride, std::int64_t cols, std::int64_t depth, std::uint32_t* packed) {
    // A cache line of B at a time: rows of B whose distance is a power of two push each other out of the cache, so that
    // a line may not be there any more when it is come back to.
    constexpr std::int64_t line = 64;
    for (std::int64_t begin = 0; begin < depth; begin += line) {
        const std::int64_t end = depth - begin < line ? depth : begin + line;
        for (std::int64_t j = 0; j < packed_cols; ++j) {
            std::int64_t k = begin;
            for (; k + 4 <= end && j < cols; k += 4) {
                __builtin_memcpy(packed + k / 4 * packed_cols + j, b + j * b_stride + k, 4);
            }
            for (; k < end; k += 4) {
                std::uint32_t group = 0;
                if (j < cols) __builtin_memcpy(&group, b + j * b_stride + k, static_cast<unsigned long>(end - k));
                packed[k / 4 * packed_cols + j] = group;
            }
        }
    }
}

// acc[i, j] += sum over the slice, for `Rows` rows of A and `cols` <= 64 packed rows of B.
template <int Rows>
void packed_block(const std::int8_t* a, std::int64_t a_stride, const std::uint32_t* packed, std::int64_t cols,
                  std::int64_t depth, std::int32_t* acc, std::int64_t acc_stride) {
    const auto mask = [&](std::int64_t vector) OCTAVO_INLINE {
        const std::int64_t count = cols - 16 * vector;
        return static_cast<__mmask16>(count >= 16  ? 0xFFFFU
                                      : count <= 0 ? 0U
                                                   : (1U << static_cast<unsigned>(count)) - 1U);
    };
    const __m512i shift = _mm512_set1_epi8(-128);
    __m512i sums[Rows * packed_vectors];
    unroll<Rows * packed_vectors>([&](auto i) OCTAVO_INLINE {
        constexpr std::int64_t row = i / packed_vectors;
        constexpr std::int64_t vector = i % packed_vectors;
        sums[i] = _mm512_maskz_loadu_epi32(mask(vector), acc + row * acc_stride + vector * 16);
    });
    const auto multiply_add = [&](const std::uint32_t* b, auto load_a) OCTAVO_INLINE {
        __m512i operands[packed_vectors];
        unroll<packed_vectors>([&](auto j) OCTAVO_INLINE { operands[j] = _mm512_loadu_si512(b + j * 16); });
        unroll<Rows>([&](auto i) OCTAVO_INLINE {
            const __m512i row = _mm512_xor_si512(_mm512_set1_epi32(load_a(a + i * a_stride)), shift);
            unroll<packed_vectors>(
                [&](auto j) OCTAVO_INLINE { Dot::multiply_add(sums[i * packed_vectors + j], row, operands[j]); });
        });
    };
    std::int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        multiply_add(packed + k / 4 * packed_cols, [&](const std::int8_t* row) OCTAVO_INLINE {
            std::int32_t group = 0;
            __builtin_memcpy(&group, row + k, 4);
            return group;
        });
    }
    if (k < depth) {
        multiply_add(packed + k / 4 * packed_cols, [&](const std::int8_t* row) OCTAVO_INLINE {
            std::int32_t group = 0;
            __builtin_memcpy(&group, row + k, static_cast<unsigned long>(depth - k));
            return group;
        });
    }
    unroll<Rows * packed_vectors>([&](auto i) OCTAVO_INLINE {
        constexpr std::int64_t row = i / packed_vectors;
        constexpr std::int64_t vector = i % packed_vectors;
        _mm512_mask_storeu_epi32(acc + row * acc_stride + vector * 16, mask(vector), sums[i]);
    });
}

void packed_gemm(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
                 const std::int32_t* b_sums, std::int64_t m, std::int64_t n, std::int64_t k, std::int32_t* acc,
                 std::int64_t acc_stride) {
    alignas(64) std::uint32_t packed[slice_groups * packed_cols];
    for (std::int64_t j = 0; j < n; j += packed_cols) {
        const std::int64_t cols = n - j < packed_cols ? n - j : packed_cols;
        for (std::int64_t i = 0; i < m; ++i) {
            for (std::int64_t c = 0; c < cols; ++c) {
                // What the shift of A will add too much.
                acc[i * acc_stride + j + c] =
                    static_cast<std::int32_t>(-128U * static_cast<std::uint32_t>(b_sums[j + c]));
            }
        }
        for (std::int64_t depth = 0; depth < k; depth += 4 * slice_groups) {
            const std::int64_t part = k - depth < 4 * slice_groups ? k - depth : 4 * slice_groups;
            pack(b + j * b_stride + depth, b_stride, cols, part, packed);
            // While this slice is multiplied, the next one is on its way: of each row it is too short a piece for the
            // processor to foresee. Every block asks for its share of the rows.
            const std::int64_t next = depth + part;
            const std::int64_t next_end = next + part < k ? next + part : k;
            std::int64_t fetched = 0;
            std::int64_t i = 0;
            for (; i + 6 <= m; i += 6) {
                for (; fetched * m < (i + 6) * cols; ++fetched) {
                    for (std::int64_t at = next; at < next_end; at += 64) {
                        _mm_prefetch(b + (j + fetched) * b_stride + at, _MM_HINT_T1);
                    }
                }
                packed_block<6>(a + i * a_stride + depth, a_stride, packed, cols, part, acc + i * acc_stride + j,
                                acc_stride);
            }
            for (; i < m; ++i) {
                packed_block<1>(a + i * a_stride + depth, a_stride, packed, cols, part, acc + i * acc_stride + j,
                                acc_stride);
            }
        }
    }
}

#endif

}  // namespace

void gemm(const std::int8_t* a, std::int64_t a_stride, const std::int8_t* b, std::int64_t b_stride,
          const std::int32_t* b_sums, std::int64_t m, std::int64_t n, std::int64_t k, std::int32_t* acc,
          std::int64_t acc_stride) {
#if defined(__AVX512VNNI__)
    if (m >= rows_worth_packing) return packed_gemm(a, a_stride, b, b_stride, b_sums, m, n, k, acc, acc_stride);
#endif
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
