/* Products with INT4 weights: per group of input features the levels plus 8, two to a byte, then
 * 64 float16 scales, so that a panel is one stream.
 *
 * With AVX-512, vector j of block b holds columns 16 j .. 16 j + 15, four inputs of each: inputs
 * 8 b .. 8 b + 3 in the low and 8 b + 4 .. 8 b + 7 in the high half-bytes; that is two vectors of
 * INT8's order. Without it, byte i of a column holds inputs i and i + padded_group / 2.
 *
 * One row multiplies straight from the half-bytes. More rows share one unpacking of the group to
 * INT8's order, in the L1 cache. */
#include "gptjet.h"
#include "model.h"
#include "quantize.h"
#include "simd.h"

enum { AHEAD = 2048 };

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

static void unpack_group(const uint8_t *levels, int padded, uint8_t *bytes) {
#if GJ_AVX512
    const __m512i low = _mm512_set1_epi8(15);
    for (int k = 0; k < padded; k += 8, levels += 4 * GJ_PANEL, bytes += 8 * GJ_PANEL)
#pragma GCC unroll 4
        for (int j = 0; j < GJ_PANEL * 4; j += 64) {
            __builtin_prefetch(levels + j + AHEAD, 0, 3);
            __m512i both = _mm512_loadu_si512(levels + j);
            _mm512_storeu_si512(bytes + j, _mm512_and_si512(both, low));
            _mm512_storeu_si512(bytes + 4 * GJ_PANEL + j,
                                _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
#else
    int half = padded / 2;
    for (int c = 0; c < GJ_PANEL; c++, levels += half, bytes += padded)
        for (int k = 0; k < half; k++) {
            bytes[k] = levels[k] & 15;
            bytes[half + k] = levels[k] >> 4;
        }
#endif
}

#if GJ_AVX512
static void one_row(const gj_group *g, const uint8_t *levels, float *tile) {
    const __m512i mask = _mm512_set1_epi8(15);
    const uint8_t *values = g->values;
    int padded = g->padded_group;
    __m512i high[4], low[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        high[j] = _mm512_setzero_si512();
        low[j] = _mm512_set1_epi32(*g->correction);
    }
    for (int k = 0; k < padded; k += 8, levels += 4 * GJ_PANEL) {
        int32_t part[4];
        memcpy(part, values + k, 8);
        memcpy(part + 2, values + padded + k, 8);
        __m512i h0 = _mm512_set1_epi32(part[0]), h1 = _mm512_set1_epi32(part[1]);
        __m512i l0 = _mm512_set1_epi32(part[2]), l1 = _mm512_set1_epi32(part[3]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __builtin_prefetch(levels + 64 * j + AHEAD, 0, 3);
            __m512i both = _mm512_loadu_si512(levels + 64 * j);
            __m512i w0 = _mm512_and_si512(both, mask);
            __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            high[j] = _mm512_dpbusd_epi32(high[j], w0, h0);
            low[j] = _mm512_dpbusd_epi32(low[j], w0, l0);
            high[j] = _mm512_dpbusd_epi32(high[j], w1, h1);
            low[j] = _mm512_dpbusd_epi32(low[j], w1, l1);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 product = _mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_slli_epi32(high[j], 8), low[j]));
        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(*g->row_scale),
                                     _mm512_loadu_ps(g->column_scale + 16 * j));
        __m512 before = g->first ? _mm512_setzero_ps() : _mm512_loadu_ps(tile + 16 * j);
        _mm512_storeu_ps(tile + 16 * j, _mm512_fmadd_ps(product, scale, before));
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
        if (rows == 1) {
            one_row(&group, levels, tile);
            continue;
        }
#endif
        unpack_group(levels, weight->padded_group, unpacked);
        gj_group_product(&group, rows, tile);
    }
}
