// The C ABI, from C: every function once with a literal result, every status, and what C's types leave open.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "octavo/octavo.h"

static int failures = 0;  // of the running test

static void fail(int line, const char* what) {
    ++failures;
    printf("%s:%d: %s (last error: '%s')\n", __FILE__, line, what, octavo_last_error());
}

#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))

// The call succeeds and leaves no message.
#define CHECK_OK(call) CHECK((call) == octavo_status_ok && strcmp(octavo_last_error(), "") == 0)

// The call fails with this status, and a message that holds `part`.
#define CHECK_FAILS(call, status, part) \
    CHECK((call) == octavo_status_##status && strstr(octavo_last_error(), (part)) != NULL)

static void* allocate(void* context, size_t size, int32_t device, void* stream) {
    (void)context, (void)device, (void)stream;
    return malloc(size);
}

static void release(void* context, void* memory, size_t size, int32_t device, void* stream) {
    (void)context, (void)size, (void)device, (void)stream;
    free(memory);
}

static void test_runtime(void) {
    CHECK(strcmp(octavo_version(), OCTAVO_EXPECTED_VERSION) == 0);
    const char* isa = NULL;
    CHECK_OK(octavo_cpu_isa(&isa));
    CHECK(isa != NULL && strlen(isa) > 0);
    CHECK_FAILS(octavo_cpu_isa(NULL), value, "cpu_isa: isa: expected a pointer, got NULL");
    CHECK_OK(octavo_set_num_threads(2));
    CHECK(octavo_num_threads() == 2);
    CHECK_FAILS(octavo_set_num_threads(0), value, "set_num_threads: count: expected 1 to 1024, got 0");
    CHECK(octavo_num_threads() == 2);
    CHECK_OK(octavo_set_cuda_scratch(allocate, release, NULL));
    CHECK_FAILS(octavo_set_cuda_scratch(NULL, release, NULL), value,
                "set_cuda_scratch: allocate: expected a function where the other is one, got NULL");
    CHECK_FAILS(octavo_set_cuda_scratch(allocate, NULL, NULL), value, "set_cuda_scratch: release: expected a function");
    CHECK_OK(octavo_set_cuda_scratch(NULL, NULL, NULL));
}

static void test_quantize(void) {
    float x[2][3] = {{127.0F, -63.5F, 0.5F}, {2.0F, 900.0F, -1.0F}};
    int8_t q[2][3];
    float s[2];
    float z[2];
    const octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 2, 3);
    const octavo_matrix codes = octavo_cpu_matrix(q, octavo_dtype_i8, 2, 3);
    const octavo_vector scale = octavo_cpu_vector(s, octavo_dtype_f32, 2);
    CHECK_OK(octavo_quantize(&source, octavo_scheme_absmax, octavo_granularity_row, NULL, &codes, &scale, NULL, NULL));
    CHECK(q[0][0] == 127 && q[0][1] == -64 && q[0][2] == 0 && q[1][1] == 127 && s[0] == 1.0F);

    int32_t column = 1;
    const octavo_vector exclude = octavo_cpu_vector(&column, octavo_dtype_i32, 1);
    const octavo_vector zeropoint = octavo_cpu_vector(z, octavo_dtype_f32, 2);
    CHECK_OK(octavo_quantize(&source, octavo_scheme_zeropoint, octavo_granularity_row, &exclude, &codes, &scale,
                             &zeropoint, NULL));
    CHECK(q[1][0] == 127 && q[1][1] == 0 && q[1][2] == -127 && s[1] == 3.0F / 254.0F && z[1] == 42.0F);
    CHECK_FAILS(
        octavo_quantize(&source, octavo_scheme_zeropoint, octavo_granularity_row, NULL, &codes, &scale, NULL, NULL),
        value, "quantize: zeropoint: expected an array for scheme zeropoint, got none");
}

static void test_find_outliers(void) {
    float x[2][4] = {{0.0F, 6.0F, 1.0F, 2.0F}, {1.0F, 0.0F, 5.0F, -7.0F}};
    int32_t found[4];
    int32_t number = -1;
    const octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 2, 4);
    const octavo_vector columns = octavo_cpu_vector(found, octavo_dtype_i32, 4);
    const octavo_vector count = octavo_cpu_vector(&number, octavo_dtype_i32, 1);
    CHECK_OK(octavo_find_outliers(&source, 6.0F, &columns, &count, NULL));
    CHECK(number == 2 && found[0] == 1 && found[1] == 3);
    CHECK_FAILS(octavo_find_outliers(&source, -1.0F, &columns, &count, NULL), value, "threshold");
}

static void test_int8_matmul_and_sum_codes(void) {
    int8_t a[2][3] = {{1, 2, 3}, {-4, 5, -6}};
    int8_t b[2][3] = {{1, 0, -1}, {127, -128, 10}};
    int32_t y[2][2];
    int32_t sums[2];
    const octavo_matrix left = octavo_cpu_matrix(a, octavo_dtype_i8, 2, 3);
    const octavo_matrix right = octavo_cpu_matrix(b, octavo_dtype_i8, 2, 3);
    const octavo_matrix out = octavo_cpu_matrix(y, octavo_dtype_i32, 2, 2);
    CHECK_OK(octavo_int8_matmul(&left, &right, &out, NULL));
    CHECK(y[0][0] == -2 && y[0][1] == -99 && y[1][0] == 2 && y[1][1] == -1208);
    const octavo_vector code_sums = octavo_cpu_vector(sums, octavo_dtype_i32, 2);
    CHECK_OK(octavo_sum_codes(&right, &code_sums, NULL));
    CHECK(sums[0] == 0 && sums[1] == 9);
}

static void test_dequantize(void) {
    int8_t q[2] = {3, -5};
    float s = 0.5F;
    float z = 1.0F;
    uint16_t y[2];
    const octavo_matrix codes = octavo_cpu_matrix(q, octavo_dtype_i8, 1, 2);
    const octavo_vector scale = octavo_cpu_vector(&s, octavo_dtype_f32, 1);
    const octavo_vector zeropoint = octavo_cpu_vector(&z, octavo_dtype_f32, 1);
    const octavo_matrix out = octavo_cpu_matrix(y, octavo_dtype_f16, 1, 2);
    CHECK_OK(octavo_dequantize(&codes, &scale, &zeropoint, &out, NULL));
    CHECK(y[0] == 0x4000 && y[1] == 0xC000);  // 2 and -2
    const octavo_matrix bfloat = octavo_cpu_matrix(y, octavo_dtype_bf16, 1, 2);
    CHECK_OK(octavo_dequantize(&codes, &scale, NULL, &bfloat, NULL));
    CHECK(y[0] == 0x3FC0 && y[1] == 0xC020);  // 1.5 and -2.5
}

// A weight [2, 3] with everything a weight can carry.
typedef struct Weight {
    float values[2][3];
    int8_t codes[2][3];
    float scale[2];
    int32_t code_sums[2];
    int32_t outlier_columns[1];
    float outlier_weight[2][1];
    octavo_vector columns;
    octavo_matrix kept;
    octavo_weight_view view;
} Weight;

static void quantize_weight(Weight* w) {
    const float values[2][3] = {{127.0F, 1.0F, 0.001F}, {0.0F, 254.0F, 3.0F}};
    memcpy(w->values, values, sizeof values);
    w->outlier_columns[0] = 2;
    w->outlier_weight[0][0] = values[0][2];
    w->outlier_weight[1][0] = values[1][2];
    w->columns = octavo_cpu_vector(w->outlier_columns, octavo_dtype_i32, 1);
    w->kept = octavo_cpu_matrix(w->outlier_weight, octavo_dtype_f32, 2, 1);
    const octavo_matrix source = octavo_cpu_matrix(w->values, octavo_dtype_f32, 2, 3);
    memset(&w->view, 0, sizeof w->view);
    w->view.codes = octavo_cpu_matrix(w->codes, octavo_dtype_i8, 2, 3);
    w->view.scale = octavo_cpu_vector(w->scale, octavo_dtype_f32, 2);
    w->view.code_sums = octavo_cpu_vector(w->code_sums, octavo_dtype_i32, 2);
    w->view.outlier_columns = &w->columns;
    w->view.outlier_weight = &w->kept;
    w->view.scheme = octavo_scheme_absmax;
    w->view.granularity = octavo_granularity_vector;
    CHECK_OK(octavo_quantize_weight(&source, octavo_scheme_absmax, octavo_granularity_vector, &w->view.codes,
                                    &w->view.scale, NULL, &w->view.code_sums, NULL));
}

static void test_packed(void) {
    Weight w;
    quantize_weight(&w);
    CHECK(octavo_packed_size(2, 3) == 16 * 64);
    int8_t memory[16 * 64];
    const octavo_vector packed = octavo_cpu_vector(memory, octavo_dtype_i8, sizeof memory);
    CHECK_OK(octavo_pack(&w.view.codes, &packed, NULL));
    CHECK(memory[0] == 127 && memory[1] == 1 && memory[2] == 0 && memory[3] == 0 && memory[5] == 127 && memory[6] == 2);
    int8_t again[2][3];
    const octavo_matrix codes = octavo_cpu_matrix(again, octavo_dtype_i8, 2, 3);
    CHECK_OK(octavo_unpack(&packed, &codes, NULL));
    CHECK(memcmp(again, w.codes, sizeof again) == 0);

    float x[1][3] = {{0.0F, 1.0F, 1000.0F}};
    float y[2][2];
    const octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 1, 3);
    const octavo_matrix first = octavo_cpu_matrix(y[0], octavo_dtype_f32, 1, 2);
    const octavo_matrix second = octavo_cpu_matrix(y[1], octavo_dtype_f32, 1, 2);
    CHECK_OK(octavo_linear(&source, &w.view, NULL, &first, NULL, NULL));
    w.view.codes.data = memory;
    w.view.layout = octavo_layout_packed;
    CHECK_OK(octavo_linear(&source, &w.view, NULL, &second, NULL, NULL));
    CHECK(y[0][0] == y[1][0] && y[0][1] == y[1][1]);
    w.view.layout = 7;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &second, NULL, NULL), value, "weight.layout");
    const octavo_vector short_of_one = octavo_cpu_vector(memory, octavo_dtype_i8, sizeof memory - 1);
    CHECK_FAILS(octavo_pack(&codes, &short_of_one, NULL), value, "pack: packed: expected shape [1024]");
    CHECK_FAILS(octavo_unpack(NULL, &codes, NULL), value, "packed");
}

static void test_linear(void) {
    Weight w;
    quantize_weight(&w);
    CHECK(w.codes[0][0] == 127 && w.codes[0][1] == 1 && w.codes[0][2] == 0 && w.codes[1][2] == 2);
    CHECK(w.scale[0] == 1.0F && w.scale[1] == 2.0F && w.code_sums[0] == 128 && w.code_sums[1] == 129);

    float x[1][3] = {{0.0F, 1.0F, 1000.0F}};
    float b[2] = {10.0F, 20.0F};
    float y[1][2];
    const octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 1, 3);
    const octavo_vector bias = octavo_cpu_vector(b, octavo_dtype_f32, 2);
    const octavo_matrix out = octavo_cpu_matrix(y, octavo_dtype_f32, 1, 2);
    CHECK_OK(octavo_linear(&source, &w.view, &bias, &out, NULL, NULL));
    CHECK(fabsf(y[0][0] - 12.0F) < 1e-3F && fabsf(y[0][1] - 3274.0F) < 1e-3F);

    octavo_linear_options options = OCTAVO_LINEAR_OPTIONS_DEFAULT;
    CHECK(options.threshold == 6.0F && options.outliers == octavo_outliers_columns && options.path == octavo_path_auto);
    options.outliers = octavo_outliers_static;
    CHECK_OK(octavo_linear(&source, &w.view, NULL, &out, &options, NULL));
    CHECK(fabsf(y[0][0] - 2.0F) < 1e-3F);
    options.path = octavo_path_weight_only;  // kept weights are not used: the code of 0.001 is 0
    CHECK_OK(octavo_linear(&source, &w.view, NULL, &out, &options, NULL));
    CHECK(y[0][0] == 1.0F);

    float others[2][1][2];
    const octavo_matrix outs[2] = {octavo_cpu_matrix(others[0], octavo_dtype_f32, 1, 2),
                                   octavo_cpu_matrix(others[1], octavo_dtype_f32, 1, 2)};
    octavo_linear_layer layers[2] = {{&w.view, &bias, &outs[0]}, {&w.view, NULL, &outs[1]}};
    CHECK_OK(octavo_linear_many(&source, layers, 2, &options, NULL));
    CHECK(others[0][0][0] == y[0][0] + 10.0F && others[1][0][0] == y[0][0] && others[1][0][1] == y[0][1]);
    CHECK_OK(octavo_linear_many(&source, NULL, 0, NULL, NULL));
    CHECK_FAILS(octavo_linear_many(&source, NULL, 1, NULL, NULL), value, "linear_many: layers: expected a pointer");
    CHECK_FAILS(octavo_linear_many(&source, layers, -1, NULL, NULL), value, "linear_many: count: expected a count");
    layers[1].out = NULL;
    CHECK_FAILS(octavo_linear_many(&source, layers, 2, NULL, NULL), value, "linear_many[1]: out: expected a pointer");

    // Codes [127, 1, 0] with scale 1 and [0, 127, 2] with scale 2; kept in column 2: 0.001 and 3.
    float gradient[1][3];
    const octavo_matrix of_x = octavo_cpu_matrix(gradient, octavo_dtype_f32, 1, 3);
    y[0][0] = 1.0F;
    y[0][1] = 0.5F;
    CHECK_OK(octavo_linear_backward(&out, &w.view, &of_x, NULL, NULL));
    CHECK(gradient[0][0] == 127.0F && gradient[0][1] == 128.0F && fabsf(gradient[0][2] - 1.501F) < 1e-6F);
    CHECK_OK(octavo_linear_backward(&out, &w.view, &of_x, &options, NULL));  // weight_only
    CHECK(gradient[0][2] == 2.0F);
    CHECK_FAILS(octavo_linear_backward(&source, &w.view, &of_x, NULL, NULL), value, "linear_backward: grad: expected");

    w.view.outlier_columns = NULL;
    w.view.outlier_weight = NULL;
    options.path = octavo_path_int8;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value, "linear: outliers: expected");
}

// Each unknown value of an enumeration is named.
static void test_unknown_values(void) {
    Weight w;
    quantize_weight(&w);
    float x[1][3] = {{0.0F, 1.0F, 1000.0F}};
    float y[1][2];
    octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 1, 3);
    const octavo_matrix out = octavo_cpu_matrix(y, octavo_dtype_f32, 1, 2);
    octavo_linear_options options = OCTAVO_LINEAR_OPTIONS_DEFAULT;

    options.outliers = 4;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: outliers: expected a value of octavo_outliers, got 4");
    options.outliers = octavo_outliers_none;
    options.path = -1;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: path: expected a value of octavo_path, got -1");
    options.path = octavo_path_int8;

    w.view.scheme = 2;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: weight.scheme: expected a value of octavo_scheme, got 2");
    w.view.scheme = octavo_scheme_absmax;
    w.view.granularity = 99;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: weight.granularity: expected a value of octavo_granularity, got 99");
    w.view.granularity = octavo_granularity_vector;

    source.dtype = 5;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: x: expected a value of octavo_dtype, got 5");
    source.dtype = octavo_dtype_f32;
    source.device.kind = 7;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, &options, NULL), value,
                "linear: x: expected a value of octavo_device_kind, got 7");
    source.device.kind = octavo_device_cpu;
    CHECK_FAILS(octavo_quantize(&source, 17, octavo_granularity_row, NULL, &source, &w.view.scale, NULL, NULL), value,
                "quantize: scheme: expected a value of octavo_scheme, got 17");
    CHECK_OK(octavo_linear(&source, &w.view, NULL, &out, &options, NULL));
}

static void test_pointers_and_sizes(void) {
    Weight w;
    quantize_weight(&w);
    float x[1][3] = {{0.0F, 1.0F, 1000.0F}};
    float y[1][2];
    octavo_matrix source = octavo_cpu_matrix(x, octavo_dtype_f32, 1, 3);
    const octavo_matrix out = octavo_cpu_matrix(y, octavo_dtype_f32, 1, 2);
    CHECK_FAILS(octavo_linear(NULL, &w.view, NULL, &out, NULL, NULL), value, "linear: x: expected a pointer, got NULL");
    CHECK_FAILS(octavo_linear(&source, NULL, NULL, &out, NULL, NULL), value, "linear: weight: expected a pointer");
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, NULL, NULL, NULL), value, "linear: out: expected a pointer");
    w.view.outlier_weight = NULL;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, NULL, NULL), value,
                "linear: weight.outlier_weight: expected a pointer, got NULL");
    w.view.outlier_weight = &w.kept;
    w.view.scale.data = NULL;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, NULL, NULL), value,
                "linear: weight.scale: expected data of shape [2], got data NULL");
    w.view.scale.data = w.scale;
    source.data = NULL;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, NULL, NULL), value,
                "linear: x: expected data of shape [1, 3], got data NULL");
    source.data = x;
    source.rows = -1;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, NULL, NULL), value,
                "linear: x: expected rows and cols >= 0, got [-1, 3]");
    source.rows = 1;
    w.view.code_sums.size = -2;
    CHECK_FAILS(octavo_linear(&source, &w.view, NULL, &out, NULL, NULL), value,
                "linear: weight.code_sums: expected size >= 0, got -2");
    w.view.code_sums.size = 2;
    // Empty arrays need no memory.
    octavo_matrix none = octavo_cpu_matrix(NULL, octavo_dtype_f32, 0, 3);
    octavo_matrix no_rows = octavo_cpu_matrix(NULL, octavo_dtype_f16, 0, 2);
    CHECK_OK(octavo_linear(&none, &w.view, NULL, &no_rows, NULL, NULL));
}

static void test_statuses(void) {
    int8_t q[2][3] = {{0}};
    int32_t sums[2];
    octavo_matrix codes = octavo_cpu_matrix(q, octavo_dtype_i8, 2, 3);
    octavo_vector code_sums = octavo_cpu_vector(sums, octavo_dtype_f32, 2);
    CHECK_FAILS(octavo_sum_codes(&codes, &code_sums, NULL), type,
                "sum_codes: code_sums: expected dtype int32, got float32");
    code_sums.dtype = octavo_dtype_i32;
    codes.device.kind = code_sums.device.kind = octavo_device_cuda;
    // Without the CUDA backend, a driver or a GPU the message says so; no machine has this many.
    codes.device.index = code_sums.device.index = 1000;
    CHECK_FAILS(octavo_sum_codes(&codes, &code_sums, NULL), device, "CUDA");
    codes.device.index = code_sums.device.index = 0;
    codes.device.kind = code_sums.device.kind = octavo_device_cpu;
    code_sums.size = 3;
    CHECK_FAILS(octavo_sum_codes(&codes, &code_sums, NULL), value, "expected shape [2], got [3]");
    code_sums.size = 2;
    CHECK_OK(octavo_sum_codes(&codes, &code_sums, NULL));

    float w[1] = {INFINITY};
    float s[1];
    const octavo_matrix weight = octavo_cpu_matrix(w, octavo_dtype_f32, 1, 1);
    const octavo_matrix code = octavo_cpu_matrix(q, octavo_dtype_i8, 1, 1);
    const octavo_vector scale = octavo_cpu_vector(s, octavo_dtype_f32, 1);
    const octavo_vector sum = octavo_cpu_vector(sums, octavo_dtype_i32, 1);
    CHECK_FAILS(octavo_quantize_weight(&weight, octavo_scheme_absmax, octavo_granularity_vector, &code, &scale, NULL,
                                       &sum, NULL),
                value, "quantize_weight: weight: expected finite values");

    // A petabyte of scratch: a column repeated 2^50 times has to be gathered. (AddressSanitizer would end the process.)
#ifndef __SANITIZE_ADDRESS__
    octavo_matrix endless = octavo_cpu_matrix(q, octavo_dtype_i8, 1, INT64_C(1) << 50);
    endless.col_stride = 0;
    const octavo_matrix out = octavo_cpu_matrix(sums, octavo_dtype_i32, 1, 1);
    CHECK_FAILS(octavo_int8_matmul(&endless, &endless, &out, NULL), memory, "not enough memory");
#endif
}

// Views that share memory where they must not, and sizes whose bytes are no number of 64 bits.
static void test_overlaps_and_overflows(void) {
    union {
        float x[12];
        int8_t codes[48];
        int32_t counts[12];
    } memory = {{0}};
    float f[4];
    int8_t q[16];
    int32_t i[4];
    const octavo_matrix x = octavo_cpu_matrix(memory.x, octavo_dtype_f32, 3, 4);
    const octavo_matrix codes = octavo_cpu_matrix(q, octavo_dtype_i8, 3, 4);
    const octavo_vector scale = octavo_cpu_vector(f, octavo_dtype_f32, 3);
    const octavo_vector own_scale = octavo_cpu_vector(memory.x + 4, octavo_dtype_f32, 3);
    const octavo_vector own_sums = octavo_cpu_vector(memory.counts, octavo_dtype_i32, 3);
    CHECK_FAILS(octavo_quantize(&x, octavo_scheme_absmax, octavo_granularity_row, NULL, &codes, &own_scale, NULL, NULL),
                value, "quantize: scale: expected memory apart from x");
    CHECK_FAILS(
        octavo_quantize(&x, octavo_scheme_zeropoint, octavo_granularity_row, NULL, &codes, &scale, &own_scale, NULL),
        value, "quantize: zeropoint: expected memory apart from x");
    CHECK_FAILS(
        octavo_quantize(&x, octavo_scheme_zeropoint, octavo_granularity_row, NULL, &codes, &scale, &scale, NULL), value,
        "quantize: zeropoint: expected memory apart from scale");
    CHECK_FAILS(octavo_quantize_weight(&x, octavo_scheme_absmax, octavo_granularity_vector, &codes, &scale, NULL,
                                       &own_sums, NULL),
                value, "quantize_weight: code_sums: expected memory apart from weight");
    const octavo_matrix own_codes = octavo_cpu_matrix(memory.codes, octavo_dtype_i8, 3, 4);
    CHECK_FAILS(octavo_sum_codes(&own_codes, &own_sums, NULL), value,
                "sum_codes: code_sums: expected memory apart from codes");
    const octavo_vector columns = octavo_cpu_vector(i, octavo_dtype_i32, 4);
    const octavo_vector count = octavo_cpu_vector(i + 3, octavo_dtype_i32, 1);
    const octavo_vector own_count = octavo_cpu_vector(memory.counts + 5, octavo_dtype_i32, 1);
    CHECK_FAILS(octavo_find_outliers(&x, 6.0F, &columns, &count, NULL), value,
                "find_outliers: count: expected memory apart from columns");
    CHECK_FAILS(octavo_find_outliers(&x, 6.0F, &columns, &own_count, NULL), value,
                "find_outliers: count: expected memory apart from x");

    CHECK(octavo_packed_size(17, 65) == 32 * 128);
    CHECK(octavo_packed_size(INT64_C(1) << 40, INT64_C(1) << 24) == -1);
    CHECK(octavo_packed_size(-1, 4) == -1 && octavo_packed_size(INT64_MAX, 1) == -1);
    const octavo_vector packed = octavo_cpu_vector(q, octavo_dtype_i8, 0);
    octavo_matrix vast = octavo_cpu_matrix(q, octavo_dtype_i8, INT64_C(1) << 40, INT64_C(1) << 24);
    CHECK_FAILS(octavo_pack(&vast, &packed, NULL), value, "pack: codes: expected");
    CHECK_FAILS(octavo_unpack(&packed, &vast, NULL), value, "unpack: codes: expected");
    const int64_t strides[][2] = {{INT64_MAX, 1}, {INT64_MIN, 1}, {4, INT64_MIN}, {INT64_MAX / 2, INT64_MAX / 2}};
    for (size_t s = 0; s < sizeof strides / sizeof strides[0]; ++s) {
        octavo_matrix far = x;
        far.row_stride = strides[s][0];
        far.col_stride = strides[s][1];
        CHECK_FAILS(
            octavo_quantize(&far, octavo_scheme_absmax, octavo_granularity_row, NULL, &codes, &scale, NULL, NULL),
            value, "quantize: x: expected memory of less than 2^63 bytes");
    }
    octavo_matrix one_row = octavo_cpu_matrix(memory.x, octavo_dtype_f32, 1, 4);
    one_row.row_stride = INT64_MIN;  // not used
    const octavo_matrix one_code_row = octavo_cpu_matrix(q, octavo_dtype_i8, 1, 4);
    const octavo_vector one_scale = octavo_cpu_vector(f, octavo_dtype_f32, 1);
    CHECK_OK(octavo_quantize(&one_row, octavo_scheme_absmax, octavo_granularity_row, NULL, &one_code_row, &one_scale,
                             NULL, NULL));
}

int main(void) {
    const struct {
        const char* name;
        void (*body)(void);
    } tests[] = {
        {"runtime", test_runtime},
        {"quantize", test_quantize},
        {"find_outliers", test_find_outliers},
        {"int8_matmul_and_sum_codes", test_int8_matmul_and_sum_codes},
        {"dequantize", test_dequantize},
        {"packed", test_packed},
        {"linear", test_linear},
        {"unknown_values", test_unknown_values},
        {"pointers_and_sizes", test_pointers_and_sizes},
        {"statuses", test_statuses},
        {"overlaps_and_overflows", test_overlaps_and_overflows},
    };
    int passed = 0;
    int failed = 0;
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; ++i) {
        failures = 0;
        tests[i].body();
        if (failures == 0) {
            ++passed;
        } else {
            ++failed;
            printf("FAILED %s\n", tests[i].name);
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
