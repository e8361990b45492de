// Checks of arguments, and the words of their errors: "<function>: <argument>: expected ..., got ...".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "octavo/error.hpp"
#include "octavo/types.hpp"

namespace octavo::check {

// An argument's place in messages.
struct Argument {
    const char* function;
    const char* name;
};

[[noreturn]] void fail(ErrorKind kind, const Argument& argument, const std::string& expected, const std::string& got);

[[nodiscard]] std::string to_string(Device device);
[[nodiscard]] std::string shape_of(const ConstMatrix& matrix);

// A view (extents >= 0, memory where it has elements, aligned to these on a GPU) of float32, float16 or bfloat16.
void is_float(const Argument& argument, const ConstMatrix& matrix);
void is_float(const Argument& argument, const ConstVector& vector);

// A view, likewise, of one dtype.
void is_dtype(const Argument& argument, const ConstMatrix& matrix, DType expected);
void is_dtype(const Argument& argument, const ConstVector& vector, DType expected);

void on_device(const Argument& argument, Device device, Device expected);
void has_size(const Argument& argument, std::int64_t size, std::int64_t expected);
void has_shape(const Argument& argument, const ConstMatrix& matrix, std::int64_t rows, std::int64_t cols);

// Whether an optional vector is present exactly when it should be.
void is_present(const Argument& argument, bool present, bool expected, const char* when);

// A vector as a matrix of one row (of none where it is absent).
[[nodiscard]] ConstMatrix as_matrix(const ConstVector& vector);

// The memory of an argument and its name.
struct Memory {
    Memory(const char* argument, const ConstMatrix& matrix) : name(argument), view(matrix) {}
    Memory(const char* argument, const ConstVector& vector) : name(argument), view(as_matrix(vector)) {}
    const char* name;
    ConstMatrix view;
};

// No two elements of an output share memory, and it shares none with an input or another output.
void are_apart(const char* function, std::initializer_list<Memory> outputs, std::initializer_list<Memory> inputs);

// Codes whose layout their device has. Packed ones have `rows` and `cols` of what is packed; `memory_of` is where they
// are, as a matrix.
void has_layout(const Argument& argument, const ConstMatrix& codes, Layout layout);
[[nodiscard]] ConstMatrix memory_of(const ConstMatrix& codes, Layout layout);

void threshold(const Argument& argument, float value);

// A rotation that there is.
void rotation(const Argument& argument, std::int32_t value);

// A depth whose sums of codes fit int32.
void depth(const Argument& argument, std::int64_t k);

}  // namespace octavo::check
