#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "octavo/pack.hpp"

namespace octavo::check {
namespace {

// The bytes that a matrix spans: [begin, end).
struct Span {
    std::intptr_t begin;
    std::intptr_t end;
};

Span span_of(const ConstMatrix& matrix) {
    const std::int64_t item = size_of(matrix.dtype);
    const std::int64_t down = matrix.rows > 1 ? (matrix.rows - 1) * matrix.row_stride * item : 0;
    const std::int64_t across = matrix.cols > 1 ? (matrix.cols - 1) * matrix.col_stride * item : 0;
    const auto base = reinterpret_cast<std::intptr_t>(matrix.data);
    return {base + std::min<std::int64_t>(down, 0) + std::min<std::int64_t>(across, 0),
            base + std::max<std::int64_t>(down, 0) + std::max<std::int64_t>(across, 0) + item};
}

// Whether two matrices interleave without touching: rows of the same pitch, each within its own part of it (say the
// left and the right half of one buffer).
bool interleave(const ConstMatrix& a, const ConstMatrix& b) {
    std::int64_t pitch = 0;
    std::int64_t b_pitch = 0;
    if (__builtin_mul_overflow(a.row_stride, size_of(a.dtype), &pitch)) return false;  // of a single row, any stride
    if (__builtin_mul_overflow(b.row_stride, size_of(b.dtype), &b_pitch)) return false;
    if (pitch <= 0 || pitch != b_pitch || a.col_stride < 0 || b.col_stride < 0) return false;
    const auto width = [](const ConstMatrix& matrix) {
        return ((matrix.cols > 1 ? (matrix.cols - 1) * matrix.col_stride : 0) + 1) * size_of(matrix.dtype);
    };
    const std::int64_t a_width = width(a);
    const std::int64_t b_width = width(b);
    const auto distance = reinterpret_cast<std::intptr_t>(b.data) - reinterpret_cast<std::intptr_t>(a.data);
    const std::int64_t offset = ((distance % pitch) + pitch) % pitch;  // of b's rows after a's
    return offset >= a_width && offset + b_width <= pitch;
}

bool is_empty(const ConstMatrix& matrix) { return matrix.rows == 0 || matrix.cols == 0; }

// Whether the offsets of all elements, in bytes, and the addresses that they lead to fit 64 bits.
bool fits(const ConstMatrix& matrix) {
    std::int64_t elements = 0;
    if (__builtin_mul_overflow(matrix.rows, matrix.cols, &elements)) return false;
    auto low = reinterpret_cast<std::intptr_t>(matrix.data);
    auto high = low;
    if (__builtin_add_overflow(high, size_of(matrix.dtype), &high)) return false;
    for (const auto& [extent, stride] : {std::pair{matrix.rows, matrix.row_stride}, {matrix.cols, matrix.col_stride}}) {
        if (extent <= 1) continue;  // its stride is not used
        std::int64_t reach = 0;
        if (stride == INT64_MIN || __builtin_mul_overflow(extent - 1, stride, &reach)) return false;
        if (__builtin_mul_overflow(reach, size_of(matrix.dtype), &reach)) return false;
        auto& end = reach < 0 ? low : high;
        if (__builtin_add_overflow(end, reach, &end)) return false;
    }
    return true;
}

// A view that can be one: no negative extent, memory where it has elements, and all of it within the address space.
void is_view(const Argument& argument, const ConstMatrix& matrix) {
    if (matrix.rows < 0 || matrix.cols < 0) {
        fail(ErrorKind::value, argument, "rows and cols >= 0", shape_of(matrix));
    }
    if (!fits(matrix)) {
        fail(ErrorKind::value, argument, "memory of less than 2^63 bytes",
             "shape " + shape_of(matrix) + ", strides [" + std::to_string(matrix.row_stride) + ", " +
                 std::to_string(matrix.col_stride) + "]");
    }
    if (matrix.data == nullptr && !is_empty(matrix)) {
        fail(ErrorKind::value, argument, "data of shape " + shape_of(matrix), "data NULL");
    }
}

void is_view(const Argument& argument, const ConstVector& vector) {
    if (vector.size < 0) fail(ErrorKind::value, argument, "size >= 0", std::to_string(vector.size));
    if (vector.data == nullptr && vector.size > 0) {
        fail(ErrorKind::value, argument, "data of shape [" + std::to_string(vector.size) + "]", "data NULL");
    }
    if (!fits(as_matrix(vector))) {
        fail(ErrorKind::value, argument, "memory of less than 2^63 bytes",
             "size " + std::to_string(vector.size) + ", stride " + std::to_string(vector.stride));
    }
}

// A GPU faults on elements that are not aligned.
void is_aligned(const Argument& argument, const void* data, DType dtype, Device device) {
    if (device.kind == DeviceKind::cpu) return;
    const auto item = static_cast<std::uintptr_t>(size_of(dtype));
    const std::uintptr_t excess = reinterpret_cast<std::uintptr_t>(data) % item;
    if (excess == 0) return;
    fail(ErrorKind::value, argument, "memory aligned to " + std::to_string(item) + " bytes on " + to_string(device),
         "an address " + std::to_string(excess) + " beyond");
}

void is_float(const Argument& argument, DType dtype) {
    if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return;
    fail(ErrorKind::type, argument, "dtype float32, float16 or bfloat16", name_of(dtype));
}

void is_dtype(const Argument& argument, DType dtype, DType expected) {
    if (dtype == expected) return;
    fail(ErrorKind::type, argument, std::string("dtype ") + name_of(expected), name_of(dtype));
}

}  // namespace

void fail(ErrorKind kind, const Argument& argument, const std::string& expected, const std::string& got) {
    throw Error(kind,
                std::string(argument.function) + ": " + argument.name + ": expected " + expected + ", got " + got);
}

std::string to_string(Device device) {
    switch (device.kind) {
        case DeviceKind::cpu: return "cpu";
        case DeviceKind::cuda: return "cuda:" + std::to_string(device.index);
    }
    return "device kind " + std::to_string(static_cast<int>(device.kind));
}

std::string shape_of(const ConstMatrix& matrix) {
    return "[" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.cols) + "]";
}

void is_float(const Argument& argument, const ConstMatrix& matrix) {
    is_view(argument, matrix);
    is_float(argument, matrix.dtype);
    is_aligned(argument, matrix.data, matrix.dtype, matrix.device);
}

void is_float(const Argument& argument, const ConstVector& vector) {
    is_view(argument, vector);
    is_float(argument, vector.dtype);
    is_aligned(argument, vector.data, vector.dtype, vector.device);
}

void is_dtype(const Argument& argument, const ConstMatrix& matrix, DType expected) {
    is_view(argument, matrix);
    is_dtype(argument, matrix.dtype, expected);
    is_aligned(argument, matrix.data, matrix.dtype, matrix.device);
}

void is_dtype(const Argument& argument, const ConstVector& vector, DType expected) {
    is_view(argument, vector);
    is_dtype(argument, vector.dtype, expected);
    is_aligned(argument, vector.data, vector.dtype, vector.device);
}

void on_device(const Argument& argument, Device device, Device expected) {
    if (!(device == expected)) fail(ErrorKind::value, argument, "memory on " + to_string(expected), to_string(device));
}

void has_size(const Argument& argument, std::int64_t size, std::int64_t expected) {
    if (size == expected) return;
    fail(ErrorKind::value, argument, "shape [" + std::to_string(expected) + "]", "[" + std::to_string(size) + "]");
}

void has_shape(const Argument& argument, const ConstMatrix& matrix, std::int64_t rows, std::int64_t cols) {
    if (matrix.rows == rows && matrix.cols == cols) return;
    fail(ErrorKind::value, argument, "shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
         shape_of(matrix));
}

void is_present(const Argument& argument, bool present, bool expected, const char* when) {
    if (present == expected) return;
    fail(ErrorKind::value, argument, std::string(expected ? "an array " : "none ") + when,
         present ? "an array" : "none");
}

namespace {

// Whether no two elements of an output share memory.
void is_writable(const Argument& argument, const ConstMatrix& out) {
    if (is_empty(out)) return;
    // Distinct elements have distinct addresses where the wider of the two strides steps over all of the narrower.
    const bool one_row = out.rows == 1;
    const bool one_col = out.cols == 1;
    const std::int64_t row_step = one_row ? 0 : std::abs(out.row_stride);
    const std::int64_t col_step = one_col ? 0 : std::abs(out.col_stride);
    const bool rows_apart = one_row || row_step >= (one_col ? 1 : (out.cols - 1) * col_step + 1);
    const bool cols_apart = one_col || col_step >= (one_row ? 1 : (out.rows - 1) * row_step + 1);
    const bool distinct = (rows_apart && (one_col || col_step > 0)) || (cols_apart && (one_row || row_step > 0));
    if (distinct) return;
    fail(ErrorKind::value, argument, "elements that share no memory with each other",
         "strides [" + std::to_string(out.row_stride) + ", " + std::to_string(out.col_stride) + "] for shape " +
             shape_of(out));
}

// Whether an output shares no memory with another argument.
void is_disjoint(const Argument& argument, const ConstMatrix& out, const ConstMatrix& input, const char* input_name) {
    if (is_empty(out) || is_empty(input) || !(out.device == input.device)) return;
    const Span written = span_of(out);
    const Span read = span_of(input);
    if (written.end <= read.begin || read.end <= written.begin || interleave(out, input)) return;
    fail(ErrorKind::value, argument, std::string("memory apart from ") + input_name, "memory that overlaps it");
}

}  // namespace

ConstMatrix as_matrix(const ConstVector& vector) {
    return {vector.data, vector.dtype, vector.device, vector.present ? 1 : 0, vector.size, 0, vector.stride};
}

void are_apart(const char* function, std::initializer_list<Memory> outputs, std::initializer_list<Memory> inputs) {
    for (const Memory* out = outputs.begin(); out != outputs.end(); ++out) {
        const Argument argument{function, out->name};
        is_writable(argument, out->view);
        for (const Memory& input : inputs) is_disjoint(argument, out->view, input.view, input.name);
        for (const Memory* other = outputs.begin(); other != out; ++other) {
            is_disjoint(argument, out->view, other->view, other->name);
        }
    }
}

void has_layout(const Argument& argument, const ConstMatrix& codes, Layout layout) {
    if (layout == Layout::packed && packed_size(codes.rows, codes.cols) < 0) {
        fail(ErrorKind::value, argument, "a shape of packed codes", shape_of(codes));
    }
    if (layout == Layout::row_major || codes.device.kind == DeviceKind::cpu) return;
    fail(ErrorKind::value, argument, "packed codes on cpu", to_string(codes.device));
}

ConstMatrix memory_of(const ConstMatrix& codes, Layout layout) {
    if (layout == Layout::row_major) return codes;
    ConstMatrix memory = codes;
    memory.rows = 1;
    memory.cols = packed_size(codes.rows, codes.cols);
    memory.col_stride = 1;
    return memory;
}

void threshold(const Argument& argument, float value) {
    if (value >= 0.0F) return;
    fail(ErrorKind::value, argument, "a number >= 0", std::isnan(value) ? "nan" : std::to_string(value));
}

void rotation(const Argument& argument, std::int32_t value) {
    if (value == 0 || value == 16 || value == 64 || value == 256) return;
    fail(ErrorKind::value, argument, "0, 16, 64 or 256", std::to_string(value));
}

void depth(const Argument& argument, std::int64_t k) {
    constexpr std::int64_t most = std::int64_t{1} << 24;
    if (k <= most) return;
    fail(ErrorKind::value, argument, "at most 2^24 columns", std::to_string(k));
}

}  // namespace octavo::check
