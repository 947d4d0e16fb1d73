/* Embedding rows. */
#include "values.h"

/* (ids, weight, weight_type, vocab, dim, y, type, tokens): y [tokens, dim]; zeros for an id outside the vocabulary. */
static void run(const arg *a, const team *t) {
    const int32_t *ids = a[0].p;
    int64_t dim = a[4].i;
    for (int64_t k = first_of(a[7].i, t); k < last_of(a[7].i, t); k++) {
        int outside = ids[k] < 0 || ids[k] >= a[3].i;
        for (int64_t j = 0; j < dim; j++) put(a[5].p, a[6].i, k * dim + j, outside ? 0 : get(a[1].p, a[2].i, ids[k] * dim + j));
    }
}

static int64_t work(const arg *a, int64_t threads) {
    (void)threads;
    return a[7].i * a[4].i;
}

const entry embedding = {"embedding", run, no_bytes, work};
