/* Routing. */
#include "products.h"

typedef struct {
    const char *x; /* [rows, dim] */
    int64_t type;
    const weight *w;      /* [experts, dim] */
    const float *bias;    /* [experts]; NULL: the experts that the table gives for ids */
    const int64_t *table; /* [vocab, topk] */
    const int32_t *ids;   /* [rows] */
    int32_t *indices;     /* [rows, topk] */
    float *shares;        /* [rows, topk] */
    int64_t rows, experts, dim, topk, vocab;
    float route_scale;
} router;

static router read_router(const arg *a) {
    return (router){a[0].p, a[1].i, a[2].p, a[3].p,  a[4].p,  a[5].p,  a[6].p,
                    a[7].p, a[8].i, a[9].i, a[10].i, a[11].i, a[12].i, (float)a[13].d};
}

static product products_of(const router *r, float *scores) {
    return (product){*r->w, r->x, (char *)scores, 0, r->type, FLOAT32, r->experts, r->dim, r->rows, r->dim, r->experts};
}

static int64_t bytes(const arg *a, int64_t threads) {
    router r = read_router(a);
    product all = products_of(&r, NULL);
    return r.rows * r.experts * (int64_t)sizeof(float) + 64 + products_bytes(&all, 1, threads);
}

static int64_t work(const arg *a, int64_t threads) {
    (void)threads;
    return a[9].i * a[10].i * (a[8].i > ALIKE ? a[8].i / ALIKE : 1);
}

/* The topk largest of scores + bias, of equals the lower one. */
static void choose_best(const router *r, const float *scores, int32_t *indices) {
    for (int64_t k = 0; k < r->topk; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < r->experts; e++) {
            int taken = 0;
            for (int64_t before = 0; before < k; before++) taken |= indices[before] == e;
            if (!taken && (best < 0 || scores[e] + r->bias[e] > scores[best] + r->bias[best])) best = e;
        }
        indices[k] = (int32_t)best;
    }
}

/* scores = sqrt(softplus(weight x)); shares: those of the chosen over their sum, times route_scale. NaN is not for it, nor is an id
 * without a line in the table. */
static void run(const arg *a, const team *t) {
    router r = read_router(a);
    float *scores = (float *)t->scratch;
    product all = products_of(&r, scores);
    multiply(&all, 1, t->scratch + r.rows * r.experts * sizeof(float), t);
    meet(t);
    for (int64_t k = t->own; k < r.rows; k += t->threads) {
        int32_t *indices = r.indices + k * r.topk;
        float *shares = r.shares + k * r.topk, *own = scores + k * r.experts, sum = 0;
        for (int64_t e = 0; e < r.experts; e++) {
            own[e] = (float)sqrt(own[e] > 40 ? own[e] : log1p(exp(own[e])));
            if (isnan(own[e] + (r.bias ? r.bias[e] : 0))) fail(NOT_MINE);
        }
        if (r.bias)
            choose_best(&r, own, indices);
        else
            for (int64_t j = 0; j < r.topk; j++) {
                int64_t id = r.ids[k], e = id < 0 || id >= r.vocab ? -1 : r.table[id * r.topk + j];
                indices[j] = e < 0 || e >= r.experts ? -1 : (int32_t)e;
            }
        for (int64_t j = 0; j < r.topk; j++) {
            if (indices[j] < 0)
                fail(NOT_MINE);
            else
                sum += shares[j] = own[indices[j]];
        }
        for (int64_t j = 0; j < r.topk; j++) shares[j] *= r.route_scale / sum;
    }
}

const entry gate = {"gate", run, bytes, work};
