/* A few threads that run one function together, with barriers and shared work inside it.
 *
 * Waiting has three stages. A thread first spins for about two microseconds: the others are as a
 * rule that close behind. Then it yields the processor between looks, so that on a busy machine
 * whoever it waits for gets to run. Then it sleeps until it is woken. OpenMP's usual wait spins
 * for milliseconds instead, and two such programs on one machine stop each other. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { CACHE_LINE = 64, SPINS = 60 };
#define YIELD_NANOSECONDS 100000

typedef struct {
    _Alignas(CACHE_LINE) atomic_size_t taken;
} work_range;

/* A number that only grows, and whoever sleeps until it does. */
typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
} signal_word;

struct gj_pool {
    signal_word started;  /* regions begun */
    signal_word released; /* barriers passed */
    _Alignas(CACHE_LINE) atomic_int arrived;
    _Alignas(CACHE_LINE) gj_region region;
    void *context;
    bool stopping;
    int num_threads;
    pthread_t *threads;
    work_range *ranges;
};

typedef struct {
    gj_pool *pool;
    int thread;
} worker_argument;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void sleep_until_changed(signal_word *word, uint32_t seen) {
#ifdef __linux__
    syscall(SYS_futex, &word->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    (void)word;
    (void)seen;
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
#endif
}

static void wait_for_change(signal_word *word, uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&word->value, memory_order_acquire) != seen) return;
        pause_briefly();
    }
    int64_t deadline = now_nanoseconds() + YIELD_NANOSECONDS;
    do {
        for (int i = 0; i < 8; i++) {
            if (atomic_load_explicit(&word->value, memory_order_acquire) != seen) return;
            pause_briefly();
        }
        sched_yield();
    } while (now_nanoseconds() < deadline);
    atomic_fetch_add(&word->sleepers, 1);
    while (atomic_load(&word->value) == seen) sleep_until_changed(word, seen);
    atomic_fetch_sub(&word->sleepers, 1);
}

static void advance(signal_word *word) {
    atomic_fetch_add(&word->value, 1);
#ifdef __linux__
    /* Both orders are safe: a sleeper announces itself before it looks at the value a last time. */
    if (atomic_load(&word->sleepers) > 0)
        syscall(SYS_futex, &word->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

void gj_barrier(gj_pool *pool) {
    uint32_t seen = atomic_load(&pool->released.value);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 < pool->num_threads) {
        wait_for_change(&pool->released, seen);
        return;
    }
    /* The last to arrive: nobody touches the ranges until the others are let go. */
    atomic_store(&pool->arrived, 0);
    for (int i = 0; i < pool->num_threads; i++)
        atomic_store_explicit(&pool->ranges[i].taken, 0, memory_order_relaxed);
    if (pool->num_threads > 1) advance(&pool->released);
}

void gj_share(gj_pool *pool, int thread, size_t count, gj_task task, void *context) {
    size_t threads = (size_t)pool->num_threads;
    for (size_t turn = 0; turn < threads; turn++) {
        size_t owner = ((size_t)thread + turn) % threads;
        size_t begin = count * owner / threads, end = count * (owner + 1) / threads;
        atomic_size_t *taken = &pool->ranges[owner].taken;
        for (;;) {
            size_t index = begin + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
            if (index >= end) break;
            task(context, thread, index);
        }
    }
}

static void *work(void *argument) {
    worker_argument mine = *(worker_argument *)argument;
    free(argument);
    gj_pool *pool = mine.pool;
    for (uint32_t seen = 0;; seen++) {
        wait_for_change(&pool->started, seen);
        if (pool->stopping) return NULL;
        pool->region(pool->context, mine.thread);
        gj_barrier(pool);
    }
}

void gj_pool_run(gj_pool *pool, gj_region region, void *context) {
    pool->region = region;
    pool->context = context;
    if (pool->num_threads > 1) advance(&pool->started);
    region(context, 0);
    gj_barrier(pool);
}

int gj_pool_threads(const gj_pool *pool) { return pool->num_threads; }

gj_pool *gj_pool_create(int num_threads) {
    size_t size = (sizeof(gj_pool) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    gj_pool *pool = aligned_alloc(CACHE_LINE, size);
    if (!pool) return NULL;
    *pool = (gj_pool){.num_threads = 1};
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    pool->ranges = aligned_alloc(CACHE_LINE, (size_t)num_threads * sizeof *pool->ranges);
    int error = pool->threads && pool->ranges ? 0 : ENOMEM;
    /* The workers take no signals: those are for the program that called. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    for (int i = 0; i < num_threads && !error; i++) {
        atomic_init(&pool->ranges[i].taken, 0);
        if (i == 0) continue;
        worker_argument *argument = malloc(sizeof *argument);
        if (!argument) {
            error = ENOMEM;
            break;
        }
        *argument = (worker_argument){pool, i};
        error = pthread_create(&pool->threads[i], NULL, work, argument);
        if (error) free(argument);
        else pool->num_threads = i + 1;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) return pool;
    gj_pool_destroy(pool);
    errno = error;
    return NULL;
}

void gj_pool_destroy(gj_pool *pool) {
    if (!pool) return;
    pool->stopping = true;
    if (pool->num_threads > 1) advance(&pool->started);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool->ranges);
    free(pool);
}
