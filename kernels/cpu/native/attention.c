/* Paged attention in FP32: softmax(q K / sqrt(head_dim)) V over the positions up to each row's own.
 *
 * The softmax is the plain one: all scores, their maximum, the sum of the exponentials, the
 * weighted sum of the values. Query rows of a tile share each key and value block while it is in
 * the L1 cache; each sums over its own positions in their order, so the tile it stands in cannot be
 * seen in a row's result. */
#include <math.h>

#include "gptjet.h"
#include "simd.h"

enum { ALIGNED_DIM = 16 };

static size_t padded_dim(int head_dim) {
    return (size_t)(head_dim + ALIGNED_DIM - 1) / ALIGNED_DIM * ALIGNED_DIM;
}

static size_t padded_context(int length) {
    return (size_t)(length + GJ_BLOCK - 1) / GJ_BLOCK * GJ_BLOCK;
}

size_t gj_attention_scratch(int max_context, int head_dim) {
    return GJ_QUERY_TILE * (padded_context(max_context) + padded_dim(head_dim) + 1);
}

#if GJ_AVX512
/* Lane i of the result is the sum of the lanes of sums[i]. */
GJ_INLINE __m512 sum_each(const __m512 *sums) {
    __m512 pair[8], quad[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]) +
                  _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d low = _mm512_castps_pd(pair[2 * i]), high = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)) +
                  _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
    __m512 front = _mm512_shuffle_f32x4(quad[0], quad[1], 0x88) +
                   _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd);
    __m512 back = _mm512_shuffle_f32x4(quad[2], quad[3], 0x88) +
                  _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd);
    return _mm512_shuffle_f32x4(front, back, 0x88) + _mm512_shuffle_f32x4(front, back, 0xdd);
}

/* Scores of one row with the 16 keys of a block. The query is padded with zeros; the keys are not,
 * and what stands after them may be anything. */
GJ_INLINE void score_block(const float *query, const float *keys, int head_dim, float *scores) {
    __m512 sums[GJ_BLOCK];
#pragma GCC unroll 16
    for (int p = 0; p < GJ_BLOCK; p++) sums[p] = _mm512_setzero_ps();
    int d = 0;
    for (; d + VL <= head_dim; d += VL) {
        __m512 q = _mm512_loadu_ps(query + d);
#pragma GCC unroll 16
        for (int p = 0; p < GJ_BLOCK; p++)
            sums[p] = _mm512_fmadd_ps(q, _mm512_loadu_ps(keys + p * head_dim + d), sums[p]);
    }
    if (d < head_dim) {
        __mmask16 some = (__mmask16)((1u << (head_dim - d)) - 1);
        __m512 q = _mm512_loadu_ps(query + d);
#pragma GCC unroll 16
        for (int p = 0; p < GJ_BLOCK; p++)
            sums[p] = _mm512_fmadd_ps(q, _mm512_maskz_loadu_ps(some, keys + p * head_dim + d),
                                      sums[p]);
    }
    _mm512_storeu_ps(scores, sum_each(sums));
}
#else
GJ_INLINE void score_block(const float *query, const float *keys, int head_dim, float *scores) {
    for (int p = 0; p < GJ_BLOCK; p++) {
        const float *key = keys + p * head_dim;
        vfloat sum = vsplat(0);
        int d = 0;
        for (; d + VL <= head_dim; d += VL) sum += vload(query + d) * vload(key + d);
        if (d < head_dim) sum += vload(query + d) * vload_some(key + d, head_dim - d);
        scores[p] = vsum(sum);
    }
}
#endif

/* Turns the scores of `length` positions into exponentials and returns one over their sum. */
static float exponentials(float *scores, int length) {
    size_t own = padded_context(length);
    for (size_t p = (size_t)length; p < own; p++) scores[p] = -INFINITY;
    vfloat best = vsplat(-INFINITY);
    for (size_t p = 0; p < own; p += VL) best = vmax(vload(scores + p), best);
    float maximum = vmax_lane(best);
    vfloat sum = vsplat(0);
    for (size_t p = 0; p < own; p += VL) {
        vfloat e = vexp(vload(scores + p) - vsplat(maximum));
        vstore(scores + p, e);
        sum += e;
    }
    return 1.0f / vsum(sum);
}

/* A block of one head is 16 rows together, but the next one stands elsewhere: the processor's own
 * prefetcher begins anew with each. */
GJ_INLINE void prefetch_block(const gj_attention *a, const float *data, int begin, int length) {
    if (begin >= length) return;
    const float *block = data + (size_t)a->block_table[begin / GJ_BLOCK] * a->block_stride;
    for (int i = 0; i < GJ_BLOCK * a->head_dim; i += 16) __builtin_prefetch(block + i, 0, 3);
}

/* Positions of which every row takes its part: from the end of what is already in `out`. */
typedef struct {
    int begin, end;
    bool last; /* then each row is multiplied by its factor */
} value_range;

/* out[r][column ..] += sum over a range of positions of weights[r][p] * values[p], for `across`
 * vectors. Storing and loading a sum between two ranges changes nothing. */
GJ_INLINE void weigh_values(const gj_attention *a, const float *weights, size_t stride,
                            const float *factor, value_range range, int column, float *out,
                            const int rows, const int across) {
    vfloat sum[GJ_ROW_TILE][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < across; j++)
            sum[r][j] = range.begin ? vload(out + (size_t)r * a->out_stride + column + j * VL)
                                    : vsplat(0);
    for (int p = range.begin; p < range.end;) {
        int in_block = p % GJ_BLOCK;
        int stop = p - in_block + GJ_BLOCK < range.end ? p - in_block + GJ_BLOCK : range.end;
        const float *value = a->values + (size_t)a->block_table[p / GJ_BLOCK] * a->block_stride +
                             (size_t)(in_block * a->head_dim + column);
        if (rows == 1 && column == 0) prefetch_block(a, a->values, stop, range.end);
        for (; p < stop; p++, value += a->head_dim) {
            vfloat v[4];
#pragma GCC unroll 4
            for (int j = 0; j < across; j++) v[j] = vload(value + j * VL);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vfloat weight = vsplat(weights[(size_t)r * stride + (size_t)p]);
#pragma GCC unroll 4
                for (int j = 0; j < across; j++) sum[r][j] += weight * v[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < across; j++)
            vstore(out + (size_t)r * a->out_stride + column + j * VL,
                   range.last ? sum[r][j] * vsplat(factor[r]) : sum[r][j]);
}

/* The features that fill no vector, in one that is filled up with zeros. (A plain loop over the
 * positions may be compiled in two halves that round differently, and where one ends and the other
 * begins would depend on the length.) */
static void weigh_rest(const gj_attention *a, const float *weights, float factor,
                       value_range range, int column, float *out) {
    int count = a->head_dim - column;
    vfloat sum = range.begin ? vload_some(out + column, count) : vsplat(0);
    for (int p = range.begin; p < range.end; p++) {
        const float *value = a->values + (size_t)a->block_table[p / GJ_BLOCK] * a->block_stride +
                             (size_t)(p % GJ_BLOCK * a->head_dim + column);
        sum += vsplat(weights[p]) * vload_some(value, count);
    }
    if (range.last) sum *= vsplat(factor);
    float lanes[VL];
    vstore(lanes, sum);
    memcpy(out + column, lanes, (size_t)count * sizeof *lanes);
}

static void weigh_rows(const gj_attention *a, const float *weights, size_t stride,
                       const float *factor, value_range range, float *out, int rows) {
    int d = 0;
#define CASE(n, across)                                                        \
    case n:                                                                    \
        weigh_values(a, weights, stride, factor, range, d, out, n, across);    \
        break;
#if VL == 16
    for (; d + 4 * VL <= a->head_dim; d += 4 * VL) switch (rows) {
            CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
        }
#endif
    for (; d + 2 * VL <= a->head_dim; d += 2 * VL) switch (rows) {
            CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
        }
#undef CASE
    for (; d + VL <= a->head_dim; d += VL)
        for (int r = 0; r < rows; r++)
            weigh_values(a, weights + (size_t)r * stride, stride, factor + r, range, d,
                         out + (size_t)r * a->out_stride, 1, 1);
    if (d < a->head_dim)
        for (int r = 0; r < rows; r++)
            weigh_rest(a, weights + (size_t)r * stride, factor[r], range, d,
                       out + (size_t)r * a->out_stride);
}

void gj_attend(const gj_attention *a, float *scratch) {
    int length = a->first_position + a->rows; /* of the last row */
    size_t stride = padded_context(length), dim = padded_dim(a->head_dim);
    float *queries = scratch, *factor = queries + GJ_QUERY_TILE * dim;
    float *scores = factor + GJ_QUERY_TILE;
    float scale = 1.0f / sqrtf((float)a->head_dim);
    for (int r = 0; r < a->rows; r++) {
        const float *query = a->queries + (size_t)r * a->query_stride;
        for (int d = 0; d < a->head_dim; d++) queries[(size_t)r * dim + (size_t)d] = query[d] * scale;
        for (size_t d = (size_t)a->head_dim; d < dim; d++) queries[(size_t)r * dim + d] = 0;
    }
    for (int begin = 0; begin < length; begin += GJ_BLOCK) {
        const float *keys = a->keys + (size_t)a->block_table[begin / GJ_BLOCK] * a->block_stride;
        prefetch_block(a, a->keys, begin + GJ_BLOCK, length);
        for (int r = 0; r < a->rows; r++)
            if (begin <= a->first_position + r)
                score_block(queries + (size_t)r * dim, keys, a->head_dim,
                            scores + (size_t)r * stride + begin);
    }
    prefetch_block(a, a->values, 0, length);
    for (int r = 0; r < a->rows; r++)
        factor[r] = exponentials(scores + (size_t)r * stride, a->first_position + r + 1);
    /* Positions that all rows of a register tile attend to, then each row's own last few: what
     * comes after a row may be infinite or NaN, and not even zero times that is zero. */
    int tiles = (a->rows + GJ_ROW_TILE - 1) / GJ_ROW_TILE;
    for (int t = 0; t < tiles; t++) {
        int first = a->rows * t / tiles, rows = a->rows * (t + 1) / tiles - first;
        int common = a->first_position + first + 1;
        weigh_rows(a, scores + (size_t)first * stride, stride, factor + first,
                   (value_range){0, common, rows == 1}, a->out + (size_t)first * a->out_stride,
                   rows);
        for (int r = first; r < first + rows && rows > 1; r++)
            weigh_rows(a, scores + (size_t)r * stride, stride, factor + r,
                       (value_range){common, a->first_position + r + 1, true},
                       a->out + (size_t)r * a->out_stride, 1);
    }
}
