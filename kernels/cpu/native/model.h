/* The library's functions, called through ctypes, and the model they work on. */
#ifndef GPTJET_MODEL_H
#define GPTJET_MODEL_H

#include "gptjet.h"

typedef struct {
    float *norm_weight, *norm_bias;
    gj_weight w_in, w_out;
} gj_layer;

typedef struct {
    int32_t num_layers, hidden_size, num_heads, head_dim, rotary_dim, inner_size, vocab_size;
    int32_t max_context;
    float layer_norm_eps;
    int32_t half_embedding; /* the embedding is float16 */
    int32_t num_threads;
} gj_geometry;

typedef struct {
    const int32_t *token_ids, *positions, *sequence_index;
    const int32_t *block_tables;
    const int32_t *logits_rows;
    int32_t tokens, sequences, table_width, logits;
    float *kv_cache;
    int64_t num_blocks;
    float *out; /* [logits, vocab_size] */
} gj_batch;

typedef struct {
    float *tile, *values, *attention;
    uint8_t *unpacked, *quantized;
} gj_thread_scratch;

/* One sequence's rows in a pass, cut into tiles of query rows. */
typedef struct {
    int32_t first_row, rows;
} gj_query_tile;

typedef struct gj_model {
    gj_geometry g;
    gj_pool *pool;
    gj_layer *layers;
    gj_weight lm_head;
    float *norm_weight, *norm_bias;
    uint8_t *embedding;
    float *cosine, *sine; /* [max_context, rotary_dim] */

    /* Scratch for `capacity` rows; grown when a pass needs more. */
    int capacity;
    size_t scratch_bytes;
    uint8_t *scratch;
    float *residual, *normal, *wide; /* [capacity][*_stride] */
    size_t normal_stride, wide_stride;
    uint8_t *quantized;
    size_t quantized_stride;
    gj_query_tile *tiles;
    int32_t *wanted;    /* rows of this pass whose logits are wanted */
    int32_t *wanted_to; /* and where in `out` they go */
    gj_thread_scratch *threads;
    size_t thread_bytes;
    uint8_t *thread_scratch;
    int32_t *last_row; /* [sequences_capacity], for gj_check */
    uint8_t *asked;    /* [rows_capacity], for gj_check */
    int sequences_capacity, rows_capacity;
} gj_model;

/* What gj_forward says of a batch; the batch is left alone unless it is GJ_OK. */
enum {
    GJ_OK,
    GJ_NO_MEMORY,
    GJ_BAD_TOKEN,
    GJ_BAD_SEQUENCE,
    GJ_BAD_POSITION,
    GJ_BAD_ORDER,
    GJ_BAD_BLOCK,
    GJ_BAD_LOGITS_ROW
};

gj_model *gj_create(const gj_geometry *geometry);
void gj_destroy(gj_model *model);
/* which: 0 W_in, 1 W_out of a layer; 2 lm_head. group is not read for FP32. */
int gj_weight_begin(gj_model *model, int layer, int which, int kind, int group, const float *bias);
/* rows first .. first + rows - 1: float, int8 or packed nibbles; scales float or float16. */
void gj_weight_rows(gj_model *model, int layer, int which, int first, int rows, const void *values,
                    const void *scales);
void gj_set_norm(gj_model *model, int layer, const float *weight, const float *bias);
void gj_set_embedding(gj_model *model, int first, int rows, const void *values);
void gj_set_rotary(gj_model *model, const float *cosine, const float *sine);
uint64_t gj_bytes(const gj_model *model);
/* GJ_OK, or what is wrong with the batch and at which index of the array in question. */
int gj_forward(gj_model *model, const gj_batch *batch, int32_t *where);
int gj_check(gj_model *model, const gj_batch *batch, int32_t *where);

/* bandwidth.c: seconds[repeats] that the threads of a pool took to read `bytes` of memory together,
 * on average over `rounds`. GJ_OK or GJ_NO_MEMORY. */
int gj_measure_read(int num_threads, uint64_t bytes, int rounds, int repeats, double *seconds);

/* weights.c */
void gj_weight_clear(gj_weight *weight);
void gj_weight_pack(gj_pool *pool, gj_weight *weight, int first_row, int rows, const void *values,
                    const uint16_t *scales);
size_t gj_byte_of(const gj_weight *weight, int column, int k);
/* gemm_int4.c */
void gj_put_level(const gj_weight *weight, uint8_t *group, int column, int k, uint8_t level);

#endif
