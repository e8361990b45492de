// The int8 product, by the best that this instruction set has (`few` and `many`), and the packed order of W.
#include "cpu/kernels/fours.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

#if defined(__AMX_INT8__) || defined(__AMXINT8__)
#include "cpu/kernels/product/amx_tiles.hpp"
#include "cpu/kernels/product/avx512_vnni.hpp"

// Behind the instructions that it is made of.
#include "cpu/kernels/product/amx.hpp"
#elif defined(__AVX512VNNI__)
#include "cpu/kernels/product/avx512_vnni.hpp"
namespace octavo::cpu::OCTAVO_ISA {
constexpr Plan many = dot_plan<Dot>(192);
constexpr Plan few = many;
}  // namespace octavo::cpu::OCTAVO_ISA
#elif defined(__AVX512BW__)
#include "cpu/kernels/product/avx512bw.hpp"
#elif defined(__AVXVNNI__)
#include "cpu/kernels/product/avx_vnni.hpp"
#elif defined(__AVX2__)
#include "cpu/kernels/product/avx2.hpp"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "cpu/kernels/product/neon_i8mm.hpp"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "cpu/kernels/product/neon_dotprod.hpp"
namespace octavo::cpu::OCTAVO_ISA {
constexpr Plan many = dot_plan(128);
constexpr Plan few = many;
}  // namespace octavo::cpu::OCTAVO_ISA
#else
#include "cpu/kernels/product/scalar.hpp"
#endif

namespace octavo::cpu::OCTAVO_ISA {

#if !defined(__AMX_INT8__) && !defined(__AMXINT8__)
constexpr Plan some = many;
#endif

void pack(const std::int8_t* codes, std::int64_t stride, std::int64_t cols, std::int64_t k, std::int8_t* packed) {
    // A cache line of each row at a time: rows whose distance is a power of two push each other out of the cache, so
    // that a line may not be there any more when it is come back to.
    constexpr std::int64_t line = 64;
    std::int64_t begin = 0;
    for (; cols == 16 && begin + line <= k; begin += line) {
        for (std::int64_t j = 0; j < 16; j += 4) {
            for (std::int64_t at = begin; at < begin + line; at += 16) {
                transpose_fours(codes + j * stride + at, stride, packed + at * 16 + j * 4, 64);
            }
        }
    }
    for (; begin < k; begin += line) {
        const std::int64_t size = k - begin < line ? k - begin : line;
        for (std::int64_t j = 0; j < 16; ++j) {
            std::int8_t bytes[line] = {};
            if (j < cols) __builtin_memcpy(bytes, codes + j * stride + begin, static_cast<unsigned long>(size));
            for (std::int64_t group = 0; group < line / 4; ++group) {
                __builtin_memcpy(packed + begin * 16 + group * 64 + j * 4, bytes + group * 4, 4);
            }
        }
    }
}

void transpose(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, std::int8_t* target) {
    // Sixteen bytes are four output by four input features. Their places among each other change as theirs within do.
    using Codes [[gnu::vector_size(16)]] = std::int8_t;
    for (std::int64_t row = 0; row < count; row += 16, w += w_stride, target += 256) {
        unroll<4>([&](auto features) OCTAVO_INLINE {
            unroll<4>([&](auto group) OCTAVO_INLINE {
                Codes codes;
                __builtin_memcpy(&codes, w + group * 64 + features * 16, 16);
                codes = __builtin_shufflevector(codes, codes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                __builtin_memcpy(target + features * 64 + group * 16, &codes, 16);
            });
        });
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
