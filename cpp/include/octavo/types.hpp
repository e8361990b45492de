// Words shared by every operation: element types, devices and strided views.
#pragma once

#include <cstdint>

namespace [[gnu::visibility("default")]] octavo {

// Element types. Activations, weights and biases are f32, f16 or bf16; codes are i8; accumulators are i32.
enum class DType : std::uint8_t { f32, f16, bf16, i8, i32 };

// Bytes of one element.
[[nodiscard]] constexpr std::int64_t size_of(DType dtype) noexcept {
    switch (dtype) {
        case DType::f32:
        case DType::i32: return 4;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::i8: return 1;
    }
    return 0;
}

// The name of a dtype, as NumPy and PyTorch spell it.
[[nodiscard]] constexpr const char* name_of(DType dtype) noexcept {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        case DType::i8: return "int8";
        case DType::i32: return "int32";
    }
    return "unknown";
}

// Where memory lives. `index` counts the devices of one kind and is 0 for the CPU.
enum class DeviceKind : std::uint8_t { cpu, cuda };
struct Device {
    DeviceKind kind = DeviceKind::cpu;
    std::int32_t index = 0;
    friend constexpr bool operator==(const Device&, const Device&) = default;
};

// The queue that work is ordered on: a cudaStream_t for CUDA memory, ignored for CPU memory (the call returns when
// the work is done). Opaque, so that no CUDA header is needed here.
struct Stream {
    void* handle = nullptr;
};

// A non-owning strided matrix `[rows, cols]`. Strides count elements and may be zero or negative; `data` points at
// element (0, 0) and needs no alignment in CPU memory; on a GPU it is aligned to its elements. `Data` is `void` for
// outputs and `const void` for inputs.
template <class Data>
struct BasicMatrix {
    Data* data = nullptr;
    DType dtype = DType::f32;
    Device device{};
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t row_stride = 0;
    std::int64_t col_stride = 1;

    operator BasicMatrix<const void>() const noexcept {  // NOLINT(google-explicit-constructor): like T* -> const T*
        return {data, dtype, device, rows, cols, row_stride, col_stride};
    }
};
using Matrix = BasicMatrix<void>;
using ConstMatrix = BasicMatrix<const void>;

// A non-owning strided vector `[size]`. An optional vector that is not given is
// `absent_vector`.
template <class Data>
struct BasicVector {
    Data* data = nullptr;
    DType dtype = DType::f32;
    Device device{};
    std::int64_t size = 0;
    std::int64_t stride = 1;
    bool present = true;

    operator BasicVector<const void>() const noexcept {  // NOLINT(google-explicit-constructor): like T* -> const T*
        return {data, dtype, device, size, stride, present};
    }
};
using Vector = BasicVector<void>;
using ConstVector = BasicVector<const void>;
inline constexpr Vector absent_vector{.present = false};

// How the codes of a weight lie in memory.
enum class Layout : std::uint8_t {
    row_major,  // a matrix [n, k] of any strides
    packed,     // the order of octavo/pack.hpp; CPU memory only
};

}  // namespace octavo
