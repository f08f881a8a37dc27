/* Products with INT8 weights: per group of input features [group / 4][64 columns][4] bytes, or
 * [64 columns][group] without AVX-512; each byte is the weight plus 128.
 *
 * vpdpbusd multiplies unsigned by signed bytes: the weights are the unsigned ones, and what their
 * 128 adds is a number of the row alone, which quantize.c has ready. The sum over a group is exact:
 * |value| <= 32512, 255 * 32512 * 128 < 2^31. */
#include "gptjet.h"
#include "quantize.h"
#include "simd.h"

#if GJ_AVX512
enum { NV = 4, AHEAD = 2048 };

GJ_INLINE __m512i quad(const uint8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm512_set1_epi32(bits);
}

/* _mm512_dpbusd_epi32(sum, w, v), which leaves GCC no choice of register: around the intrinsic it
 * keeps the 24 sums of a tile in memory and halves the speed. */
GJ_INLINE __m512i dot(__m512i sum, __m512i w, __m512i v) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(v));
    return sum;
}

GJ_INLINE void add_to_tile(__m512i product, __m512 scale, const float *column_scale, float *to,
                           bool first) {
    if (column_scale) scale = _mm512_mul_ps(scale, _mm512_loadu_ps(column_scale));
    __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, before));
}

/* Two sums for each column, of the high and of the low parts: one reading of the weights. */
GJ_INLINE void one_row(const gj_group *g, float *tile) {
    const uint8_t *values = g->values, *bytes = g->bytes;
    int padded = g->padded_group;
    __m512i high[NV], low[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
        high[j] = _mm512_setzero_si512();
        low[j] = _mm512_set1_epi32(*g->correction);
    }
    for (int k = 0; k < padded; k += 4, bytes += 4 * GJ_PANEL) {
        __m512i h = quad(values + k), l = quad(values + padded + k);
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            __builtin_prefetch(bytes + 64 * j + AHEAD, 0, 3);
            __m512i w = _mm512_loadu_si512(bytes + 64 * j);
            high[j] = _mm512_dpbusd_epi32(high[j], w, h);
            low[j] = _mm512_dpbusd_epi32(low[j], w, l);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++)
        add_to_tile(_mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]),
                    _mm512_set1_ps(*g->row_scale), g->column_scale ? g->column_scale + 16 * j : NULL,
                    tile + 16 * j, g->first);
}

GJ_INLINE const void *of_row(const void *first, size_t stride, int row) {
    return (const char *)first + stride * (size_t)row;
}

/* One sum for each column, first of the high parts, then, shifted, of the low ones: the registers
 * hold 6 rows, and the weights of a group are in the L1 cache the second time. */
GJ_INLINE void register_tile(const gj_group *g, float *tile, const int rows) {
    __m512i sum[GJ_ROW_TILE][NV];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[r][j] = _mm512_setzero_si512();
    /* A group of a row is too short a stream for the processor to see it coming. */
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        for (int at = 0; at < 2 * g->padded_group; at += 64)
            __builtin_prefetch(g->values + (size_t)r * g->stride + 2 * g->padded_group + at, 0, 3);
    for (int part = 0; part < 2; part++) {
        const uint8_t *w = g->bytes, *v = g->values + part * g->padded_group;
        for (int k = 0; k < g->padded_group; k += 4, w += 4 * GJ_PANEL, v += 4) {
            __m512i column[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                /* The next group: few rows wait for memory as one row does. */
                if (part == 0) __builtin_prefetch(w + 64 * j + g->padded_group * GJ_PANEL, 0, 3);
                column[j] = _mm512_loadu_si512(w + 64 * j);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                __m512i four = quad(v + (size_t)r * g->stride);
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++)
                    sum[r][j] = dot(sum[r][j], column[j], four);
            }
        }
        if (part == 1) break;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512i correction =
                _mm512_set1_epi32(*(const int32_t *)of_row(g->correction, g->stride, r));
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++)
                sum[r][j] = _mm512_add_epi32(_mm512_slli_epi32(sum[r][j], 8), correction);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        __m512 scale = _mm512_set1_ps(*(const float *)of_row(g->row_scale, g->stride, r));
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            add_to_tile(sum[r][j], scale, g->column_scale ? g->column_scale + 16 * j : NULL,
                        tile + r * GJ_PANEL + 16 * j, g->first);
    }
}

void gj_group_product(const gj_group *group, int rows, float *tile) {
    if (rows == 1) {
        one_row(group, tile);
        return;
    }
    int tiles = (rows + GJ_ROW_TILE - 1) / GJ_ROW_TILE;
    for (int t = 0; t < tiles; t++) {
        int begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
        gj_group g = *group;
        g.values = of_row(g.values, g.stride, begin);
        g.row_scale = of_row(g.row_scale, g.stride, begin);
        g.correction = of_row(g.correction, g.stride, begin);
        float *to = tile + (size_t)begin * GJ_PANEL;
        switch (count) {
#define CASE(n) \
    case n: register_tile(&g, to, n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
        }
    }
}
#else
void gj_group_product(const gj_group *g, int rows, float *tile) {
    for (int r = 0; r < rows; r++) {
        size_t offset = g->stride * (size_t)r;
        const int16_t *values = (const int16_t *)(g->values + offset);
        float scale = *(const float *)((const char *)g->row_scale + offset);
        int32_t correction = *(const int32_t *)((const char *)g->correction + offset);
        for (int c = 0; c < GJ_PANEL; c++) {
            const uint8_t *bytes = g->bytes + c * g->padded_group;
            int32_t sum = correction;
            for (int k = 0; k < g->padded_group; k++) sum += (int32_t)bytes[k] * values[k];
            float factor = g->column_scale ? scale * g->column_scale[c] : scale;
            float *to = tile + r * GJ_PANEL + c;
            *to = (g->first ? 0.0f : *to) + factor * (float)sum;
        }
    }
}
#endif

void gj_gemm_int8(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile) {
    const uint8_t *row = operand->quantized + (size_t)first * operand->quantized_stride;
    const uint8_t *bytes = weight->data + (size_t)panel * weight->panel_bytes;
    for (int g = 0; g < weight->groups; g++) {
        gj_group group = {
            .values = row + (size_t)g * 2 * (size_t)weight->padded_group,
            .row_scale = gj_row_scales(weight, row) + g,
            .correction = gj_row_corrections(weight, row) + g,
            .stride = operand->quantized_stride,
            .padded_group = weight->padded_group,
            .bytes = bytes + (size_t)g * (size_t)weight->padded_group * GJ_PANEL,
            .first = g == 0,
        };
        gj_group_product(&group, rows, tile);
    }
    const float *scale = weight->scale + (size_t)panel * GJ_PANEL;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < GJ_PANEL; c++) tile[r * GJ_PANEL + c] *= scale[c];
}
