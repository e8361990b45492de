// What kernels share: typed views, conversions, wide loads and stores, what an outlier is, reductions over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>

#include "launch.cuh"
#include "octavo/error.hpp"
#include "octavo/types.hpp"

namespace octavo::cuda {

// --- views ----------------------------------------------------------------------------------------------------------

// A strided matrix of known element type. Strides count elements.
template <class T>
struct View {
    T* data;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t row_stride;
    std::int64_t col_stride;

    __device__ T* at(std::int64_t row, std::int64_t col) const { return data + row * row_stride + col * col_stride; }
    __device__ T* row(std::int64_t index) const { return data + index * row_stride; }
};

template <class T>
View<const T> view_of(const ConstMatrix& matrix) {
    return {static_cast<const T*>(matrix.data), matrix.rows, matrix.cols, matrix.row_stride, matrix.col_stride};
}

template <class T>
View<T> view_of(const Matrix& matrix) {
    return {static_cast<T*>(matrix.data), matrix.rows, matrix.cols, matrix.row_stride, matrix.col_stride};
}

// A strided vector; null where it is absent. A vector of one element stands for as many as are asked for, where it
// holds one scale or zeropoint for all.
template <class T>
struct Span {
    T* data = nullptr;
    std::int64_t size = 0;
    std::int64_t stride = 1;

    __device__ T& operator[](std::int64_t index) const { return data[index * stride]; }
    __device__ T& of_group(std::int64_t index) const { return data[size == 1 ? 0 : index * stride]; }
    __device__ bool present() const { return data != nullptr; }
};

template <class T>
Span<const T> span_of(const ConstVector& vector) {
    if (!vector.present) return {};
    return {static_cast<const T*>(vector.data), vector.size, vector.stride};
}

template <class T>
Span<T> span_of(const Vector& vector) {
    if (!vector.present) return {};
    return {static_cast<T*>(vector.data), vector.size, vector.stride};
}

// --- dispatch -------------------------------------------------------------------------------------------------------

template <class T>
struct Type {};

// Calls `body(Type<T>{})` with the element type of a floating-point dtype. Throws Error (type) for another.
template <class Body>
decltype(auto) with_float(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::f32: return body(Type<float>{});
        case DType::f16: return body(Type<__half>{});
        case DType::bf16: return body(Type<__nv_bfloat16>{});
        case DType::i8:
        case DType::i32: break;
    }
    throw Error(ErrorKind::type, std::string("expected float32, float16 or bfloat16, got ") + name_of(dtype));
}

// --- conversions ----------------------------------------------------------------------------------------------------

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounded once, half to even.
template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Elements whose dtype is known only when the kernel runs, where few are read: not worth a kernel for each dtype.
__device__ inline float read_float(const void* data, DType dtype, std::int64_t offset) {
    switch (dtype) {
        case DType::f16: return to_float(static_cast<const __half*>(data)[offset]);
        case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[offset]);
        default: return static_cast<const float*>(data)[offset];
    }
}

// A vector of them; null where it is absent.
struct FloatSpan {
    const void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t stride = 1;

    __device__ bool present() const { return data != nullptr; }
    __device__ float operator[](std::int64_t index) const { return read_float(data, dtype, index * stride); }
};

// A matrix of them.
struct FloatView {
    const void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t row_stride = 0;
    std::int64_t col_stride = 1;

    __device__ float operator()(std::int64_t row, std::int64_t col) const {
        return read_float(data, dtype, row * row_stride + col * col_stride);
    }
};

inline FloatView float_view_of(const ConstMatrix& matrix) {
    return {matrix.data, matrix.dtype, matrix.row_stride, matrix.col_stride};
}

inline FloatSpan float_span_of(const ConstVector& vector) {
    if (!vector.present) return {};
    return {vector.data, vector.dtype, vector.stride};
}

// --- wide accesses --------------------------------------------------------------------------------------------------

// `count` elements that one thread reads or writes in one access, at most 16 bytes.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
    T values[count];
    __device__ T& operator[](int index) { return values[index]; }
    __device__ const T& operator[](int index) const { return values[index]; }
};

// The number of elements in 16 bytes.
template <class T>
inline constexpr int per_access = 16 / static_cast<int>(sizeof(T));

template <int count, class T>
__device__ Pack<T, count> load(const T* source) {
    return *reinterpret_cast<const Pack<T, count>*>(source);
}

template <int count, class T>
__device__ void store(T* target, const Pack<T, count>& pack) {
    *reinterpret_cast<Pack<T, count>*>(target) = pack;
}

// Whether every row of a matrix can be read `bytes` at a time from its beginning.
inline bool rows_are_aligned(const ConstMatrix& matrix, std::int64_t bytes) {
    const std::int64_t item = size_of(matrix.dtype);
    return (matrix.col_stride == 1 || matrix.cols <= 1) &&
           reinterpret_cast<std::uintptr_t>(matrix.data) % static_cast<std::uintptr_t>(bytes) == 0 &&
           (matrix.rows <= 1 || matrix.row_stride * item % bytes == 0);
}

// --- outliers -------------------------------------------------------------------------------------------------------

// NaN and Inf are, too.
__device__ inline bool is_outlier(float x, float threshold) { return !(fabsf(x) < threshold); }

// --- reductions -----------------------------------------------------------------------------------------------------

// All 32 lanes must take part; every lane gets the result.
template <class T, class Combine>
__device__ T reduce_warp(T value, Combine combine) {
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(whole_warp, value, distance));
    }
    return value;
}

}  // namespace octavo::cuda
