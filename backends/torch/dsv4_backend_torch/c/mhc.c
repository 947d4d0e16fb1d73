/* Hyper-connections of a few tokens with four streams. */
#include "weights.h"

enum { HC = 4, MIXES = HC * (HC + 2), PRODUCTS = MIXES + 1 };

static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

/* Row softmax plus eps; then columns, and iters - 1 times rows and columns, divided by their sums plus eps. */
static void sinkhorn(double comb[HC][HC], double eps, int64_t iters) {
    for (int i = 0; i < HC; i++) {
        double top = comb[i][0], sum = 0;
        for (int j = 1; j < HC; j++) top = comb[i][j] > top ? comb[i][j] : top;
        for (int j = 0; j < HC; j++) sum += comb[i][j] = exp(comb[i][j] - top);
        for (int j = 0; j < HC; j++) comb[i][j] = comb[i][j] / sum + eps;
    }
    for (int64_t half = 1; half < 2 * iters; half++)
        for (int i = 0; i < HC; i++) {
            double sum = eps;
            for (int j = 0; j < HC; j++) sum += half % 2 ? comb[j][i] : comb[i][j];
            for (int j = 0; j < HC; j++) *(half % 2 ? &comb[j][i] : &comb[i][j]) /= sum;
        }
}

/* A token's weights of its streams: sigmoid of the mixes that are for them. */
static void weigh(const float *products, int64_t mixes, int64_t dim, double norm_eps, const float *scale, const float *base, double *mixed) {
    double root = sqrt((double)products[mixes] / (HC * dim) + norm_eps);
    for (int i = 0; i < mixes; i++) mixed[i] = products[i] / root * scale[i < 2 * HC ? i / HC : 2] + base[i];
}

/* Products of tokens' streams with rows of fn and with themselves, all threads together; x [tokens, 4 * dim], products [tokens, 25]. */
static void mix(const void *h, int64_t type, const float *fn, int64_t mixes, int64_t tokens, int64_t dim, float *x, float *products,
                const team *t) {
    FOR_TYPE(type, for (int64_t j = first_of(tokens * HC * dim, t); j < last_of(tokens * HC * dim, t); j++) x[j] = get(h, T, j);)
    meet(t);
    for (int64_t n = t->own; n < tokens * (mixes + 1); n += t->threads) {
        int64_t i = n % (mixes + 1);
        const float *own = x + n / (mixes + 1) * HC * dim;
        products[n / (mixes + 1) * PRODUCTS + i] = dot_float32(i < mixes ? fn + i * HC * dim : own, own, HC * dim);
    }
    meet(t);
}

static void reduce(const float *x, const double *pre, int64_t dim, float *to, const team *t) {
    float a = (float)pre[0], b = (float)pre[1], c = (float)pre[2], d = (float)pre[3];
    for (int64_t j = first_of(dim, t); j < last_of(dim, t); j++) to[j] = a * x[j] + b * x[dim + j] + c * x[2 * dim + j] + d * x[3 * dim + j];
}

static int64_t pre_bytes(const arg *a, int64_t threads) {
    (void)threads;
    return a[10].i * ((HC + 1) * a[11].i + PRODUCTS) * (int64_t)sizeof(float);
}

static int64_t pre_work(const arg *a, int64_t threads) {
    (void)threads;
    return MIXES * HC * a[10].i * a[11].i;
}

/* (h, type, fn, scale, base, norm, norm_type, y, post, comb, tokens, dim, norm_eps, eps, iters): h [tokens, 4, dim] and y [tokens, dim] in
 * type; fn [24, 4 * dim]; norm [dim] or NULL: y is normed where it is given; post [tokens, 4]; comb [tokens, 4, 4]. */
static void pre(const arg *a, const team *t) {
    int64_t type = a[1].i, tokens = a[10].i, dim = a[11].i;
    const void *norm = a[5].p;
    float *x = (float *)t->scratch, *reduced = x + tokens * HC * dim, *products = reduced + tokens * dim;
    mix(a[0].p, type, a[2].p, MIXES, tokens, dim, x, products, t);
    for (int64_t k = 0; k < tokens; k++) {
        double mixed[MIXES], weights[HC];
        weigh(products + k * PRODUCTS, MIXES, dim, a[12].d, a[3].p, a[4].p, mixed);
        for (int i = 0; i < HC; i++) weights[i] = sigmoid(mixed[i]) + a[13].d;
        if (k % t->threads == t->own) {
            float *post = (float *)a[8].p + k * HC, *comb = (float *)a[9].p + k * HC * HC;
            for (int i = 0; i < HC; i++) post[i] = (float)(2 * sigmoid(mixed[HC + i]));
            sinkhorn((double(*)[HC])(mixed + 2 * HC), a[13].d, a[14].i);
            for (int i = 0; i < HC * HC; i++) comb[i] = (float)mixed[2 * HC + i];
        }
        reduce(x + k * HC * dim, weights, dim, reduced + k * dim, t);
    }
    meet(t);
    for (int64_t k = 0; k < tokens; k++) {
        const float *row = reduced + k * dim;
        float gain = norm ? (float)(1 / sqrt((double)dot_float32(row, row, dim) / dim + a[12].d)) : 1;
        FOR_TYPE(type, for (int64_t j = first_of(dim, t); j < last_of(dim, t); j++)
            put(a[7].p, T, k * dim + j, norm ? row[j] * (gain * get(norm, a[6].i, j)) : row[j]);)
    }
}

static int64_t head_bytes(const arg *a, int64_t threads) {
    (void)threads;
    return a[6].i * ((HC + 1) * a[7].i + PRODUCTS) * (int64_t)sizeof(float);
}

static int64_t head_work(const arg *a, int64_t threads) {
    (void)threads;
    return HC * HC * a[6].i * a[7].i;
}

/* (h, type, fn, scale, base, y, tokens, dim, norm_eps, eps): fn [4, 4 * dim], scale [1]. */
static void to_head(const arg *a, const team *t) {
    int64_t tokens = a[6].i, dim = a[7].i;
    float *x = (float *)t->scratch, *reduced = x + tokens * HC * dim, *products = reduced + tokens * dim;
    mix(a[0].p, a[1].i, a[2].p, HC, tokens, dim, x, products, t);
    for (int64_t k = 0; k < tokens; k++) {
        double mixed[HC];
        weigh(products + k * PRODUCTS, HC, dim, a[8].d, a[3].p, a[4].p, mixed);
        for (int i = 0; i < HC; i++) mixed[i] = sigmoid(mixed[i]) + a[9].d;
        reduce(x + k * HC * dim, mixed, dim, reduced + k * dim, t);
        for (int64_t j = first_of(dim, t); j < last_of(dim, t); j++) put(a[5].p, a[1].i, k * dim + j, reduced[k * dim + j]);
    }
}

static int64_t post_work(const arg *a, int64_t threads) {
    (void)threads;
    return HC * a[6].i * a[7].i;
}

/* (y, h, type, post, comb, out, tokens, dim): out[n] = post[n] * y + sum_j comb[j][n] * h[j], rounded once; h, out [tokens, 4, dim],
 * y [tokens, dim]. */
static void spread_out(const arg *a, const team *t) {
    int64_t dim = a[7].i;
    const void *y = a[0].p, *h = a[1].p;
    void *out = a[5].p;
    for (int64_t k = 0; k < a[6].i; k++)
        for (int n = 0; n < HC; n++) {
            const float *comb = (const float *)a[4].p + k * HC * HC;
            float own = ((const float *)a[3].p)[k * HC + n], a0 = comb[n], a1 = comb[HC + n], a2 = comb[2 * HC + n], a3 = comb[3 * HC + n];
            int64_t first = k * HC * dim;
            FOR_TYPE(a[2].i, for (int64_t j = first_of(dim, t); j < last_of(dim, t); j++) {
                float low = a0 * get(h, T, first + j) + a1 * get(h, T, first + dim + j);
                float high = a2 * get(h, T, first + 2 * dim + j) + a3 * get(h, T, first + 3 * dim + j);
                put(out, T, first + n * dim + j, own * get(y, T, k * dim + j) + (low + high));
            })
        }
}

const entry hc_pre = {"hc_pre", pre, pre_bytes, pre_work};
const entry hc_head = {"hc_head", to_head, head_bytes, head_work};
const entry hc_post = {"hc_post", spread_out, no_bytes, post_work};
