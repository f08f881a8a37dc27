/* Products with dense weights: a panel is [inputs][GJ_PANEL] float.
 *
 * A register tile of up to GJ_ROW_TILE rows runs down a chunk of input features and is then added
 * to the tile in memory. One row alone takes the same steps in the same order. */
#include "gptjet.h"
#include "simd.h"

#if VL == 16
enum { NV = 4 }; /* vectors across: 24 accumulators of 32 registers */
#elif defined(__aarch64__)
enum { NV = 4 };
#else
enum { NV = 2 }; /* 12 accumulators of 16 registers */
#endif
/* Bytes ahead in the stream of weights; the processor's own prefetcher stops at page ends. */
enum { AHEAD = 4096, ACROSS = NV * VL };

GJ_INLINE void register_tile(const float *a, size_t stride, const float *b, int depth, float *tile,
                             bool first, bool stream, const int rows) {
    vfloat sum[GJ_ROW_TILE][NV];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sum[r][j] = vsplat(0);
    for (int k = 0; k < depth; k++, b += GJ_PANEL) {
        if (stream)
            for (int line = 0; line < ACROSS; line += 16)
                __builtin_prefetch((const char *)(b + line) + AHEAD, 0, 3);
        /* The rows after these: a chunk of a row is too short a stream to be seen coming. */
        if (rows > 1 && k % 16 == 0)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                __builtin_prefetch(a + (size_t)(r + rows) * stride + k, 0, 3);
        vfloat column[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) column[j] = vload(b + j * VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vfloat value = vsplat(a[(size_t)r * stride + (size_t)k]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) sum[r][j] += value * column[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            float *to = tile + r * GJ_PANEL + j * VL;
            vstore(to, first ? sum[r][j] : vload(to) + sum[r][j]);
        }
}

static void some_rows(const float *a, size_t stride, const float *b, int depth, float *tile,
                      bool first, bool stream, int rows) {
    switch (rows) {
#define CASE(n)                                                         \
    case n:                                                             \
        if (stream) register_tile(a, stride, b, depth, tile, first, true, n);  \
        else register_tile(a, stride, b, depth, tile, first, false, n); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

void gj_gemm_fp32(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile) {
    const float *data = (const float *)(weight->data + (size_t)panel * weight->panel_bytes);
    const float *a = operand->values + (size_t)first * operand->stride;
    for (int k = 0; k < weight->inputs; k += GJ_CHUNK) {
        int depth = weight->inputs - k < GJ_CHUNK ? weight->inputs - k : GJ_CHUNK;
        int tiles = (rows + GJ_ROW_TILE - 1) / GJ_ROW_TILE;
        for (int t = 0; t < tiles; t++) {
            /* Even shares: 8 rows are 4 + 4, which takes as long as 6 + 2 but waits less. */
            int begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
            for (int c = 0; c < GJ_PANEL; c += ACROSS)
                some_rows(a + (size_t)begin * operand->stride + k, operand->stride,
                          data + (size_t)k * GJ_PANEL + c, depth,
                          tile + (size_t)begin * GJ_PANEL + c, k == 0, t == 0, count);
        }
    }
}
