/* Memory for packed weights, and the packing. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "gptjet.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model.h"
#include "simd.h"

enum { LARGE_PAGE = 2 << 20 };

#ifdef GPTJET_PLAIN_MEMORY
/* For the sanitizers, which watch the borders of what malloc gives. */
void *gj_allocate(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return memory ? memset(memory, 0, bytes) : NULL;
}

void gj_release(void *memory, size_t bytes) {
    (void)bytes;
    free(memory);
}
#else
void *gj_allocate(size_t bytes) {
    /* A token reads all weights, and in small pages that is a page walk every 4 KiB. */
    size_t slack = bytes >= LARGE_PAGE ? LARGE_PAGE : 0;
    void *memory =
        mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    if (!slack) return memory;
    uintptr_t begin = (uintptr_t)memory;
    uintptr_t aligned = (begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    size_t page = 4096, used = (bytes + page - 1) / page * page;
    if (aligned > begin) munmap(memory, aligned - begin);
    uintptr_t end = aligned + used, mapped = begin + (bytes + slack + page - 1) / page * page;
    if (mapped > end) munmap((void *)end, mapped - end);
#ifdef MADV_HUGEPAGE
    madvise((void *)aligned, bytes / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);
#endif
    return (void *)aligned;
}

void gj_release(void *memory, size_t bytes) {
    if (memory) munmap(memory, bytes);
}
#endif

float gj_half_to_float(uint16_t half) {
    /* The exponent moves from base 15 to base 127 by a product with 2^112, subnormals too.
     * What reaches 2^16 was infinity or NaN, and takes the exponent of those. */
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    if (value >= 65536.0f) {
        magnitude |= 0x7f800000;
        memcpy(&value, &magnitude, sizeof value);
    }
    return half & 0x8000 ? -value : value;
}

static size_t data_bytes(const gj_weight *w) {
    /* The kernels' prefetches need no room at the end: a prefetch never faults. */
    return (size_t)w->panels * w->panel_bytes;
}

size_t gj_weight_bytes(const gj_weight *w) {
    size_t columns = (size_t)w->panels * GJ_PANEL * sizeof(float);
    return data_bytes(w) + columns * (w->kind == GJ_INT8 ? 2 : 1);
}

bool gj_weight_create(gj_weight *w, int kind, int outputs, int inputs, int group) {
    *w = (gj_weight){.kind = (enum gj_kind)kind, .outputs = outputs, .inputs = inputs};
    w->panels = (outputs + GJ_PANEL - 1) / GJ_PANEL;
    w->group = group;
    w->padded_group = (group + 7) / 8 * 8;
    w->groups = (inputs + group - 1) / group;
    size_t grouped = (size_t)w->groups * (size_t)w->padded_group;
    switch (w->kind) {
        case GJ_FP32: w->panel_bytes = (size_t)inputs * GJ_PANEL * sizeof(float); break;
        case GJ_INT8: w->panel_bytes = grouped * GJ_PANEL; break;
        case GJ_INT4:
            w->panel_bytes = (size_t)w->groups * GJ_PANEL * ((size_t)w->padded_group / 2 + 2);
            break;
    }
    size_t columns = (size_t)w->panels * GJ_PANEL;
    w->data = gj_allocate(data_bytes(w));
    w->bias = calloc(columns, sizeof(float));
    w->scale = w->kind == GJ_INT8 ? calloc(columns, sizeof(float)) : NULL;
    if (w->data && w->bias && (w->scale || w->kind != GJ_INT8)) return true;
    gj_weight_destroy(w);
    return false;
}

void gj_weight_destroy(gj_weight *w) {
    gj_release(w->data, data_bytes(w));
    free(w->bias);
    free(w->scale);
    *w = (gj_weight){0};
}

/* Where input k of a column stands in a group of bytes: four inputs of a column together for the
 * dot products of AVX-512, whole columns otherwise, which compilers turn into dot products. */
static size_t byte_of(const gj_weight *w, int column, int k) {
#if GJ_AVX512
    (void)w;
    return (size_t)(k / 4) * GJ_PANEL * 4 + (size_t)column * 4 + (size_t)(k % 4);
#else
    return (size_t)column * (size_t)w->padded_group + (size_t)k;
#endif
}

typedef struct {
    gj_weight *weight;
    int first_row, rows;
    const void *values;
    const uint16_t *scales;
} packing;

static void pack_fp32_panel(const packing *job, int panel, int begin, int end) {
    const gj_weight *w = job->weight;
    float *to = (float *)(w->data + (size_t)panel * w->panel_bytes);
    const float *from = job->values;
    /* In squares: a whole column at a time would touch a line of each of 64 rows per value. */
    for (int k0 = 0; k0 < w->inputs; k0 += 16)
        for (int n = begin; n < end; n++)
            for (int k = k0; k < w->inputs && k < k0 + 16; k++)
                to[(size_t)k * GJ_PANEL + (size_t)(n - panel * GJ_PANEL)] =
                    from[(size_t)(n - job->first_row) * (size_t)w->inputs + (size_t)k];
}

static void pack_int8_panel(const packing *job, int panel, int begin, int end) {
    const gj_weight *w = job->weight;
    uint8_t *to = w->data + (size_t)panel * w->panel_bytes;
    const int8_t *from = job->values;
    size_t group_bytes = (size_t)w->padded_group * GJ_PANEL;
    for (int g = 0; g < w->groups; g++)
        for (int n = begin; n < end; n++) {
            const int8_t *row = from + (size_t)(n - job->first_row) * (size_t)w->inputs;
            for (int i = 0, k = g * w->group; i < w->group && k < w->inputs; i++, k++)
                to[(size_t)g * group_bytes + byte_of(w, n - panel * GJ_PANEL, i)] =
                    (uint8_t)(row[k] + 128);
        }
}

static void pack_int4_panel(const packing *job, int panel, int begin, int end) {
    const gj_weight *w = job->weight;
    uint8_t *to = w->data + (size_t)panel * w->panel_bytes;
    size_t group_bytes = GJ_PANEL * ((size_t)w->padded_group / 2 + 2);
    size_t row_bytes = ((size_t)w->inputs + 1) / 2;
    for (int g = 0; g < w->groups; g++, to += group_bytes) {
        for (int n = begin; n < end; n++) {
            int column = n - panel * GJ_PANEL, local = n - job->first_row;
            const uint8_t *row = (const uint8_t *)job->values + (size_t)local * row_bytes;
            for (int i = 0, k = g * w->group; i < w->group && k < w->inputs; i++, k++) {
                uint8_t level = k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15;
                gj_put_level(w, to, column, i, level);
            }
            const uint16_t *scale = job->scales + (size_t)local * (size_t)w->groups + g;
            memcpy(to + group_bytes - 2 * GJ_PANEL + 2 * column, scale, sizeof *scale);
        }
    }
}

size_t gj_byte_of(const gj_weight *w, int column, int k) { return byte_of(w, column, k); }

static void pack_task(void *context, int thread, size_t index) {
    (void)thread;
    const packing *job = context;
    int panel = job->first_row / GJ_PANEL + (int)index;
    int begin = panel * GJ_PANEL, end = begin + GJ_PANEL;
    if (begin < job->first_row) begin = job->first_row;
    if (end > job->first_row + job->rows) end = job->first_row + job->rows;
    switch (job->weight->kind) {
        case GJ_FP32: pack_fp32_panel(job, panel, begin, end); break;
        case GJ_INT8: pack_int8_panel(job, panel, begin, end); break;
        case GJ_INT4: pack_int4_panel(job, panel, begin, end); break;
    }
}

typedef struct {
    gj_pool *pool;
    packing job;
} packing_region;

static void pack_region(void *context, int thread) {
    packing_region *region = context;
    int first = region->job.first_row / GJ_PANEL;
    int last = (region->job.first_row + region->job.rows - 1) / GJ_PANEL;
    gj_share(region->pool, thread, (size_t)(last - first + 1), pack_task, &region->job);
}

void gj_weight_pack(gj_pool *pool, gj_weight *weight, int first_row, int rows, const void *values,
                    const uint16_t *scales) {
    packing_region region = {pool, {weight, first_row, rows, values, scales}};
    if (rows > 0) gj_pool_run(pool, pack_region, &region);
}

/* Padding stands for zero: 128 in INT8, 8 in INT4, and scales of zero. */
void gj_weight_clear(gj_weight *w) {
    if (w->kind == GJ_INT8) memset(w->data, 128, data_bytes(w));
    if (w->kind == GJ_INT4) {
        size_t group_bytes = GJ_PANEL * ((size_t)w->padded_group / 2 + 2);
        for (size_t at = 0; at < data_bytes(w); at += group_bytes)
            memset(w->data + at, 0x88, group_bytes - 2 * GJ_PANEL);
    }
}
