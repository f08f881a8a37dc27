/* A few threads that run one function together, in phases of shared work. */
#ifndef GPTJET_POOL_H
#define GPTJET_POOL_H

#include <stdbool.h>
#include <stddef.h>

typedef struct gj_pool gj_pool;
typedef void (*gj_region)(void *context, int thread);
typedef void (*gj_task)(void *context, int thread, size_t index);

/* NULL with errno set when a thread cannot be started. */
gj_pool *gj_pool_create(int num_threads);
void gj_pool_destroy(gj_pool *pool);
int gj_pool_threads(const gj_pool *pool);

/* Runs region(context, t) on every thread t, the caller being thread 0, and returns when all are
 * done. One caller at a time. */
void gj_pool_run(gj_pool *pool, gj_region region, void *context);

/* Inside a region: every thread calls it with the same count, each index is done once, and it
 * returns when all are done. A thread begins with its own range, the same in every pass, whose
 * weights may still be in its cache; then it helps the others. Nobody waits for a thread that has
 * no index in hand: on a busy machine one may not get a processor for milliseconds, and the others
 * then do its part. It finds the phase over when it comes. What a region does outside of shares
 * must therefore write nothing that another thread reads. */
void gj_share(gj_pool *pool, int thread, size_t count, gj_task task, void *context);

/* Inside a region: whether the next share is over already, so that nothing need be made ready for
 * it. A thread that comes late runs through a region without work. */
bool gj_is_late(const gj_pool *pool, int thread);

#endif
