// Stochastic rounding, for weights that are trained: codes that are right on average.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define OCTAVO_ANYWHERE __host__ __device__
#else
#define OCTAVO_ANYWHERE
#endif

namespace octavo {

struct RandomWords {
    std::uint32_t words[4];
};

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011): random words that
// depend on a counter and a key alone, so on no order of work.
OCTAVO_ANYWHERE inline RandomWords philox(RandomWords counter, std::uint64_t key) {
    constexpr std::uint64_t factors[] = {0xD2511F53U, 0xCD9E8D57U};
    constexpr std::uint32_t steps[] = {0x9E3779B9U, 0xBB67AE85U};
    std::uint32_t keys[] = {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32U)};
    std::uint32_t (&words)[4] = counter.words;
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = factors[0] * words[0];
        const std::uint64_t second = factors[1] * words[2];
        words[0] = static_cast<std::uint32_t>(second >> 32U) ^ words[1] ^ keys[0];
        words[1] = static_cast<std::uint32_t>(second);
        words[2] = static_cast<std::uint32_t>(first >> 32U) ^ words[3] ^ keys[1];
        words[3] = static_cast<std::uint32_t>(first);
        keys[0] += steps[0];
        keys[1] += steps[1];
    }
    return counter;
}

// The words for the elements `4 * quad` to `4 * quad + 3` of a row: counter (quad, row), each 64 bits, the low ones
// first.
OCTAVO_ANYWHERE inline RandomWords words_of(std::int64_t row, std::int64_t quad, std::uint64_t seed) {
    const auto word = [](std::int64_t value, unsigned shift) {
        return static_cast<std::uint32_t>(static_cast<std::uint64_t>(value) >> shift);
    };
    return philox({{word(quad, 0), word(quad, 32), word(row, 0), word(row, 32)}}, seed);
}

// The code of x by a scale, with u = (word >> 8) * 2^-24 in [0, 1):
//
//   r = x / scale,  q = clip(floor(r) + (u < r - floor(r) ? 1 : 0), -127, 127)
//
// in float32, the division rounded once, the rest exact: over all words q is r on average, to 2^-24, where it is not
// clipped. A scale of 0, NaN or Inf gives 0.
OCTAVO_ANYWHERE inline std::int8_t stochastic_code(float x, float scale, std::uint32_t word) {
    if (!(scale > 0.0F) || !(scale <= 3.402823466e38F)) return 0;
    const float ratio = x / scale;
    if (ratio >= 127.0F) return 127;
    if (!(ratio > -127.0F)) return -127;
    auto below = static_cast<int>(ratio);
    if (static_cast<float>(below) > ratio) --below;
    const float part = ratio - static_cast<float>(below);
    return static_cast<std::int8_t>(below + (static_cast<float>(word >> 8U) * 0x1p-24F < part ? 1 : 0));
}

}  // namespace octavo
