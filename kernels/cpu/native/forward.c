/* One pass over the model for any rows of any sequences, in one parallel region.
 *
 * A layer is two products with what they need folded into them: the rotary positions, the writing
 * of keys and values to the cache and the GELU happen to W_in's tiles while these are in the L1
 * cache, the residual to W_out's. So a layer is three phases of shared work, and all keys and
 * values of the pass are in the cache before anyone attends to them.
 *
 * `wide` holds W_in's output [q | k | v | mlp]. Attention writes into the place of v, which is in
 * the cache by then, so that [attention | gelu(mlp)] stands ready for W_out. */
#include <stdlib.h>
#include <string.h>

#include "model.h"

typedef struct {
    gj_model *m;
    const gj_batch *batch;
    int first, rows; /* of the batch */
    int num_tiles, num_wanted;
    int layer;
} pass;

/* What one product of a pass works on; every thread has its own, with the same contents. */
typedef struct {
    const pass *p;
    const gj_weight *weight;
    gj_operand operand;
    int rows, row_blocks;
    void (*finish)(const pass *p, int row, int panel, float *columns);
} product;

static int attention_size(const gj_model *m) { return m->g.num_heads * m->g.head_dim; }

static size_t kv_offset(const gj_model *m, const gj_batch *b, int layer, int value) {
    size_t block = (size_t)GJ_BLOCK * (size_t)attention_size(m);
    return ((size_t)layer * 2 + (size_t)value) * (size_t)b->num_blocks * block;
}

/* ---- what happens to the tiles ---- */

static int smaller(int a, int b) { return a < b ? a : b; }

/* Columns of q or k that are features begin .. end - 1 of one head. */
static void turn(const pass *p, int row, int begin, int end, float *values) {
    const gj_model *m = p->m;
    int position = p->batch->positions[p->first + row];
    size_t angles = (size_t)position * (size_t)m->g.rotary_dim;
    gj_rotate(values, begin, end, m->cosine + angles, m->sine + angles, m->g.rotary_dim);
}

/* Where the key (0) or value (1) of a row and head stands in the cache. */
static float *slot(const pass *p, int row, int value, int head) {
    const gj_model *m = p->m;
    const gj_batch *b = p->batch;
    int position = b->positions[p->first + row];
    const int32_t *table =
        b->block_tables + (size_t)b->sequence_index[p->first + row] * (size_t)b->table_width;
    size_t block = (size_t)table[position / GJ_BLOCK] * (size_t)m->g.num_heads + (size_t)head;
    size_t at = (block * GJ_BLOCK + (size_t)(position % GJ_BLOCK)) * (size_t)m->g.head_dim;
    return b->kv_cache + kv_offset(m, b, p->layer, value) + at;
}

static void finish_w_in(const pass *p, int row, int panel, float *columns) {
    const gj_model *m = p->m;
    const gj_weight *w = &m->layers[p->layer].w_in;
    int attention = attention_size(m), dim = m->g.head_dim;
    int begin = panel * GJ_PANEL, end = smaller(begin + GJ_PANEL, w->outputs);
    float *wide = m->wide + (size_t)row * m->wide_stride;
    for (int i = 0; i < GJ_PANEL; i++) columns[i] += w->bias[begin + i];
    int at = begin;
    for (int part = 0; part < 3; part++) {
        int stop = smaller(end, (part + 1) * attention);
        while (at < stop) {
            int head = (at - part * attention) / dim, d = (at - part * attention) % dim;
            int count = smaller(dim - d, stop - at);
            float *values = columns + (at - begin);
            if (part < 2) turn(p, row, d, d + count, values);
            float *to = part == 0 ? wide + at : slot(p, row, part - 1, head) + d;
            memcpy(to, values, (size_t)count * sizeof *to);
            at += count;
        }
    }
    if (at == end) return;
    /* Whole vectors, the columns before `at` too: they have been copied. */
    gj_gelu(columns + (at - begin) / 16 * 16, GJ_PANEL - (at - begin) / 16 * 16);
    memcpy(wide + at, columns + (at - begin), (size_t)(end - at) * sizeof *wide);
}

static void finish_w_out(const pass *p, int row, int panel, float *columns) {
    const gj_model *m = p->m;
    const gj_weight *w = &m->layers[p->layer].w_out;
    int begin = panel * GJ_PANEL, count = smaller(GJ_PANEL, w->outputs - begin);
    float *x = m->residual + (size_t)row * (size_t)m->g.hidden_size + begin;
    for (int i = 0; i < count; i++) x[i] += columns[i] + w->bias[begin + i];
}

static void finish_lm_head(const pass *p, int row, int panel, float *columns) {
    const gj_model *m = p->m;
    int begin = panel * GJ_PANEL, count = smaller(GJ_PANEL, m->lm_head.outputs - begin);
    float *logits = p->batch->out + (size_t)m->wanted_to[row] * (size_t)m->g.vocab_size + begin;
    for (int i = 0; i < count; i++) logits[i] = columns[i] + m->lm_head.bias[begin + i];
}

/* ---- products ---- */

static void product_task(void *context, int thread, size_t index) {
    const product *work = context;
    const gj_model *m = work->p->m;
    int panel = (int)(index / (size_t)work->row_blocks);
    int block = (int)(index % (size_t)work->row_blocks);
    int begin = (int)((int64_t)work->rows * block / work->row_blocks);
    int end = (int)((int64_t)work->rows * (block + 1) / work->row_blocks);
    gj_thread_scratch *mine = m->threads + thread;
    gj_gemm(work->weight, &work->operand, begin, end - begin, panel, mine->tile, mine->unpacked);
    for (int row = begin; row < end; row++)
        work->finish(work->p, row, panel, mine->tile + (size_t)(row - begin) * GJ_PANEL);
}

static void multiply(const pass *p, int thread, const gj_weight *weight, gj_operand operand,
                     int rows, void (*finish)(const pass *, int, int, float *)) {
    product work = {.p = p, .weight = weight, .operand = operand, .rows = rows, .finish = finish};
    work.row_blocks = (rows + GJ_ROW_BLOCK - 1) / GJ_ROW_BLOCK;
    size_t count = (size_t)weight->panels * (size_t)work.row_blocks;
    gj_share(p->m->pool, thread, count, product_task, &work);
}

/* Rows as a weight's kernel reads them: normalised if `norm_weight` is given, quantised if the
 * weight is not dense. `which` maps row to source row. */
typedef struct {
    const gj_model *m;
    const gj_weight *weight;
    const float *source;
    size_t stride;
    const int32_t *which;
    const float *norm_weight, *norm_bias;
    float *values;
    uint8_t *quantized;
    size_t quantized_stride;
} preparation;

static void prepare_row(void *context, int thread, size_t row) {
    (void)thread;
    const preparation *work = context;
    const gj_model *m = work->m;
    const float *x = work->source + (work->which ? (size_t)work->which[row] : row) * work->stride;
    if (work->norm_weight) {
        float *to = work->values + row * m->normal_stride;
        gj_layer_norm(x, work->norm_weight, work->norm_bias, m->g.layer_norm_eps, m->g.hidden_size,
                      to);
        x = to;
    }
    if (work->weight->kind != GJ_FP32)
        gj_quantize_row(work->weight, x, work->quantized + row * work->quantized_stride);
}

/* Few rows are done by every thread for itself, which is quicker than to share them. */
static gj_operand prepare(const pass *p, int thread, const gj_weight *weight, int rows,
                          const float *source, size_t stride, const int32_t *which,
                          const float *norm_weight, const float *norm_bias) {
    const gj_model *m = p->m;
    bool quantize = weight->kind != GJ_FP32, alone = rows <= GJ_PRIVATE_ROWS;
    if (!quantize && !norm_weight) return (gj_operand){.values = source, .stride = stride};
    gj_thread_scratch *mine = m->threads + thread;
    preparation work = {.m = m, .weight = weight, .source = source, .stride = stride};
    work.which = which;
    work.norm_weight = norm_weight;
    work.norm_bias = norm_bias;
    work.values = alone ? mine->values : m->normal;
    work.quantized = alone ? mine->quantized : m->quantized;
    work.quantized_stride = quantize ? gj_quantized_bytes(weight) : 0;
    if (alone && gj_is_late(m->pool, thread)) rows = 0;
    if (alone)
        for (int row = 0; row < rows; row++) prepare_row(&work, thread, (size_t)row);
    else gj_share(m->pool, thread, (size_t)rows, prepare_row, &work);
    return (gj_operand){.values = work.values,
                        .stride = m->normal_stride,
                        .quantized = work.quantized,
                        .quantized_stride = work.quantized_stride};
}

/* ---- attention ---- */

static void attention_task(void *context, int thread, size_t index) {
    const pass *p = context;
    const gj_model *m = p->m;
    const gj_batch *b = p->batch;
    /* Head by head: the tiles of a sequence then read the same keys and values in a row. */
    int head = (int)(index / (size_t)p->num_tiles);
    gj_query_tile tile = m->tiles[index % (size_t)p->num_tiles];
    int row = p->first + tile.first_row, dim = m->g.head_dim;
    size_t head_offset = (size_t)head * GJ_BLOCK * (size_t)dim;
    float *wide = m->wide + (size_t)tile.first_row * m->wide_stride + (size_t)head * (size_t)dim;
    gj_attention a = {
        .keys = b->kv_cache + kv_offset(m, b, p->layer, 0) + head_offset,
        .values = b->kv_cache + kv_offset(m, b, p->layer, 1) + head_offset,
        .block_stride = (size_t)GJ_BLOCK * (size_t)attention_size(m),
        .block_table = b->block_tables + (size_t)b->sequence_index[row] * (size_t)b->table_width,
        .head_dim = dim,
        .rows = tile.rows,
        .first_position = b->positions[row],
        .queries = wide,
        .out = wide + 2 * (size_t)attention_size(m),
        .query_stride = m->wide_stride,
        .out_stride = m->wide_stride,
    };
    gj_attend(&a, m->threads[thread].attention);
}

/* ---- the pass ---- */

static void embed(void *context, int thread, size_t row) {
    (void)thread;
    const pass *p = context;
    const gj_model *m = p->m;
    size_t hidden = (size_t)m->g.hidden_size;
    size_t from = (size_t)p->batch->token_ids[(size_t)p->first + row] * hidden;
    float *x = m->residual + row * hidden;
    if (!m->g.half_embedding) {
        memcpy(x, (const float *)m->embedding + from, hidden * sizeof *x);
        return;
    }
    const uint16_t *half = (const uint16_t *)m->embedding + from;
    for (size_t i = 0; i < hidden; i++) x[i] = gj_half_to_float(half[i]);
}

static void run_pass(void *context, int thread) {
    pass mine = *(const pass *)context, *p = &mine;
    gj_model *m = p->m;
    size_t hidden = (size_t)m->g.hidden_size;
    gj_share(m->pool, thread, (size_t)p->rows, embed, p);
    for (p->layer = 0; p->layer < m->g.num_layers; p->layer++) {
        const gj_layer *layer = m->layers + p->layer;
        gj_operand operand = prepare(p, thread, &layer->w_in, p->rows, m->residual, hidden, NULL,
                                     layer->norm_weight, layer->norm_bias);
        multiply(p, thread, &layer->w_in, operand, p->rows, finish_w_in);
        size_t count = (size_t)p->num_tiles * (size_t)m->g.num_heads;
        gj_share(m->pool, thread, count, attention_task, p);
        operand = prepare(p, thread, &layer->w_out, p->rows, m->wide + 2 * attention_size(m),
                          m->wide_stride, NULL, NULL, NULL);
        multiply(p, thread, &layer->w_out, operand, p->rows, finish_w_out);
    }
    if (!p->num_wanted) return;
    gj_operand operand = prepare(p, thread, &m->lm_head, p->num_wanted, m->residual, hidden,
                                 m->wanted, m->norm_weight, m->norm_bias);
    multiply(p, thread, &m->lm_head, operand, p->num_wanted, finish_lm_head);
}

/* Tiles of query rows: neighbours of one sequence. */
static int cut_tiles(const gj_model *m, const gj_batch *b, int first, int rows) {
    int count = 0;
    for (int row = 0; row < rows; row++) {
        gj_query_tile *last = count ? m->tiles + count - 1 : NULL;
        const int32_t *sequence = b->sequence_index + first + row;
        if (last && last->rows < GJ_QUERY_TILE && sequence[-1] == sequence[0]) last->rows++;
        else m->tiles[count++] = (gj_query_tile){row, 1};
    }
    return count;
}

int gj_forward(gj_model *m, const gj_batch *b, int32_t *where) {
    int bad = gj_check(m, b, where);
    if (bad) return bad;
    /* Rows past GJ_PASS_ROWS take another pass over the weights, like the next chunk of a prompt:
     * the scratch stays small and in the cache. */
    for (int first = 0; first < b->tokens; first += GJ_PASS_ROWS) {
        int rows = smaller(GJ_PASS_ROWS, b->tokens - first);
        pass p = {.m = m, .batch = b, .first = first, .rows = rows};
        p.num_tiles = cut_tiles(m, b, first, rows);
        for (int i = 0; i < b->logits; i++) {
            int row = b->logits_rows[i] - first;
            if (row < 0 || row >= rows) continue;
            m->wanted[p.num_wanted] = row;
            m->wanted_to[p.num_wanted++] = i;
        }
        gj_pool_run(m->pool, run_pass, &p);
    }
    return GJ_OK;
}
