// Loops over arrays that live in registers.
#pragma once

namespace octavo::cpu::OCTAVO_ISA {

// Lambdas that must dissolve into their caller before GCC decides which arrays live in registers.
#define OCTAVO_INLINE __attribute__((always_inline))

// An index that is part of its type.
template <int Value>
struct IndexConstant {
    constexpr operator int() const { return Value; }  // NOLINT(google-explicit-constructor): it stands for the number
};

// Call body(0), ..., body(Count - 1) with indices the compiler knows: an array of accumulators lives in registers only
// where GCC never sees a variable index into it.
template <int Count, int Index = 0, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
    if constexpr (Index < Count) {
        body(IndexConstant<Index>{});
        unroll<Count, Index + 1>(body);
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
