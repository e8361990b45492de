// LLM.int8() from C: quantize the weight of a small linear layer, run it, and compare with float.
//
// The layer is y = x w^T with x [TOKENS, IN] and w [OUT, IN]. One input feature of x is an outlier, as in large
// language models; octavo finds it and multiplies it in full.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "octavo/octavo.h"

enum { TOKENS = 4, IN = 96, OUT = 48, OUTLIER = 17 };

static float x[TOKENS][IN];
static float w[OUT][IN];
static float y[TOKENS][OUT];

// What `quantize_weight` makes of w: one byte per weight, one scale per output feature.
static int8_t codes[OUT][IN];
static float scale[OUT];
static int32_t code_sums[OUT];

static void check(octavo_status status) {
    if (status == octavo_status_ok) return;
    fprintf(stderr, "octavo: %s\n", octavo_last_error());
    exit(EXIT_FAILURE);
}

static void make_data(void) {
    for (int i = 0; i < TOKENS; ++i) {
        for (int k = 0; k < IN; ++k) x[i][k] = sinf(1.7F * (float)(i * IN + k)) * (k == OUTLIER ? 60.0F : 1.0F);
    }
    for (int j = 0; j < OUT; ++j) {
        for (int k = 0; k < IN; ++k) w[j][k] = 0.05F * cosf(0.9F * (float)(j * IN + k));
    }
}

// Half of a scale is the most that rounding to a code changes a value. For |ex| <= sx / 2 and |ew| <= sw / 2 a term
// (x + ex) (w + ew) is off by at most sx / 2 |w| + sw / 2 |x| + sx sw / 4; an outlier has ex = 0.
static double error_bound(int i, int j) {
    double absmax = 0;
    for (int k = 0; k < IN; ++k) {
        if (k != OUTLIER) absmax = fmax(absmax, fabs(x[i][k]));
    }
    const double scale_x = absmax / 127;
    double bound = 0;
    for (int k = 0; k < IN; ++k) {
        const double sx = k == OUTLIER ? 0 : scale_x;
        bound += sx / 2 * fabs(w[j][k]) + scale[j] / 2 * fabs(x[i][k]) + sx * scale[j] / 4;
    }
    return bound * (1 + 1e-5);  // and the rounding of float itself
}

int main(void) {
    make_data();
    const octavo_matrix source = octavo_cpu_matrix(w, octavo_dtype_f32, OUT, IN);
    const octavo_weight_view weight = {
        .codes = octavo_cpu_matrix(codes, octavo_dtype_i8, OUT, IN),
        .scale = octavo_cpu_vector(scale, octavo_dtype_f32, OUT),
        .code_sums = octavo_cpu_vector(code_sums, octavo_dtype_i32, OUT),
        .scheme = octavo_scheme_absmax,
        .granularity = octavo_granularity_vector,
    };
    check(octavo_quantize_weight(&source, weight.scheme, weight.granularity, &weight.codes, &weight.scale, NULL,
                                 &weight.code_sums, NULL));

    const octavo_matrix input = octavo_cpu_matrix(x, octavo_dtype_f32, TOKENS, IN);
    const octavo_matrix output = octavo_cpu_matrix(y, octavo_dtype_f32, TOKENS, OUT);
    check(octavo_linear(&input, &weight, NULL, &output, NULL, NULL));

    const char* isa = NULL;
    check(octavo_cpu_isa(&isa));
    double largest = 0;
    double nearest = 0;  // an error as a fraction of its bound
    for (int i = 0; i < TOKENS; ++i) {
        for (int j = 0; j < OUT; ++j) {
            double exact = 0;
            for (int k = 0; k < IN; ++k) exact += (double)x[i][k] * (double)w[j][k];
            const double error = fabs(y[i][j] - exact);
            largest = fmax(largest, error);
            nearest = fmax(nearest, error / error_bound(i, j));
        }
    }
    printf("octavo %s (%s): weight of %zu bytes as %zu; largest error %.3g, at most %.0f %% of its bound\n",
           octavo_version(), isa, sizeof w, sizeof codes + sizeof scale, largest, 100 * nearest);
    return nearest <= 1 ? EXIT_SUCCESS : EXIT_FAILURE;
}
