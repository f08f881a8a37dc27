/* How fast the threads of a pool read memory together: the ceiling of a decode step. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <string.h>
#include <time.h>

#include "model.h"
#include "simd.h"

enum { PIECE = 1 << 20, SUMS = 8, AHEAD = 4096 };

typedef struct {
    gj_pool *pool;
    const float *values;
    size_t count;
    float sink;
} reading;

/* Shared in pieces as a product's panels are, so that a thread without a processor holds up none. */
static void read_piece(void *context, int thread, size_t index) {
    (void)thread;
    reading *work = context;
    size_t step = PIECE / sizeof(float), begin = index * step;
    size_t count = work->count - begin < step ? work->count - begin : step;
    const float *at = work->values + begin, *end = at + count / (SUMS * VL) * (SUMS * VL);
    vfloat sums[SUMS];
    for (int i = 0; i < SUMS; i++) sums[i] = vsplat(0);
    for (; at < end; at += SUMS * VL)
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i++) {
            if (i * VL % 16 == 0) __builtin_prefetch((const char *)(at + i * VL) + AHEAD, 0, 3);
            sums[i] += vload(at + i * VL);
        }
    float sum = 0;
    for (int i = 0; i < SUMS; i++) sum += vsum(sums[i]);
    if (sum == 1.5f) work->sink = sum; /* never: the values are zero, which nobody here knows */
}

static void read_all(void *context, int thread) {
    reading *work = context;
    size_t pieces = (work->count * sizeof(float) + PIECE - 1) / PIECE;
    gj_share(work->pool, thread, pieces, read_piece, work);
}

int gj_measure_read(int num_threads, uint64_t bytes, int rounds, int repeats, double *seconds) {
    gj_pool *pool = gj_pool_create(num_threads);
    float *values = gj_allocate(bytes);
    int result = pool && values ? GJ_OK : GJ_NO_MEMORY;
    if (result == GJ_OK) {
        memset(values, 0, bytes); /* pages that nobody has written are one and the same page */
        reading work = {.pool = pool, .values = values, .count = bytes / sizeof(float)};
        for (int repeat = -1; repeat < repeats; repeat++) {
            struct timespec begin, end;
            clock_gettime(CLOCK_MONOTONIC, &begin);
            for (int round = 0; round < rounds; round++) gj_pool_run(pool, read_all, &work);
            clock_gettime(CLOCK_MONOTONIC, &end);
            double taken = (double)(end.tv_sec - begin.tv_sec) +
                           (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
            if (repeat >= 0) seconds[repeat] = taken / rounds; /* the first one warms up */
        }
    }
    gj_release(values, bytes);
    gj_pool_destroy(pool);
    return result;
}
