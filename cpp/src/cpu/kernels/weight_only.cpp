// The product of activations as they are by int8 weights, in float32 (table.hpp says in which order).
//
// A register holds 4 neighbors along k of one or more output features, which is how packed codes lie in memory: they
// are widened and converted in place, and 4 values of X are repeated beside them.
#include "cpu/kernels/floats.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t group = 64;                        // numbers of 16 output features by 4 along k
constexpr int vectors = static_cast<int>(group / width);  // registers that hold them

// Rows of X and registers of W whose sums fit the registers: AVX2 and SSE have 16 of them, the others 32.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int most_rows = 4;
#else
constexpr int most_rows = 3;
#endif
constexpr int square_vectors = 4;

// 4 values, as often as they fit.
[[gnu::always_inline]] inline void repeat(const float* p, Floats& vector) {
#if defined(__AVX512F__)
    vector = _mm512_maskz_broadcast_f32x4(0xFFFF, _mm_loadu_ps(p));
#elif defined(__AVX2__)
    vector = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    read(p, vector);
#endif
}

// `width` packed codes as numbers.
[[gnu::always_inline]] inline void convert(const std::int8_t* codes, Floats& numbers) {
#if defined(__AVX512F__)
    // Masked forms, of all lanes, here and above: GCC 12 warns inside the others.
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    numbers = _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
#elif defined(__AVX2__)
    numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__aarch64__)
    std::int32_t four = 0;
    __builtin_memcpy(&four, codes, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    numbers = vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
    for (std::int64_t i = 0; i < width; ++i) numbers[i] = static_cast<float>(codes[i]);
#endif
}

// The zeropoint of each number of a group.
struct Zeropoints {
    explicit Zeropoints(const float* zeropoint) {
        for (std::int64_t i = 0; i < group; ++i) values[i] = zeropoint[i / 4];
    }
    void add(std::int64_t v, Floats& numbers) const {
        Floats zeropoints;
        read(values + v * width, zeropoints);
        numbers += zeropoints;
    }
    float values[group];
};

// `Rows` rows from row i on by `Vectors` registers of the 16 output features from register v on.
template <int Rows, int Vectors, class Load>
[[gnu::always_inline]] inline void multiply_square(const FloatTile& tile, std::int64_t i, std::int64_t v, Load load) {
    Floats sums[Rows * Vectors];
    float* const target = tile.sums + i * group + v * width;
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = Floats{}; });
    const float* const x = tile.x + i * tile.x_stride;
    for (std::int64_t k = 0; k < tile.depth; k += 4) {
        Floats rows[Rows];
        unroll<Rows>([&](auto r) OCTAVO_INLINE { repeat(x + r * tile.x_stride + k, rows[r]); });
        unroll<Vectors>([&](auto s) OCTAVO_INLINE {
            Floats weights;
            load(k * 16, v + s, weights);
            unroll<Rows>([&](auto r) OCTAVO_INLINE { fused_multiply_add(rows[r], weights, sums[r * Vectors + s]); });
        });
    }
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE {
        float* const place = target + s / Vectors * group + s % Vectors * width;
        Floats before{};
        if (!tile.first) read(place, before);
        before += sums[s];
        __builtin_memcpy(place, &before, sizeof before);
    });
}

template <int Rows, int Vectors, class Load>
void multiply_rows(const FloatTile& tile, std::int64_t i, Load load) {
    for (std::int64_t v = 0; v < vectors; v += Vectors) multiply_square<Rows, Vectors>(tile, i, v, load);
}

template <class Load>
void multiply_all(const FloatTile& tile, Load load) {
    // One row has so few sums that all of them are needed to keep the processor busy.
    constexpr int row_vectors = vectors < 8 ? vectors : 8;
    std::int64_t i = 0;
    for (; i + most_rows <= tile.rows; i += most_rows) multiply_rows<most_rows, square_vectors>(tile, i, load);
    for (; i + 2 <= tile.rows; i += 2) multiply_rows<2, square_vectors>(tile, i, load);
    for (; i < tile.rows; ++i) multiply_rows<1, row_vectors>(tile, i, load);
}

}  // namespace

void widen(const std::int8_t* w, std::int64_t depth, const float* zeropoint, float* target) {
    const auto all = [&](auto prepare) OCTAVO_INLINE {
        for (std::int64_t k = 0; k < depth; k += 4) {
            unroll<vectors>([&](auto v) OCTAVO_INLINE {
                Floats weights;
                convert(w + k * 16 + v * width, weights);
                prepare(v, weights);
                __builtin_memcpy(target + k * 16 + v * width, &weights, sizeof weights);
            });
        }
    };
    if (zeropoint == nullptr) return all([](std::int64_t, Floats&) OCTAVO_INLINE {});
    const Zeropoints zeropoints(zeropoint);
    all([&](std::int64_t v, Floats& weights) OCTAVO_INLINE { zeropoints.add(v, weights); });
}

void multiply_floats(const FloatTile& tile) {
    if (tile.w_floats != nullptr) {
        return multiply_all(tile, [&](std::int64_t at, std::int64_t v, Floats& weights)
                                      OCTAVO_INLINE { read(tile.w_floats + at + v * width, weights); });
    }
    if (tile.zeropoint == nullptr) {
        return multiply_all(tile, [&](std::int64_t at, std::int64_t v, Floats& weights)
                                      OCTAVO_INLINE { convert(tile.w + at + v * width, weights); });
    }
    const Zeropoints zeropoints(tile.zeropoint);
    multiply_all(tile, [&](std::int64_t at, std::int64_t v, Floats& weights) OCTAVO_INLINE {
        convert(tile.w + at + v * width, weights);
        zeropoints.add(v, weights);
    });
}

void finish_floats(const float* sums, std::int64_t rows, const float* scale, float* y) {
    for (std::int64_t i = 0; i < rows * 16; ++i) {
        const float* const four = sums + i * 4;
        y[i] = ((four[0] + four[1]) + (four[2] + four[3])) * scale[i % 16];
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
