/* Products with INT4 weights: per group of input features the levels plus 8, two to a byte, then
 * 64 float16 scales, so that a panel is one stream.
 *
 * With AVX-512, vector j of block b holds columns 16 j .. 16 j + 15, four inputs of each: inputs
 * 8 b .. 8 b + 3 in the low and 8 b + 4 .. 8 b + 7 in the high half-bytes; that is two vectors of
 * INT8's order. Without it, byte i of a column holds inputs i and i + padded_group / 2.
 *
 * With AVX-512 rows multiply straight from the half-bytes: taking a vector of them apart costs two
 * instructions beside the products of up to six rows, and not the memory's time for an unpacked
 * copy. Without it the rows share one unpacking of the group to INT8's order, in the L1 cache. */
#include "gptjet.h"
#include "model.h"
#include "quantize.h"
#include "simd.h"

void gj_put_level(const gj_weight *w, uint8_t *group, int column, int k, uint8_t level) {
#if GJ_AVX512
    (void)w;
    uint8_t *byte = group + (size_t)(k / 8) * 4 * GJ_PANEL + column * 4 + k % 4;
    bool high = k % 8 >= 4;
#else
    int half = w->padded_group / 2;
    uint8_t *byte = group + column * half + k % half;
    bool high = k >= half;
#endif
    *byte = high ? (uint8_t)((*byte & 0x0f) | level << 4) : (uint8_t)((*byte & 0xf0) | level);
}

static void unpack_scales(const uint8_t *halves, float *scales) {
#if GJ_AVX512
    for (int j = 0; j < GJ_PANEL; j += 16)
        _mm512_storeu_ps(scales + j, _mm512_cvtph_ps(_mm256_loadu_si256(
                                         (const __m256i *)(halves + 2 * j))));
#else
    for (int j = 0; j < GJ_PANEL; j++) {
        uint16_t half;
        memcpy(&half, halves + 2 * j, sizeof half);
        scales[j] = gj_half_to_float(half);
    }
#endif
}

#if GJ_AVX512
enum { AHEAD = 2048 };

/* _mm512_dpbusd_epi32 in the register it is given: see gemm_int8.c. */
GJ_INLINE __m512i dot(__m512i sum, __m512i w, __m512i v) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(v));
    return sum;
}

GJ_INLINE __m512i quad(const uint8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm512_set1_epi32(bits);
}

GJ_INLINE const void *of_row(const void *first, size_t stride, int row) {
    return (const char *)first + stride * (size_t)row;
}

/* Rows times `across` vectors of columns straight from the half-bytes: for each sum of the high
 * and of the low parts. With `ahead`, what stands that far behind each line read is fetched. */
GJ_INLINE void direct_tile(const gj_group *g, const uint8_t *levels, int column, float *tile,
                           size_t ahead, const int rows, const int across) {
    const __m512i mask = _mm512_set1_epi8(15);
    int padded = g->padded_group;
    __m512i high[6][4], low[6][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < across; j++) {
            high[r][j] = _mm512_setzero_si512();
            low[r][j] = _mm512_set1_epi32(*(const int32_t *)of_row(g->correction, g->stride, r));
        }
    const uint8_t *line = levels + column * 4;
    for (int k = 0; k < padded; k += 8, line += 4 * GJ_PANEL) {
        __m512i w0[4], w1[4];
#pragma GCC unroll 4
        for (int j = 0; j < across; j++) {
            __m512i both = _mm512_loadu_si512(line + 64 * j);
            w0[j] = _mm512_and_si512(both, mask);
            w1[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        }
        if (ahead)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) __builtin_prefetch(line + 64 * j + ahead, 0, 3);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const uint8_t *values = of_row(g->values + k, g->stride, r);
            __m512i part = quad(values);
#pragma GCC unroll 4
            for (int j = 0; j < across; j++) high[r][j] = dot(high[r][j], w0[j], part);
            part = quad(values + padded);
#pragma GCC unroll 4
            for (int j = 0; j < across; j++) low[r][j] = dot(low[r][j], w0[j], part);
            part = quad(values + 4);
#pragma GCC unroll 4
            for (int j = 0; j < across; j++) high[r][j] = dot(high[r][j], w1[j], part);
            part = quad(values + padded + 4);
#pragma GCC unroll 4
            for (int j = 0; j < across; j++) low[r][j] = dot(low[r][j], w1[j], part);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m512 row_scale = _mm512_set1_ps(*(const float *)of_row(g->row_scale, g->stride, r));
#pragma GCC unroll 4
        for (int j = 0; j < across; j++) {
            float *to = tile + r * GJ_PANEL + column + 16 * j;
            __m512 product = _mm512_cvtepi32_ps(
                _mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]));
            __m512 scale =
                _mm512_mul_ps(row_scale, _mm512_loadu_ps(g->column_scale + column + 16 * j));
            __m512 before = g->first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(product, scale, before));
        }
    }
}

static void direct_product(const gj_group *group, const uint8_t *levels, int rows, float *tile) {
    /* One row goes down the panel faster than memory follows; more rows have a group's time. */
    size_t next = (size_t)group->padded_group * GJ_PANEL / 2 + 2 * GJ_PANEL;
    if (rows == 1) {
        direct_tile(group, levels, 0, tile, AHEAD, 1, 4);
        return;
    }
    if (rows == 2) {
        direct_tile(group, levels, 0, tile, next, 2, 4);
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
        for (int column = 0; column < GJ_PANEL; column += 32) {
            size_t ahead = t == 0 && column == 0 ? next : 0;
            switch (count) {
#define CASE(n) \
    case n: direct_tile(&g, levels, column, to, ahead, n, 2); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
        }
    }
}
#else
static void unpack_group(const uint8_t *levels, int padded, uint8_t *bytes) {
    int half = padded / 2;
    for (int c = 0; c < GJ_PANEL; c++, levels += half, bytes += padded)
        for (int k = 0; k < half; k++) {
            bytes[k] = levels[k] & 15;
            bytes[half + k] = levels[k] >> 4;
        }
}
#endif

void gj_gemm_int4(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile, uint8_t *unpacked) {
    const uint8_t *row = operand->quantized + (size_t)first * operand->quantized_stride;
    const uint8_t *levels = weight->data + (size_t)panel * weight->panel_bytes;
    size_t level_bytes = GJ_PANEL * (size_t)weight->padded_group / 2;
    float scales[GJ_PANEL];
    for (int g = 0; g < weight->groups; g++, levels += level_bytes + 2 * GJ_PANEL) {
        unpack_scales(levels + level_bytes, scales);
        gj_group group = {
            .values = row + (size_t)g * 2 * (size_t)weight->padded_group,
            .row_scale = gj_row_scales(weight, row) + g,
            .correction = gj_row_corrections(weight, row) + g,
            .stride = operand->quantized_stride,
            .padded_group = weight->padded_group,
            .bytes = unpacked,
            .column_scale = scales,
            .first = g == 0,
        };
#if GJ_AVX512
        direct_product(&group, levels, rows, tile);
#else
        unpack_group(levels, weight->padded_group, unpacked);
        gj_group_product(&group, rows, tile);
#endif
    }
}
