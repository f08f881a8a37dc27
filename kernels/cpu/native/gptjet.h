/* The packed model and the pieces of its forward pass.
 *
 * Packed weights: the output features stand in panels of GJ_PANEL, the last one padded with
 * zeros; inside a panel the input features follow each other, so that one panel is one stream to
 * read. A panel's product with some rows fills a tile [rows][GJ_PANEL] of float.
 *
 * A row's result must never depend on its company, so every (row, output) sums its products in one
 * fixed order, whichever kernel does it: dense weights in chunks of GJ_CHUNK input features, the
 * others exactly (in integers) within a group and then group after group. */
#ifndef GPTJET_H
#define GPTJET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pool.h"

enum {
    GJ_PANEL = 64,      /* output features of a panel: four 512-bit vectors */
    GJ_CHUNK = 256,     /* input features of a dense partial sum; 64 KiB of a panel */
    GJ_ROW_TILE = 6,    /* rows of the register tile: 6 x 4 of 32 vector registers accumulate */
    GJ_ROW_BLOCK = 192, /* rows of a task: a chunk of them and of a panel share the L2 cache */
    GJ_BLOCK = 16,      /* tokens of a KV block */
    GJ_QUERY_TILE = 12, /* query rows of an attention task */
    GJ_PASS_ROWS = 512, /* rows of a pass over the weights; more rows take more passes */
    GJ_PRIVATE_ROWS = 4 /* up to here every thread normalises all rows itself */
};

enum gj_kind { GJ_FP32, GJ_INT8, GJ_INT4 };

typedef struct {
    enum gj_kind kind;
    int outputs, inputs;
    int panels;
    int group;        /* input features that share a scale (of the activations in INT8) */
    int padded_group; /* the same, rounded up to a multiple of 8 */
    int groups;
    size_t panel_bytes;
    uint8_t *data;
    float *scale; /* [panels * GJ_PANEL], INT8 only */
    float *bias;  /* [panels * GJ_PANEL] */
} gj_weight;

/* The left operand of a product. Dense weights read `values`; the others read rows made by
 * gj_quantize_row, of gj_quantized_bytes each. */
typedef struct {
    const float *values;
    size_t stride;
    const uint8_t *quantized;
    size_t quantized_stride;
} gj_operand;

/* weights.c */
void *gj_allocate(size_t bytes); /* zeroed, large pages where they help; NULL when there is none */
void gj_release(void *memory, size_t bytes);
bool gj_weight_create(gj_weight *weight, int kind, int outputs, int inputs, int group);
void gj_weight_destroy(gj_weight *weight);
size_t gj_weight_bytes(const gj_weight *weight);
float gj_half_to_float(uint16_t half);

/* gemm_*.c: tile[row - first][column] for rows first .. first + rows - 1 of the operand and the
 * 64 columns of a panel; the weight's scales included, the bias not. */
void gj_gemm(const gj_weight *weight, const gj_operand *operand, int first, int rows, int panel,
             float *tile, uint8_t *unpacked);
void gj_gemm_fp32(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile);
void gj_gemm_int8(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile);
void gj_gemm_int4(const gj_weight *weight, const gj_operand *operand, int first, int rows,
                  int panel, float *tile, uint8_t *unpacked);

/* quantize.c */
size_t gj_quantized_bytes(const gj_weight *weight);
void gj_quantize_row(const gj_weight *weight, const float *row, uint8_t *quantized);

/* pointwise.c */
void gj_layer_norm(const float *x, const float *weight, const float *bias, float eps, int size,
                   float *out);
void gj_gelu(float *x, int size); /* size is a multiple of 16 */
/* Turns features begin .. end - 1 of a head (both even) by the angles of a position:
 * cosine, sine [rotary_dim], each value twice, the sine of even features negative. */
void gj_rotate(float *x, int begin, int end, const float *cosine, const float *sine,
               int rotary_dim);

/* attention.c: query rows of one head against the keys and values of one sequence. */
typedef struct {
    const float *keys, *values; /* of this layer and head in block 0 */
    size_t block_stride;        /* floats from a block to the next */
    const int32_t *block_table;
    int head_dim;
    int rows;
    int first_position; /* of the first row; the others follow it */
    const float *queries;
    float *out;
    size_t query_stride, out_stride;
} gj_attention;
/* scratch: gj_attention_scratch floats */
void gj_attend(const gj_attention *a, float *scratch);
size_t gj_attention_scratch(int max_context, int head_dim);

#endif
