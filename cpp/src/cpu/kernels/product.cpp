// The int8 product, by the best that this instruction set has.
#if defined(__AMX_INT8__) || defined(__AMXINT8__)
#include "cpu/kernels/product/amx.hpp"
#elif defined(__AVX512VNNI__)
#include "cpu/kernels/product/avx512_vnni.hpp"
#elif defined(__AVXVNNI__)
#include "cpu/kernels/product/avx_vnni.hpp"
#elif defined(__AVX2__)
#include "cpu/kernels/product/avx2.hpp"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "cpu/kernels/product/neon_i8mm.hpp"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "cpu/kernels/product/neon_dotprod.hpp"
#else
#include "cpu/kernels/product/scalar.hpp"
#endif

namespace octavo::cpu::OCTAVO_ISA {

void product(const ProductTile& tile) {
#if defined(__AMX_INT8__) || defined(__AMXINT8__)
    tile_product(tile);
#elif defined(__AVX2__)
    dot_product<Dot>(tile);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    matrix_product(tile);
#elif defined(__ARM_FEATURE_DOTPROD)
    dot_product(tile);
#else
    plain_product(tile);
#endif
}

void pack(const std::int8_t* codes, std::int64_t stride, std::int64_t cols, std::int64_t k, std::int8_t* packed) {
    // A cache line of each row at a time: rows whose distance is a power of two push each other out of the cache, so
    // that a line may not be there any more when it is come back to.
    constexpr std::int64_t line = 64;
    for (std::int64_t begin = 0; begin < k; begin += line) {
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

}  // namespace octavo::cpu::OCTAVO_ISA
