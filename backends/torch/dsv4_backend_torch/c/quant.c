/* Quantisation and dequantisation of a few rows, and the Hadamard rotation before it. */
#include "formats.h"

static int64_t work(const arg *a, int64_t threads) {
    (void)threads;
    return a[3].i * a[4].i;
}

/* (x, y, type, rows, dim, channels, block, is_e4m3): the first channels of x to y in E4M3 (or E2M1) and back, in blocks; the others as they
 * are; x, y [rows, dim]. What is not finite is not for it: y is then unfinished. */
static void qdq(const arg *a, const team *t) {
    int64_t type = a[2].i, dim = a[4].i, channels = a[5].i, block = a[6].i, bytes = dim * size_of(type);
    const char *x = a[0].p;
    char *y = a[1].p;
    format f = a[7].i ? E4M3 : E2M1;
    float values[block + LANES];
    memset(values, 0, sizeof values); /* a block of half a register is filled up with zeros */
    for (int64_t r = first_of(a[3].i, t); r < last_of(a[3].i, t); r++) {
        memcpy(y + r * bytes, x + r * bytes, bytes);
        for (int64_t begin = r * dim; begin < r * dim + channels; begin += block) {
            FOR_TYPE(type, for (int64_t j = 0; j < block; j++) values[j] = get(x, T, begin + j);)
            if (!quantise(values, (block + LANES - 1) / LANES * LANES, f)) {
                fail(NOT_MINE);
                return;
            }
            put_many(y, type, begin, values, block);
        }
    }
}

/* (x, y, type, rows, dim): y = x H dim^-0.5, rounded once, dim a power of two, H Sylvester's. */
static void rotate(const arg *a, const team *t) {
    int64_t type = a[2].i, dim = a[4].i;
    float values[dim], factor = (float)(1 / sqrt((double)dim));
    for (int64_t r = first_of(a[3].i, t); r < last_of(a[3].i, t); r++) {
        FOR_TYPE(type, for (int64_t j = 0; j < dim; j++) values[j] = get(a[0].p, T, r * dim + j);)
        for (int64_t half = 1; half < dim; half *= 2)
            for (int64_t begin = 0; begin < dim; begin += 2 * half)
                for (int64_t j = begin; j < begin + half; j++) {
                    float low = values[j], high = values[j + half];
                    values[j] = low + high;
                    values[j + half] = low - high;
                }
        FOR_TYPE(type, for (int64_t j = 0; j < dim; j++) put(a[1].p, T, r * dim + j, values[j] * factor);)
    }
}

const entry act_qdq = {"act_qdq", qdq, no_bytes, work};
const entry hadamard = {"hadamard", rotate, no_bytes, work};
