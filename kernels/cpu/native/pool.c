/* A few threads that run one function together, in phases of shared work.
 *
 * Waiting has three stages. A thread first spins for about a microsecond: the others are as a
 * rule that close behind. Then it yields the processor between looks, so that on a busy machine
 * whoever it waits for gets to run: there both threads may well be on one core, and every spin is
 * taken from the one that is waited for (spinning 30 times as long made a small model 10 to 25
 * times slower beside other load). Then it sleeps until it is woken. OpenMP's usual wait spins for
 * milliseconds, and two such programs on one machine stop each other. */
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

#ifndef GPTJET_SPINS
#define GPTJET_SPINS 60
#endif
enum { CACHE_LINE = 64, SPINS = GPTJET_SPINS };
#ifndef GPTJET_YIELD_NS
#define GPTJET_YIELD_NS 100000
#endif

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint64_t taken; /* phase << 32 | indices taken of the range */
} work_range;

/* A number that only grows, and whoever sleeps until it does. */
typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
} signal_word;

struct gj_pool {
    signal_word started;  /* regions begun */
    signal_word phase;    /* shares completed, ever */
    _Alignas(CACHE_LINE) atomic_size_t done; /* indices of this phase */
    _Alignas(CACHE_LINE) atomic_int active;  /* workers inside the region */
    atomic_bool open;                        /* workers may still enter it */
    _Alignas(CACHE_LINE) gj_region region;
    void *context;
    uint32_t first_phase; /* of the region */
    bool stopping;
    int num_threads;
    pthread_t *threads;
    uint32_t *next_phase; /* of each thread */
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
    int64_t deadline = now_nanoseconds() + GPTJET_YIELD_NS;
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

/* The thread that completes the last index opens the next phase. */
static void complete(gj_pool *pool, uint32_t phase) {
    atomic_store(&pool->done, 0);
    for (int i = 0; i < pool->num_threads; i++)
        atomic_store(&pool->ranges[i].taken, (uint64_t)(phase + 1) << 32);
    advance(&pool->phase);
}

/* One more index of the range, or `size` if there is none or the phase is over. */
static size_t take(work_range *range, uint32_t phase, size_t size) {
    uint64_t word = atomic_load(&range->taken);
    while ((uint32_t)(word >> 32) == phase && (uint32_t)word < size)
        if (atomic_compare_exchange_weak(&range->taken, &word, word + 1)) return (uint32_t)word;
    return size;
}

void gj_share(gj_pool *pool, int thread, size_t count, gj_task task, void *context) {
    if (!count) return;
    size_t threads = (size_t)pool->num_threads, index;
    uint32_t phase = pool->next_phase[thread]++;
    for (size_t turn = 0; turn < threads; turn++) {
        size_t owner = ((size_t)thread + turn) % threads;
        size_t begin = count * owner / threads, size = count * (owner + 1) / threads - begin;
        while ((index = take(pool->ranges + owner, phase, size)) < size) {
            task(context, thread, begin + index);
            if (atomic_fetch_add(&pool->done, 1) + 1 < count) continue;
            complete(pool, phase);
            return;
        }
    }
    wait_for_change(&pool->phase, phase);
}

bool gj_is_late(const gj_pool *pool, int thread) {
    uint32_t completed = atomic_load_explicit(&pool->phase.value, memory_order_acquire);
    return (int32_t)(completed - pool->next_phase[thread]) > 0;
}

static void *work(void *argument) {
    worker_argument mine = *(worker_argument *)argument;
    free(argument);
    gj_pool *pool = mine.pool;
    for (uint32_t seen = 0;;) {
        wait_for_change(&pool->started, seen);
        atomic_fetch_add(&pool->active, 1);
        seen = atomic_load(&pool->started.value);
        bool stopping = pool->stopping;
        if (!stopping && atomic_load(&pool->open)) {
            pool->next_phase[mine.thread] = pool->first_phase;
            pool->region(pool->context, mine.thread);
        }
        atomic_fetch_sub(&pool->active, 1);
        if (stopping) return NULL;
    }
}

void gj_pool_run(gj_pool *pool, gj_region region, void *context) {
    pool->region = region;
    pool->context = context;
    pool->first_phase = pool->next_phase[0];
    if (pool->num_threads == 1) {
        region(context, 0);
        return;
    }
    atomic_store(&pool->open, true);
    advance(&pool->started);
    region(context, 0);
    /* The work is done. Whoever has not come yet stays out; who is inside finds nothing to do, but
     * the context must outlive his looking. */
    atomic_store(&pool->open, false);
    for (int i = 0; atomic_load(&pool->active) > 0; i++) {
        if (i < SPINS) pause_briefly();
        else sched_yield();
    }
}

int gj_pool_threads(const gj_pool *pool) { return pool->num_threads; }

gj_pool *gj_pool_create(int num_threads) {
    size_t size = (sizeof(gj_pool) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    gj_pool *pool = aligned_alloc(CACHE_LINE, size);
    if (!pool) return NULL;
    *pool = (gj_pool){.num_threads = 1};
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    pool->next_phase = calloc((size_t)num_threads, sizeof *pool->next_phase);
    pool->ranges = aligned_alloc(CACHE_LINE, (size_t)num_threads * sizeof *pool->ranges);
    int error = pool->threads && pool->ranges && pool->next_phase ? 0 : ENOMEM;
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
    free(pool->next_phase);
    free(pool);
}
