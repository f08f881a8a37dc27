/* Activations in integers, for the products with INT8 and INT4 weights.
 *
 * Each row is quantised by itself, in groups of input features with a scale each, to 16 bits and
 * not to the usual 8: decoding waits for the weights and not for arithmetic, and with 16 bits the
 * only error left is the one of the weights (an outlier among the activations then costs nothing).
 * The dot products take 8-bit numbers, so a value is kept as 256 high + low, and the limit is the
 * largest of which both parts fit.
 *
 * A row: for each group 2 * padded_group bytes of values, then a float scale for each group, then
 * an int32 for each group: minus the weights' zero point times the sum of the group's values. */
#include <math.h>

#include "gptjet.h"
#include "quantize.h"
#include "simd.h"

enum { LIMIT = 127 * 256 };

static size_t values_bytes(const gj_weight *w) {
    return (size_t)w->groups * 2 * (size_t)w->padded_group;
}

size_t gj_quantized_bytes(const gj_weight *w) {
    size_t bytes = values_bytes(w) + (size_t)w->groups * 8;
    bytes = (bytes + 63) / 64 * 64;
    /* Rows a multiple of 4 KiB apart would compete for the same lines of the L1 cache. */
    return bytes % 4096 ? bytes : bytes + 64;
}

const float *gj_row_scales(const gj_weight *w, const uint8_t *row) {
    return (const float *)(row + values_bytes(w));
}

const int32_t *gj_row_corrections(const gj_weight *w, const uint8_t *row) {
    return (const int32_t *)(row + values_bytes(w)) + w->groups;
}

static void quantize_group(const float *x, int count, int padded, uint8_t *out, float *scale,
                           int32_t *sum) {
    /* The magnitudes of floats are in the order of their bits, NaN above all. */
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    memcpy(&magnitude, &largest, sizeof magnitude);
    if (!(magnitude <= 3.4e38f)) {
        /* Infinity or NaN: nothing can be saved, and it must not pass unseen. */
        *scale = NAN;
        *sum = 0;
        memset(out, 0, 2 * (size_t)padded);
        return;
    }
    *scale = magnitude / LIMIT;
    float inverse = magnitude < 1e-30f ? 0.0f : LIMIT / magnitude;
    int32_t total = 0;
#if GJ_AVX512
    int8_t *high = (int8_t *)out, *low = high + padded;
#else
    int16_t *values = (int16_t *)out;
#endif
    for (int i = 0; i < count; i++) {
        int32_t q = (int32_t)rintf(x[i] * inverse);
        total += q;
#if GJ_AVX512
        int32_t rest = (int8_t)q;
        low[i] = (int8_t)rest;
        high[i] = (int8_t)((q - rest) >> 8);
#else
        values[i] = (int16_t)q;
#endif
    }
#if GJ_AVX512
    memset(high + count, 0, (size_t)(padded - count));
    memset(low + count, 0, (size_t)(padded - count));
#else
    memset(values + count, 0, 2 * (size_t)(padded - count));
#endif
    *sum = total;
}

void gj_quantize_row(const gj_weight *w, const float *row, uint8_t *quantized) {
    float *scales = (float *)(quantized + values_bytes(w));
    int32_t *corrections = (int32_t *)(scales + w->groups);
    int32_t zero = w->kind == GJ_INT8 ? 128 : 8;
    for (int g = 0; g < w->groups; g++) {
        int begin = g * w->group;
        int count = w->inputs - begin < w->group ? w->inputs - begin : w->group;
        int32_t sum;
        quantize_group(row + begin, count, w->padded_group,
                       quantized + (size_t)g * 2 * (size_t)w->padded_group, scales + g, &sum);
        corrections[g] = -zero * sum;
    }
}
