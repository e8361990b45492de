// Deterministic random numbers (splitmix64), the same on every machine.
#pragma once

#include <cstdint>

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t bits() {
        state_ += 0x9E3779B97F4A7C15U;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
        return z ^ (z >> 31U);
    }

    // In [low, high], both included.
    std::int64_t integer(std::int64_t low, std::int64_t high) {
        return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
    }

    // In [low, high).
    double uniform(double low, double high) {
        return low + (high - low) * static_cast<double>(bits() >> 11U) * 0x1p-53;
    }

    // Bell-shaped, mean 0, standard deviation 1, within +-3.5 or so.
    double normal() {
        double sum = 0;
        for (int i = 0; i < 4; ++i) sum += uniform(-1, 1);
        return sum * 0.86602540378443865;  // sqrt(3) / 2: each term has variance 1/3
    }

private:
    std::uint64_t state_;
};
