/* Threads that go through a tape of kernels together, and what a kernel gets: its arguments and its team. */
#pragma once
#include <stdint.h>

/* What Python finds in the library; all else is hidden (-fvisibility=hidden), or a name of ours that another library of the
   process has too, such as zlib's compress, would lead there. */
#define CALLED_FROM_OUTSIDE __attribute__((visibility("default")))

enum { DONE, NOT_MINE, NO_MEMORY }; /* what a kernel says: done, not for these operands, no memory */
enum { ALONE = 32768 };             /* values that one thread reads before another one has come to help */
enum { BRIEF = 1 << 21 };           /* values that are read in far less time than a thread gets at once: some 100 us */

typedef union {
    void *p;
    int64_t i;
    double d;
} arg;

/* One of ``threads`` threads, ``own`` counted from 0, that run the same kernel; ``scratch``: as many bytes as it needs, everyone's. */
typedef struct {
    int64_t own, threads;
    char *scratch;
} team;

typedef void kernel(const arg *a, const team *t);
typedef int64_t need(const arg *a, int64_t threads);

/* A kernel; the bytes of scratch that it needs; and the values that it reads: up to ALONE the first thread runs it alone. */
typedef struct {
    const char *name;
    kernel *run;
    need *bytes, *work;
} entry;

void meet(const team *t);    /* until all have come */
int64_t take(const team *t); /* the next of the things that are handed out, counted from 0 since all last met: whoever is free has it */
void fail(int status);    /* the tape ends before its next kernel */

/* This thread's of n things: begin .. end. */
static inline int64_t first_of(int64_t n, const team *t) { return n * t->own / t->threads; }
static inline int64_t last_of(int64_t n, const team *t) { return n * (t->own + 1) / t->threads; }

static inline int64_t no_bytes(const arg *a, int64_t threads) {
    (void)a, (void)threads;
    return 0;
}
