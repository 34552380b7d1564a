/* A pool of threads that share out the chunks of one job at a time: `pixtral_parallel_for`. Knows no matrices.
 *
 * Decoding a token is a hundred jobs of some hundred microseconds, so threads stay awake for a while after each: waking
 * one takes as long as a tenth of a job. Whoever finds no chunk left is done; a thread whose core is taken by another
 * program simply takes fewer. The caller waits only for chunks that are being computed. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "native.h"

#define MOST_THREADS 256
#define AWAKE 200000 /* ns that a thread waits for the next job before it sleeps */
#define PATIENT 20000 /* ns that the caller waits awake for others' last chunks: asleep, it leaves them its core */
#define OPEN (1u << 31)

static struct {
    pthread_mutex_t callers; /* held by the caller whose job is being done */
    pthread_mutex_t lock;    /* for the two conditions */
    pthread_cond_t opened, left;
    atomic_uint job;      /* its number: a change is what threads wait for */
    atomic_uint state;    /* OPEN while there may be chunks left, plus the number of threads inside */
    atomic_int sleepers;  /* threads that wait for `opened` */
    atomic_bool waiting;  /* whether the caller waits for `left` */
    unsigned threads;     /* started so far */
    /* of the job; read only by who is inside: */
    chunk_function *function;
    void *argument;
    long chunks;
    unsigned helpers; /* the most threads beside the caller */
    atomic_long next;
} pool = {.callers = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .opened = PTHREAD_COND_INITIALIZER,
          .left = PTHREAD_COND_INITIALIZER};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void take_chunks(void) {
    for (long chunk; (chunk = atomic_fetch_add(&pool.next, 1)) < pool.chunks;)
        pool.function(pool.argument, chunk);
}

static void leave(void) {
    if (atomic_fetch_sub(&pool.state, 1) == 1 && atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* Whether the job is open and wants one thread more, which then is inside. */
static bool enter(void) {
    unsigned state = atomic_load(&pool.state);
    while (state & OPEN)
        if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
            bool wanted = (state & ~OPEN) < pool.helpers;
            if (!wanted)
                leave();
            return wanted;
        }
    return false;
}

/* Returns when there is another job than `seen`. */
static unsigned next_job(unsigned seen) {
    unsigned job;
    for (long until = now() + AWAKE; now() < until;)
        for (int turn = 0; turn < 16; turn++) {
            if ((job = atomic_load(&pool.job)) != seen)
                return job;
            pause_briefly();
        }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while ((job = atomic_load(&pool.job)) == seen)
        pthread_cond_wait(&pool.opened, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
    return job;
}

static void *work(void *first) {
    for (unsigned seen = (unsigned)(uintptr_t)first;; seen = next_job(seen))
        if (enter()) {
            take_chunks();
            leave();
        }
    return NULL;
}

static void wait_until_left(void) {
    for (long until = now() + PATIENT; now() < until;)
        for (int turn = 0; turn < 16; turn++) {
            if (atomic_load(&pool.state) == 0)
                return;
            pause_briefly();
        }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waiting, true);
    while (atomic_load(&pool.state) != 0)
        pthread_cond_wait(&pool.left, &pool.lock);
    atomic_store(&pool.waiting, false);
    pthread_mutex_unlock(&pool.lock);
}

/* A child has only the thread that forked: whatever others held or counted is gone. */
static void begin_anew(void) {
    pthread_mutex_init(&pool.callers, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.opened, NULL);
    pthread_cond_init(&pool.left, NULL);
    atomic_store(&pool.state, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.waiting, false);
    pool.threads = 0;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, begin_anew); }

/* As many as the system gives; signals are left to the threads of the program. */
static void start_threads(unsigned wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.threads < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)atomic_load(&pool.job)) != 0)
            break;
        pthread_detach(thread);
        pool.threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void open_job(chunk_function *function, void *argument, long chunks, unsigned helpers) {
    pool.function = function, pool.argument = argument, pool.chunks = chunks, pool.helpers = helpers;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.state, OPEN);
    atomic_fetch_add(&pool.job, 1);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.opened);
        pthread_mutex_unlock(&pool.lock);
    }
}

void pixtral_parallel_for(chunk_function *function, void *argument, long chunks, int most_threads) {
    long helpers = (most_threads < chunks ? most_threads : chunks) - 1;
    helpers = helpers < MOST_THREADS ? helpers : MOST_THREADS;
    if (helpers < 1 || pthread_mutex_trylock(&pool.callers) != 0) {
        for (long chunk = 0; chunk < chunks; chunk++)
            function(argument, chunk);
        return;
    }
    if (pool.threads < (unsigned)helpers)
        start_threads((unsigned)helpers);
    open_job(function, argument, chunks, (unsigned)helpers);
    take_chunks();
    atomic_fetch_and(&pool.state, ~OPEN);
    wait_until_left();
    pthread_mutex_unlock(&pool.callers);
}
