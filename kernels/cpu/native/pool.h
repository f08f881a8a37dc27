/* A few threads that run one function together, with barriers and shared work inside it. */
#ifndef GPTJET_POOL_H
#define GPTJET_POOL_H

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

/* To be called by every thread of a region. */
void gj_barrier(gj_pool *pool);

/* Inside a region: every thread calls it with the same count, and each index is done once. A thread
 * begins with its own range, the same in every pass, whose weights may still be in its cache; then
 * it helps the others. A barrier must follow before the next use. */
void gj_share(gj_pool *pool, int thread, size_t count, gj_task task, void *context);

#endif
