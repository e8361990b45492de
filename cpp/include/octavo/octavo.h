// octavo for C: LLM.int8() (arXiv 2208.07339), the functions of octavo/octavo.hpp with the same names and arguments.
// What they compute, and what they make of empty, zero and infinite values, is written in the C++ header that each
// names.
//
// Conventions
// - Equations are those of the paper; matrices may have any strides unless a function says otherwise.
// - Every operation returns an octavo_status; after anything but `ok`, octavo_last_error() says what was wrong.
// - Matrices and vectors are views: the memory stays the caller's and is never kept. CPU memory needs no
//   alignment; CUDA memory is aligned to its elements.
// - Inputs are never modified (their `data` is not const only so that one struct serves inputs and outputs).
// - What is optional is a pointer that may be NULL; every other pointer must not be NULL.
// - `stream` is the queue the work is ordered on: a cudaStream_t for CUDA memory; NULL (ignored) for CPU memory, where
//   a call returns when the work is done.
// - All functions may be called from any thread.
#ifndef OCTAVO_OCTAVO_H
#define OCTAVO_OCTAVO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __GNUC__
#define OCTAVO_API __attribute__((visibility("default")))
#else
#define OCTAVO_API
#endif

// The version of this header. octavo_version() and octavo_abi_version() tell those of the library: a program and a
// library of the same OCTAVO_ABI_VERSION fit, which changes where a function or a struct does.
// NOLINTBEGIN(modernize-macro-to-enum): they are for the preprocessor
#define OCTAVO_VERSION_MAJOR 0
#define OCTAVO_VERSION_MINOR 1
#define OCTAVO_VERSION_PATCH 0
#define OCTAVO_ABI_VERSION 1
// NOLINTEND(modernize-macro-to-enum)

#ifdef __cplusplus
extern "C" {
#endif

// Enumerations are int32_t, so that their size is known and a value that is none of theirs is reported
// (octavo_status_value) instead of being undefined.

// What became of a call.
typedef int32_t octavo_status;
enum {
    octavo_status_ok = 0,
    octavo_status_type = 1,     // an argument of the wrong dtype
    octavo_status_value = 2,    // an argument of the wrong shape, range, ...
    octavo_status_device = 3,   // no backend, no driver, a failed launch
    octavo_status_memory = 4,   // not enough memory
    octavo_status_internal = 5  // a fault of octavo itself
};

// Element types. Activations, weights and biases are f32, f16 or bf16; codes are i8; accumulators are i32.
typedef int32_t octavo_dtype;
enum { octavo_dtype_f32 = 0, octavo_dtype_f16 = 1, octavo_dtype_bf16 = 2, octavo_dtype_i8 = 3, octavo_dtype_i32 = 4 };

// Where memory lives.
typedef int32_t octavo_device_kind;
enum { octavo_device_cpu = 0, octavo_device_cuda = 1 };

// How values map to codes.
typedef int32_t octavo_scheme;
enum {
    octavo_scheme_absmax = 0,    // x ~ code * scale, scale = absmax / 127
    octavo_scheme_zeropoint = 1  // x ~ (code + zeropoint) * scale, scale = (max - min) / 254
};

// What shares one scale: all of X and all of W; a row of X and all of W; a row of X and an output feature of W.
typedef int32_t octavo_granularity;
enum { octavo_granularity_tensor = 0, octavo_granularity_row = 1, octavo_granularity_vector = 2 };

// Which elements of X go through the 16-bit product.
typedef int32_t octavo_outliers;
enum {
    octavo_outliers_columns = 0,  // columns of X holding a magnitude >= threshold (or NaN, Inf) anywhere in this call
    octavo_outliers_rows = 1,     // each row's own such elements
    octavo_outliers_static = 2,   // the calibrated columns kept with the weight
    octavo_outliers_none = 3      // no decomposition
};

// How the codes of a weight lie in memory.
typedef int32_t octavo_layout;
enum {
    octavo_layout_row_major = 0,  // a matrix [n, k] of any strides
    octavo_layout_packed = 1      // the order of octavo_pack; CPU memory only
};

// Which product to use.
typedef int32_t octavo_path;
enum {
    octavo_path_auto = 0,        // octavo chooses; on the CPU `int8`
    octavo_path_int8 = 1,        // LLM.int8(): quantize X, int8 product, 16-bit outliers
    octavo_path_weight_only = 2  // int8 weights, activations left as they are (W8A16)
};

// `index` counts the devices of one kind; {0} is the CPU.
typedef struct octavo_device {
    octavo_device_kind kind;
    int32_t index;
} octavo_device;

// A strided matrix [rows, cols]. Strides count elements and may be zero (inputs only) or negative; `data` is the
// address of element (0, 0).
typedef struct octavo_matrix {
    void* data;
    octavo_dtype dtype;
    octavo_device device;
    int64_t rows;
    int64_t cols;
    int64_t row_stride;
    int64_t col_stride;
} octavo_matrix;

// A strided vector [size].
typedef struct octavo_vector {
    void* data;
    octavo_dtype dtype;
    octavo_device device;
    int64_t size;
    int64_t stride;
} octavo_vector;

// A weight made by octavo_quantize_weight, plus, optionally, the original values of calibrated outlier columns.
typedef struct octavo_weight_view {
    octavo_matrix codes;                   // [n, k] i8; if packed, `data` is octavo_packed_size(n, k) bytes
    octavo_vector scale;                   // f32 [1] or, for granularity `vector`, [n]
    octavo_vector code_sums;               // i32 [n]
    const octavo_vector* zeropoint;        // f32 as `scale` for scheme `zeropoint`, NULL for `absmax`
    const octavo_vector* outlier_columns;  // i32 [r], ascending, unique: the columns kept in 16 bit; or NULL
    const octavo_matrix* outlier_weight;   // [n, r] f32, f16 or bf16: their original weights; NULL where they are
    octavo_scheme scheme;
    octavo_granularity granularity;
    octavo_layout layout;  // of `codes`; strides are ignored where they are packed
    int32_t rotation;      // that it was quantized with, and X is; then codes are [n, octavo_rotated_size(k, rotation)]
    int64_t k;             // input features; 0: as many as columns of `codes`
} octavo_weight_view;

// Options of octavo_quantize_with and octavo_quantize_weight_with.
typedef struct octavo_quantize_options {
    octavo_scheme scheme;
    octavo_granularity granularity;
    int32_t rotation;  // 0, or the features of a block that is multiplied by a Hadamard matrix: 16, 64 or 256
} octavo_quantize_options;

// Options of octavo_linear. {0} is not the default: it makes every column an outlier.
typedef struct octavo_linear_options {
    float threshold;  // magnitude from which `columns` and `rows` call an element of X an outlier; >= 0
    octavo_outliers outliers;
    octavo_path path;
    float relative;  // > 0: instead of `threshold`, times the median (octavo_find_outliers_with); 0: absolute
    double cap;      // the most outlier columns, or elements of a row, as a part of k, up to 1; 0: as many as there are
} octavo_linear_options;
#define OCTAVO_LINEAR_OPTIONS_DEFAULT {6.0F, octavo_outliers_columns, octavo_path_auto, 0.0F, 0.0}

// A row-major matrix and a contiguous vector in CPU memory.
static inline octavo_matrix octavo_cpu_matrix(void* data, octavo_dtype dtype, int64_t rows, int64_t cols) {
    const octavo_matrix matrix = {data, dtype, {octavo_device_cpu, 0}, rows, cols, cols, 1};
    return matrix;
}
static inline octavo_vector octavo_cpu_vector(void* data, octavo_dtype dtype, int64_t size) {
    const octavo_vector vector = {data, dtype, {octavo_device_cpu, 0}, size, 1};
    return vector;
}

// What was wrong with the last call of this thread that returned an octavo_status: "<function>: <argument>: expected
// ..., got ...", or "" after `ok`. Valid until the thread's next such call.
OCTAVO_API const char* octavo_last_error(void);

// octavo/quantize.hpp: quantize a matrix, one scale per tensor or per row.
//
//   x            [m, k] f32, f16 or bf16
//   granularity  `tensor` or `row`
//   exclude      i32 [r] or NULL: columns left out of the scale, whose codes are 0
//   codes        [m, k] i8
//   scale        f32 [1] (`tensor`) or [m] (`row`)
//   zeropoint    f32, as `scale`; NULL for `absmax`
//
// Errors: type, value.
OCTAVO_API octavo_status octavo_quantize(const octavo_matrix* x, octavo_scheme scheme, octavo_granularity granularity,
                                         const octavo_vector* exclude, const octavo_matrix* codes,
                                         const octavo_vector* scale, const octavo_vector* zeropoint, void* stream);

// octavo/quantize.hpp: quantize a weight for octavo_linear.
//
//   weight     [n, k] f32, f16 or bf16, finite
//   codes      [n, k] i8
//   scale      f32 [1] (`tensor`, `row`) or [n] (`vector`)
//   zeropoint  f32, as `scale`; NULL for `absmax`
//   code_sums  i32 [n]
//
// Errors: type; value, also where the weight holds NaN or Inf (the outputs are then unspecified).
OCTAVO_API octavo_status octavo_quantize_weight(const octavo_matrix* weight, octavo_scheme scheme,
                                                octavo_granularity granularity, const octavo_matrix* codes,
                                                const octavo_vector* scale, const octavo_vector* zeropoint,
                                                const octavo_vector* code_sums, void* stream);

// Codes in a row of k features: with rotation, k up to whole blocks.
OCTAVO_API int64_t octavo_rotated_size(int64_t k, int32_t rotation);

// octavo_quantize and octavo_quantize_weight with all options. With `rotation` b every block of b consecutive features
// (k padded with zeros to whole blocks) is first multiplied by the Sylvester-Hadamard matrix over sqrt(b), in float32;
// excluded columns are 0 before. Codes then have octavo_rotated_size(k, rotation) columns. Errors: as those.
OCTAVO_API octavo_status octavo_quantize_with(const octavo_matrix* x, const octavo_quantize_options* options,
                                              const octavo_vector* exclude, const octavo_matrix* codes,
                                              const octavo_vector* scale, const octavo_vector* zeropoint, void* stream);
OCTAVO_API octavo_status octavo_quantize_weight_with(const octavo_matrix* weight,
                                                     const octavo_quantize_options* options, const octavo_matrix* codes,
                                                     const octavo_vector* scale, const octavo_vector* zeropoint,
                                                     const octavo_vector* code_sums, void* stream);

// Sums over k of the codes [n, k] of a weight, i32 [n] (for weights that come from a file). Errors: type, value.
OCTAVO_API octavo_status octavo_sum_codes(const octavo_matrix* codes, const octavo_vector* code_sums, void* stream);

// octavo/pack.hpp: bytes of codes [n, k] in the order that the CPU backend multiplies fastest; -1 where these are not a
// number of 64 bits.
OCTAVO_API int64_t octavo_packed_size(int64_t n, int64_t k);

// Bring codes into packed order, once for each weight.
//
//   codes   [n, k] i8, any strides, in CPU memory
//   packed  i8 [octavo_packed_size(n, k)], contiguous, apart from `codes`; best aligned to 64 bytes
//
// Errors: type, value, device.
OCTAVO_API octavo_status octavo_pack(const octavo_matrix* codes, const octavo_vector* packed, void* stream);

// The codes again. Errors: type, value, device.
OCTAVO_API octavo_status octavo_unpack(const octavo_vector* packed, const octavo_matrix* codes, void* stream);

// octavo/outlier.hpp: the columns of x that hold a magnitude >= threshold, NaN or Inf.
//
//   x          [m, k] f32, f16 or bf16
//   threshold  >= 0
//   columns    i32 [k]: the first `count` entries are the outlier columns, ascending; the rest is unspecified
//   count      i32 [1]
//
// Errors: type, value.
OCTAVO_API octavo_status octavo_find_outliers(const octavo_matrix* x, float threshold, const octavo_vector* columns,
                                              const octavo_vector* count, void* stream);

// The same with all options. With a_j the largest |x[i, j]| of column j, infinite where it holds NaN or Inf,
//
//   absolute  O = { j : not (a_j < threshold) }
//   relative  O = { j : a_j > 0 and not (a_j < t) },  t = relative * f(m) * med
//
// where med is the lower median of the a_j > 0, each cut to its upper 16 bits as a float, and f(m) =
// sqrt(ln 1024 / ln 2m) for m < 512, else 1. Of more than floor(cap * k) columns only the largest stay, and all that
// hold NaN or Inf. Errors: type, value.
OCTAVO_API octavo_status octavo_find_outliers_with(const octavo_matrix* x, const octavo_linear_options* options,
                                                   const octavo_vector* columns, const octavo_vector* count,
                                                   void* stream);

// octavo/gemm.hpp: out[i, j] = sum_k a[i, k] * b[j, k], exact; a [m, k] i8, b [n, k] i8, out [m, n] i32.
// Errors: type; value, also where a sum does not fit 32 bits (possible only for k > 131071; `out` is then unspecified).
OCTAVO_API octavo_status octavo_int8_matmul(const octavo_matrix* a, const octavo_matrix* b, const octavo_matrix* out,
                                            void* stream);

// octavo/dequantize.hpp: out = (codes + zeropoint) * scale.
//
//   codes      [m, k] i8
//   scale      f32 [1] or, one for each row, [m]
//   zeropoint  f32, as `scale`, or NULL
//   out        [m, k] f32, f16 or bf16
//
// Errors: type, value.
OCTAVO_API octavo_status octavo_dequantize(const octavo_matrix* codes, const octavo_vector* scale,
                                           const octavo_vector* zeropoint, const octavo_matrix* out, void* stream);

// The same of codes [m, octavo_rotated_size(k, rotation)], rotated back.
OCTAVO_API octavo_status octavo_dequantize_rotated(const octavo_matrix* codes, const octavo_vector* scale,
                                                   const octavo_vector* zeropoint, int32_t rotation,
                                                   const octavo_matrix* out, void* stream);

// octavo/linear.hpp: LLM.int8(), the linear layer with int8 weights, y = x W^T + bias.
//
//   x        [m, k] f32, f16 or bf16
//   weight   codes [n, k]; `static` needs outlier_columns
//   bias     f32, f16 or bf16 [n], or NULL
//   out      [m, n] f32, f16 or bf16; apart from the inputs
//   options  or NULL for OCTAVO_LINEAR_OPTIONS_DEFAULT
//
// Errors: type, value.
OCTAVO_API octavo_status octavo_linear(const octavo_matrix* x, const octavo_weight_view* weight,
                                       const octavo_vector* bias, const octavo_matrix* out,
                                       const octavo_linear_options* options, void* stream);

// A layer of octavo_linear_many: arguments of octavo_linear.
typedef struct octavo_linear_layer {
    const octavo_weight_view* weight;
    const octavo_vector* bias;  // or NULL
    const octavo_matrix* out;
} octavo_linear_layer;

// octavo/linear.hpp: octavo_linear of one x for several weights, which quantizes x once for those that take it in the
// same way; `count` layers with the outputs that each has alone. Errors: as octavo_linear; the message names the layer.
OCTAVO_API octavo_status octavo_linear_many(const octavo_matrix* x, const octavo_linear_layer* layers, int64_t count,
                                            const octavo_linear_options* options, void* stream);

// octavo/linear.hpp: the gradient with respect to x of a loss, from that with respect to y: grad W, with the
// dequantized weight and its kept values, in float32.
//
//   grad     [m, n] f32, f16 or bf16
//   weight   codes [n, k]
//   out      [m, k] f32, f16 or bf16; apart from the inputs
//   options  or NULL for OCTAVO_LINEAR_OPTIONS_DEFAULT; kept values are not used with `none` and `weight_only`; path
//            `int8` takes the int8 product of the rows of `grad` (octavo/linear.hpp)
//
// Errors: type, value.
OCTAVO_API octavo_status octavo_linear_backward(const octavo_matrix* grad, const octavo_weight_view* weight,
                                                const octavo_matrix* out, const octavo_linear_options* options,
                                                void* stream);

// "major.minor.patch", and OCTAVO_ABI_VERSION, of the library.
OCTAVO_API const char* octavo_version(void);
OCTAVO_API int32_t octavo_abi_version(void);

// Threads the CPU backend may use, the calling one included.
OCTAVO_API int32_t octavo_num_threads(void);

// Errors: value unless 1 <= count <= 1024.
OCTAVO_API octavo_status octavo_set_num_threads(int32_t count);

// Who gives calls of this thread on CUDA memory the memory that they need between their kernels: `size` bytes aligned
// to 256 on the device of that index, for what is enqueued on `stream` from now on, or NULL where there is not enough;
// and who takes them back, as soon as what is on `stream` by then is done. Two NULLs, as by default: octavo has a pool
// of its own. Errors: value where one of the two is NULL.
typedef void* (*octavo_scratch_allocate)(void* context, size_t size, int32_t device, void* stream);
typedef void (*octavo_scratch_release)(void* context, void* memory, size_t size, int32_t device, void* stream);
OCTAVO_API octavo_status octavo_set_cuda_scratch(octavo_scratch_allocate allocate, octavo_scratch_release release,
                                                 void* context);

// *isa = the instruction set of the CPU kernels in use, "amx", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512bw",
// "avx2", on 64-bit Arm "neon_i8mm", "neon_dotprod", or "scalar": the best one this processor has, or the one the
// environment variable OCTAVO_CPU_ISA names at first use. Errors: value where that name is unknown or the processor
// lacks it (*isa is then untouched).
OCTAVO_API octavo_status octavo_cpu_isa(const char** isa);

#ifdef __cplusplus
}
#endif

#endif  // OCTAVO_OCTAVO_H
