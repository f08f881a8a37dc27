/* Making and freeing a model, its scratch memory, and the check of a batch. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

static size_t up(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void *zeroed(size_t count, size_t size) { return calloc(count ? count : 1, size); }

static size_t embedding_bytes(const gj_geometry *g) {
    size_t values = (size_t)g->vocab_size * (size_t)g->hidden_size;
    return values * (g->half_embedding ? 2 : 4);
}

gj_model *gj_create(const gj_geometry *geometry) {
    gj_model *m = zeroed(1, sizeof *m);
    if (!m) return NULL;
    m->g = *geometry;
    const gj_geometry *g = &m->g;
    size_t hidden = (size_t)g->hidden_size;
    size_t angles = (size_t)g->max_context * (size_t)g->rotary_dim;
    m->pool = gj_pool_create(g->num_threads);
    m->layers = zeroed((size_t)g->num_layers, sizeof *m->layers);
    m->norm_weight = zeroed(hidden, sizeof(float));
    m->norm_bias = zeroed(hidden, sizeof(float));
    m->embedding = gj_allocate(embedding_bytes(g));
    m->cosine = zeroed(angles, sizeof(float));
    m->sine = zeroed(angles, sizeof(float));
    bool complete = m->pool && m->layers && m->norm_weight && m->norm_bias && m->embedding &&
                    m->cosine && m->sine;
    for (int i = 0; complete && i < g->num_layers; i++) {
        m->layers[i].norm_weight = zeroed(hidden, sizeof(float));
        m->layers[i].norm_bias = zeroed(hidden, sizeof(float));
        complete = m->layers[i].norm_weight && m->layers[i].norm_bias;
    }
    if (complete) return m;
    gj_destroy(m);
    return NULL;
}

void gj_destroy(gj_model *m) {
    if (!m) return;
    gj_pool_destroy(m->pool);
    for (int i = 0; m->layers && i < m->g.num_layers; i++) {
        gj_weight_destroy(&m->layers[i].w_in);
        gj_weight_destroy(&m->layers[i].w_out);
        free(m->layers[i].norm_weight);
        free(m->layers[i].norm_bias);
    }
    gj_weight_destroy(&m->lm_head);
    free(m->layers);
    free(m->norm_weight);
    free(m->norm_bias);
    gj_release(m->embedding, embedding_bytes(&m->g));
    free(m->cosine);
    free(m->sine);
    gj_release(m->scratch, m->scratch_bytes);
    gj_release(m->thread_scratch, m->thread_bytes);
    free(m->threads);
    free(m->last_row);
    free(m->asked);
    free(m);
}

static gj_weight *weight_of(gj_model *m, int layer, int which) {
    if (which == 2) return &m->lm_head;
    return which == 0 ? &m->layers[layer].w_in : &m->layers[layer].w_out;
}

int gj_weight_begin(gj_model *m, int layer, int which, int kind, int group, const float *bias) {
    const gj_geometry *g = &m->g;
    int attention = g->num_heads * g->head_dim;
    int outputs = which == 0 ? 3 * attention + g->inner_size
                             : (which == 1 ? g->hidden_size : g->vocab_size);
    int inputs = which == 1 ? attention + g->inner_size : g->hidden_size;
    gj_weight *w = weight_of(m, layer, which);
    gj_weight_destroy(w);
    if (!gj_weight_create(w, kind, outputs, inputs, kind == GJ_FP32 ? GJ_CHUNK : group))
        return GJ_NO_MEMORY;
    gj_weight_clear(w);
    if (bias) memcpy(w->bias, bias, (size_t)outputs * sizeof *bias);
    return GJ_OK;
}

void gj_weight_rows(gj_model *m, int layer, int which, int first, int rows, const void *values,
                    const void *scales) {
    gj_weight *w = weight_of(m, layer, which);
    if (w->kind == GJ_INT8) memcpy(w->scale + first, scales, (size_t)rows * sizeof(float));
    gj_weight_pack(m->pool, w, first, rows, values, w->kind == GJ_INT4 ? scales : NULL);
}

void gj_set_norm(gj_model *m, int layer, const float *weight, const float *bias) {
    size_t bytes = (size_t)m->g.hidden_size * sizeof(float);
    memcpy(layer < 0 ? m->norm_weight : m->layers[layer].norm_weight, weight, bytes);
    memcpy(layer < 0 ? m->norm_bias : m->layers[layer].norm_bias, bias, bytes);
}

void gj_set_embedding(gj_model *m, int first, int rows, const void *values) {
    size_t row = (size_t)m->g.hidden_size * (m->g.half_embedding ? 2 : 4);
    memcpy(m->embedding + (size_t)first * row, values, (size_t)rows * row);
}

void gj_set_rotary(gj_model *m, const float *cosine, const float *sine) {
    size_t bytes = (size_t)m->g.max_context * (size_t)m->g.rotary_dim * sizeof(float);
    memcpy(m->cosine, cosine, bytes);
    memcpy(m->sine, sine, bytes);
}

uint64_t gj_bytes(const gj_model *m) {
    uint64_t bytes = gj_weight_bytes(&m->lm_head) + embedding_bytes(&m->g);
    bytes += 2 * (uint64_t)m->g.hidden_size * sizeof(float) * (uint64_t)(m->g.num_layers + 1);
    for (int i = 0; i < m->g.num_layers; i++)
        bytes += gj_weight_bytes(&m->layers[i].w_in) + gj_weight_bytes(&m->layers[i].w_out);
    return bytes;
}

/* ---- scratch ---- */

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void measure(const gj_weight *w, size_t *quantized, size_t *unpacked) {
    if (w->kind == GJ_FP32) return;
    *quantized = larger(*quantized, gj_quantized_bytes(w));
    if (w->kind == GJ_INT4)
        *unpacked = larger(*unpacked, (size_t)w->padded_group * GJ_PANEL);
}

/* A distance between rows that does not put them all on the same lines of the L1 cache. */
static size_t stride_for(size_t values) {
    size_t stride = up(values * sizeof(float)) / sizeof(float);
    return stride % 1024 ? stride : stride + 16;
}

static bool prepare_threads(gj_model *m, size_t quantized, size_t unpacked) {
    size_t threads = (size_t)m->g.num_threads;
    size_t tile = up(GJ_ROW_BLOCK * GJ_PANEL * sizeof(float));
    size_t values = up(GJ_PRIVATE_ROWS * m->normal_stride * sizeof(float));
    size_t rows = up(GJ_PRIVATE_ROWS * quantized);
    size_t attention = up(gj_attention_scratch(m->g.max_context, m->g.head_dim) * sizeof(float));
    size_t each = tile + values + rows + up(unpacked) + attention;
    m->threads = zeroed(threads, sizeof *m->threads);
    m->thread_bytes = threads * each;
    m->thread_scratch = gj_allocate(m->thread_bytes);
    if (!m->threads || !m->thread_scratch) return false;
    for (size_t t = 0; t < threads; t++) {
        uint8_t *at = m->thread_scratch + t * each;
        gj_thread_scratch *mine = m->threads + t;
        mine->tile = (float *)at;
        mine->values = (float *)(at += tile);
        mine->quantized = at += values;
        mine->unpacked = at += rows;
        mine->attention = (float *)(at + up(unpacked));
    }
    return true;
}

static bool reserve(gj_model *m, int rows, int sequences) {
    if (sequences > m->sequences_capacity) {
        int32_t *last = realloc(m->last_row, (size_t)sequences * sizeof *last);
        if (!last) return false;
        m->last_row = last;
        m->sequences_capacity = sequences;
    }
    if (rows > m->rows_capacity) {
        uint8_t *asked = realloc(m->asked, (size_t)rows);
        if (!asked) return false;
        m->asked = asked;
        m->rows_capacity = rows;
    }
    if (rows > GJ_PASS_ROWS) rows = GJ_PASS_ROWS;
    if (rows <= m->capacity) return true;
    size_t quantized = 0, unpacked = 0, n = (size_t)rows, hidden = (size_t)m->g.hidden_size;
    for (int i = 0; i < m->g.num_layers; i++) {
        measure(&m->layers[i].w_in, &quantized, &unpacked);
        measure(&m->layers[i].w_out, &quantized, &unpacked);
    }
    measure(&m->lm_head, &quantized, &unpacked);
    size_t attention = (size_t)m->g.num_heads * (size_t)m->g.head_dim;
    m->normal_stride = stride_for(hidden);
    m->wide_stride = stride_for(3 * attention + (size_t)m->g.inner_size);
    if (!m->thread_scratch && !prepare_threads(m, quantized, unpacked)) return false;
    size_t residual = up(n * hidden * sizeof(float)), tiles = up(n * sizeof(gj_query_tile));
    size_t normal = up(n * m->normal_stride * sizeof(float));
    size_t wide = up(n * m->wide_stride * sizeof(float)), wanted = up(n * sizeof(int32_t));
    size_t bytes = residual + normal + wide + up(n * quantized) + tiles + 2 * wanted;
    gj_release(m->scratch, m->scratch_bytes);
    m->capacity = 0;
    m->scratch_bytes = bytes;
    m->scratch = gj_allocate(bytes);
    if (!m->scratch) return false;
    m->capacity = rows;
    uint8_t *at = m->scratch;
    m->residual = (float *)at;
    m->normal = (float *)(at += residual);
    m->wide = (float *)(at += normal);
    m->quantized = at += wide;
    m->tiles = (gj_query_tile *)(at += up(n * quantized));
    m->wanted = (int32_t *)(at += tiles);
    m->wanted_to = (int32_t *)(at + wanted);
    return true;
}

/* ---- the check ---- */

static int refuse(int reason, int index, int32_t *where) {
    *where = index;
    return reason;
}

int gj_check(gj_model *m, const gj_batch *b, int32_t *where) {
    if (!reserve(m, b->tokens, b->sequences)) return refuse(GJ_NO_MEMORY, 0, where);
    for (int s = 0; s < b->sequences; s++) m->last_row[s] = -1;
    for (int row = 0; row < b->tokens; row++) {
        int token = b->token_ids[row], position = b->positions[row], s = b->sequence_index[row];
        if (token < 0 || token >= m->g.vocab_size) return refuse(GJ_BAD_TOKEN, row, where);
        if (s < 0 || s >= b->sequences) return refuse(GJ_BAD_SEQUENCE, row, where);
        if (position < 0 || position >= m->g.max_context ||
            position / GJ_BLOCK >= b->table_width)
            return refuse(GJ_BAD_POSITION, row, where);
        int last = m->last_row[s];
        if (last >= 0 && (last != row - 1 || b->positions[last] != position - 1))
            return refuse(GJ_BAD_ORDER, row, where);
        m->last_row[s] = row;
    }
    for (int s = 0; s < b->sequences; s++) {
        if (m->last_row[s] < 0) continue;
        const int32_t *table = b->block_tables + (size_t)s * (size_t)b->table_width;
        for (int i = 0; i <= b->positions[m->last_row[s]] / GJ_BLOCK; i++)
            if (table[i] < 0 || table[i] >= b->num_blocks)
                return refuse(GJ_BAD_BLOCK, s * b->table_width + i, where);
    }
    /* Not twice either: a pass has room for as many logits as rows. */
    memset(m->asked, 0, (size_t)b->tokens);
    for (int i = 0; i < b->logits; i++) {
        int row = b->logits_rows[i];
        if (row < 0 || row >= b->tokens || m->asked[row]) return refuse(GJ_BAD_LOGITS_ROW, i, where);
        m->asked[row] = 1;
    }
    return GJ_OK;
}
