/* RMS norm of a few rows. */
#include "values.h"

static int64_t work(const arg *a, int64_t threads) {
    (void)threads;
    return a[5].i * a[6].i;
}

/* (x, y, type, weight, weight_type, rows, dim, eps): y = x / sqrt(mean(x^2) + eps) * weight, rounded once; x, y [rows, dim]; weight [dim]
 * or NULL. */
static void run(const arg *a, const team *t) {
    int64_t type = a[2].i, weight_type = a[4].i, dim = a[6].i, bytes = dim * size_of(type);
    const void *weight = a[3].p;
    for (int64_t r = first_of(a[5].i, t); r < last_of(a[5].i, t); r++) {
        const char *x = (const char *)a[0].p + r * bytes;
        char *y = (char *)a[1].p + r * bytes;
        float parts[LANES] = {0}, square = 0;
        FOR_TYPE(type,
            for (int64_t j = 0; j + LANES <= dim; j += LANES)
                for (int l = 0; l < LANES; l++) parts[l] += get(x, T, j + l) * get(x, T, j + l);
            for (int64_t j = dim / LANES * LANES; j < dim; j++) square += get(x, T, j) * get(x, T, j);
        )
        for (int l = 0; l < LANES; l++) square += parts[l];
        float scale = (float)(1 / sqrt((double)square / dim + a[7].d));
        FOR_TYPE(type,
            if (weight)
                for (int64_t j = 0; j < dim; j++) put(y, T, j, get(x, T, j) * scale * get(weight, weight_type, j));
            else
                for (int64_t j = 0; j < dim; j++) put(y, T, j, get(x, T, j) * scale);
        )
    }
}

const entry rms_norm = {"rms_norm", run, no_bytes, work};
