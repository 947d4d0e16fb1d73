/* RoPE of a few tokens. */
#include "values.h"

/* (positions, freqs, turn, tokens, half): turn [tokens, half, 2], cosine and sine of the float32 product of position and frequency. */
static void angles(const arg *a, const team *t) {
    const int32_t *positions = a[0].p;
    const float *freqs = a[1].p;
    float *turn = a[2].p;
    int64_t half = a[4].i;
    for (int64_t k = first_of(a[3].i * half, t); k < last_of(a[3].i * half, t); k++) {
        double angle = (float)positions[k / half] * freqs[k % half];
        turn[2 * k] = (float)cos(angle);
        turn[2 * k + 1] = (float)sin(angle);
    }
}

static int64_t angles_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[3].i * a[4].i;
}

/* (x, y, type, turn, tokens, heads, dim, half, inverse): x, y [tokens, heads, dim]; the last 2 * half channels are turned, in pairs. */
static void apply(const arg *a, const team *t) {
    int64_t type = a[2].i, heads = a[5].i, dim = a[6].i, half = a[7].i, rows = a[4].i * heads, bytes = size_of(type);
    float sign = a[8].i ? -1 : 1;
    const void *x = a[0].p;
    void *y = a[1].p;
    for (int64_t r = first_of(rows, t); r < last_of(rows, t); r++) {
        const float *turn = (const float *)a[3].p + r / heads * 2 * half;
        int64_t at = r * dim;
        memcpy((char *)y + at * bytes, (const char *)x + at * bytes, (dim - 2 * half) * bytes);
        at += dim - 2 * half;
        FOR_TYPE(type, for (int64_t i = 0; i < half; i++) {
            float u = get(x, T, at + 2 * i), v = get(x, T, at + 2 * i + 1), cosine = turn[2 * i], sine = sign * turn[2 * i + 1];
            put(y, T, at + 2 * i, u * cosine - v * sine);
            put(y, T, at + 2 * i + 1, u * sine + v * cosine);
        })
    }
}

static int64_t apply_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[4].i * a[5].i * a[6].i;
}

const entry rotation = {"rotation", angles, no_bytes, angles_work};
const entry apply_rope = {"apply_rope", apply, no_bytes, apply_work};
