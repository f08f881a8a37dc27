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
#include <float.h>
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

#if GJ_AVX512
/* The last lanes of a group may be missing. */
GJ_INLINE __mmask16 lanes_from(int begin, int count) {
    int left = count - begin;
    return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
}

static float largest_magnitude(const float *x, int count) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
        __m512i bits = _mm512_maskz_loadu_epi32(lanes_from(i, count), x + i);
        bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
        largest = _mm512_max_epi32(largest, bits);
    }
    int32_t bits = _mm512_reduce_max_epi32(largest);
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}

/* High bytes, then low bytes. Returns the sum. */
static int32_t round_values(const float *x, int count, int padded, float inverse, uint8_t *out) {
    memset(out, 0, 2 * (size_t)padded);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
        __mmask16 lanes = lanes_from(i, count);
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_set1_ps(inverse));
        __m512i q = _mm512_cvtps_epi32(scaled);
        total = _mm512_add_epi32(total, q);
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        _mm512_mask_cvtepi32_storeu_epi8(out + i, lanes, high);
        _mm512_mask_cvtepi32_storeu_epi8(out + padded + i, lanes, q);
    }
    return _mm512_reduce_add_epi32(total);
}
#else
static float largest_magnitude(const float *x, int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    memcpy(&magnitude, &largest, sizeof magnitude);
    return magnitude;
}

/* As int16. Returns the sum. */
static int32_t round_values(const float *x, int count, int padded, float inverse, uint8_t *out) {
    int16_t *values = (int16_t *)out;
    int32_t total = 0;
    for (int i = 0; i < count; i++) {
        int32_t q = (int32_t)rintf(x[i] * inverse);
        total += q;
        values[i] = (int16_t)q;
    }
    memset(values + count, 0, 2 * (size_t)(padded - count));
    return total;
}
#endif

static void quantize_group(const float *x, int count, int padded, uint8_t *out, float *scale,
                           int32_t *sum) {
    /* Found among the bits: floats without a sign are in the order of their bits, NaN above all. */
    float magnitude = largest_magnitude(x, count);
    if (!(magnitude <= FLT_MAX)) {
        /* Infinity or NaN: nothing can be saved, and it must not pass unseen. */
        *scale = NAN;
        *sum = 0;
        memset(out, 0, 2 * (size_t)padded);
        return;
    }
    *scale = magnitude / LIMIT;
    *sum = round_values(x, count, padded, magnitude < 1e-30f ? 0.0f : LIMIT / magnitude, out);
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
