/* The pool: threads that wait a short while for work in a loop, then sleep. A thread that waits without end takes a core from whoever
 * else needs it, and on a busy machine from those that it waits for. */
#include "team.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { SPINS = 4000, MOST = 255, JOB = MOST + 1 }; /* turns of some 40 cycles: 50 us; threads */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static atomic_uint jobs, rounds, arrived, sleeping; /* jobs: how many, and in the last bits for how many threads */
static atomic_int status, stop; /* stop: what status was when all last met */
static atomic_llong taken;      /* things handed out since then */
static int64_t started = 1, members;
static char *scratch;
static int64_t scratch_bytes;

typedef struct {
    const entry *e;
    const arg *a;
} line;

static const line *tape;
static int64_t tape_length, alone_up_to; /* values of a kernel that one thread runs */

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) { /* us */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Until a counter is no longer what it was; says for how many us the thread slept. */
static int64_t wait_for(atomic_uint *counter, unsigned was) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(counter, memory_order_acquire) != was) return 0;
        relax();
    }
    int64_t since = now();
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    while (atomic_load(counter) == was) pthread_cond_wait(&changed, &lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
    return now() - since;
}

/* Where others want the cores too, a thread that lost its own holds up the rest for thousands of microseconds. Who waits long for one that
 * has little to do has met that: for a while one thread then does alone what is brief, and each time that it is met again, twice as long. */
enum { LONG = 1000 };                              /* us: slow memory keeps a thread for half of that, who has no core waits longer */
enum { LEAST_WHILE = 20000, MOST_WHILE = 640000 }; /* us */
static atomic_int held_up;                         /* whether a thread slept for that reason, on this tape */
static _Thread_local int brief;                    /* whether what this thread waits for is */
static int64_t crowded_until, last_while;          /* us */

static void set(atomic_uint *counter, unsigned value) {
    atomic_store(counter, value);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
}

void fail(int why) {
    int was = atomic_load(&status);
    while (was < why && !atomic_compare_exchange_weak(&status, &was, why)) {
    }
}

int64_t take(const team *t) {
    (void)t;
    return atomic_fetch_add(&taken, 1);
}

void meet(const team *t) {
    if (t->threads == 1) {
        atomic_store(&taken, 0);
        return;
    }
    unsigned round = atomic_load(&rounds);
    if (atomic_fetch_add(&arrived, 1) + 1 == (unsigned)t->threads) {
        atomic_store(&arrived, 0), atomic_store(&taken, 0);
        atomic_store(&stop, atomic_load(&status));
        set(&rounds, round + 1);
    } else {
        if (wait_for(&rounds, round) > LONG && brief) atomic_store(&held_up, 1);
    }
}

/* Every thread goes through the tape. Where a kernel is for one thread, the first runs it with a team of its own. */
static void go_through(int64_t own) {
    const team all = {own, members, scratch}, one = {0, 1, scratch};
    int alone = 1;
    for (int64_t i = 0; i < tape_length; i++) {
        const line *l = tape + i;
        int64_t work = members == 1 ? 0 : l->e->work(l->a, members);
        int few = work <= alone_up_to;
        if (few && alone) {
            if (own == 0) meet(&one);
        } else {
            meet(&all);
            if (atomic_load(&stop)) return;
        }
        if (own == 0 && few && alone && atomic_load(&status)) continue; /* the others find out when they meet */
        brief = !few && work <= BRIEF;
        if (!few)
            l->e->run(l->a, &all);
        else if (own == 0)
            l->e->run(l->a, &one);
        alone = few;
    }
    if (members > 1) meet(&all);
}

static unsigned before; /* the job before the one that new threads are for */

static void *member(void *number) {
    int64_t own = (int64_t)number;
    unsigned seen = before;
    for (;;) {
        wait_for(&jobs, seen);
        seen = atomic_load(&jobs);
        if (own < seen % JOB) go_through(own);
    }
    return NULL;
}

static void forget(void) { /* in a child process there are no threads, nor is anything under way */
    static const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t quiet = PTHREAD_COND_INITIALIZER;
    in_use = lock = fresh;
    changed = quiet;
    started = 1;
    atomic_store(&jobs, 0), atomic_store(&arrived, 0), atomic_store(&sleeping, 0);
}

static void start(int64_t threads) {
    static int told;
    if (!told) told = !pthread_atfork(NULL, NULL, forget);
    before = atomic_load(&jobs);
    while (started < threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, member, (void *)started)) break;
        pthread_detach(thread);
        started++;
    }
}

/* Run lines one after another on so many threads; what they say at worst. */
CALLED_FROM_OUTSIDE int run_tape(const line *lines, int64_t count, int64_t threads) {
    int64_t bytes = 0;
    pthread_mutex_lock(&in_use);
    for (int64_t i = 0; i < count; i++) {
        int64_t more = lines[i].e->bytes(lines[i].a, threads);
        bytes = more > bytes ? more : bytes;
    }
    if (bytes > scratch_bytes) {
        free(scratch);
        scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        scratch_bytes = scratch ? bytes : 0;
    }
    int said = NO_MEMORY;
    if (scratch || !bytes) {
        atomic_store(&status, DONE), atomic_store(&stop, DONE);
        tape = lines, tape_length = count;
        threads = threads > MOST ? MOST : threads;
        if (threads > started) start(threads);
        members = threads < started ? threads : started;
        int64_t time = members > 1 ? now() : 0, most = 0;
        int crowded = time < crowded_until;
        alone_up_to = crowded ? BRIEF : ALONE;
        for (int64_t i = 0; members > 1 && i < count && most <= alone_up_to; i++) {
            int64_t work = lines[i].e->work(lines[i].a, members);
            most = work > most ? work : most;
        }
        if (most <= alone_up_to) members = 1;
        atomic_store(&held_up, 0);
        if (members > 1) set(&jobs, (atomic_load(&jobs) / JOB + 1) * JOB + (unsigned)members);
        go_through(0);
        said = atomic_load(&status);
        if (members > 1 && !crowded) {
            last_while = !atomic_load(&held_up) ? last_while / 2 : last_while < LEAST_WHILE ? LEAST_WHILE : last_while < MOST_WHILE ? 2 * last_while : MOST_WHILE;
            if (atomic_load(&held_up)) crowded_until = now() + last_while;
        }
    }
    pthread_mutex_unlock(&in_use);
    return said;
}

CALLED_FROM_OUTSIDE int run_kernel(const entry *e, const arg *a, int64_t threads) {
    const line one = {e, a};
    return run_tape(&one, 1, threads);
}
