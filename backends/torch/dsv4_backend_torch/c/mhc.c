/* Hyper-connections with four streams. */
#include "weights.h"

enum { HC = 4, MIXES = HC * (HC + 2), PRODUCTS = MIXES + 1 };

static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

typedef double doubles __attribute__((vector_size(BYTES)));
enum { TOGETHER = BYTES / 8 }; /* tokens that go through Sinkhorn's iterations together, each in a lane */

/* Row softmax plus eps, of exponentials; then columns, and iters - 1 times rows and columns, divided by their sums plus eps. */
static void sinkhorn(doubles comb[HC][HC], double eps, int64_t iters) {
    for (int i = 0; i < HC; i++) {
        doubles sum = comb[i][0] + comb[i][1] + comb[i][2] + comb[i][3];
        for (int j = 0; j < HC; j++) comb[i][j] = comb[i][j] / sum + eps;
    }
    for (int64_t half = 1; half < 2 * iters; half++)
        for (int i = 0; i < HC; i++) {
            doubles sum = (doubles){0} + eps;
            for (int j = 0; j < HC; j++) sum += half % 2 ? comb[j][i] : comb[i][j];
            doubles share = 1 / sum;
            for (int j = 0; j < HC; j++) *(half % 2 ? &comb[j][i] : &comb[i][j]) *= share;
        }
}

/* comb [count, 4, 4] of count <= TOGETHER tokens' mixes, MIXES apart; those for comb are the last. */
static void combine(const double *mixed, int64_t count, double eps, int64_t iters, float *comb) {
    doubles all[HC][HC] = {{{0}}};
    for (int64_t k = 0; k < count; k++)
        for (int i = 0; i < HC; i++) {
            const double *row = mixed + k * MIXES + 2 * HC + i * HC;
            double top = row[0];
            for (int j = 1; j < HC; j++) top = row[j] > top ? row[j] : top;
            for (int j = 0; j < HC; j++) all[i][j][k] = exp(row[j] - top);
        }
    sinkhorn(all, eps, iters);
    for (int64_t k = 0; k < count; k++)
        for (int i = 0; i < HC * HC; i++) comb[k * HC * HC + i] = (float)all[i / HC][i % HC][k];
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

/* Floats of a block of ALIKE tokens that one thread has: streams, a row of products for each. */
static int64_t block_floats(int64_t dim) { return ALIKE * ((HC + 1) * dim + PRODUCTS + 16); }

/* A block of tokens' streams, widened, and their products with the rows of fn and with themselves, as ``mix`` forms them. */
static void mix_block(const void *h, int64_t type, const float *fn, int64_t mixes, int64_t first, int64_t count, int64_t dim, float *x,
                      float *products) {
    const float *rows[ALIKE];
    const weight w = {(const char *)fn, NULL, FLOAT32};
    FOR_TYPE(type, for (int64_t j = 0; j < count * HC * dim; j++) x[j] = get(h, T, first * HC * dim + j);)
    for (int64_t k = 0; k < count; k++) rows[k] = x + k * HC * dim;
    for (int64_t i = 0; i < mixes; i++) {
        float sums[ALIKE];
        dots(&w, i, HC * dim, rows, FLOAT32, count, sums);
        for (int64_t k = 0; k < count; k++) products[k * PRODUCTS + i] = sums[k];
    }
    for (int64_t k = 0; k < count; k++) products[k * PRODUCTS + mixes] = dot_float32(rows[k], rows[k], HC * dim);
}

static int64_t pre_bytes(const arg *a, int64_t threads) {
    if (a[10].i > ALIKE) return threads * block_floats(a[11].i) * (int64_t)sizeof(float);
    return a[10].i * ((HC + 1) * a[11].i + PRODUCTS) * (int64_t)sizeof(float);
}

static int64_t pre_work(const arg *a, int64_t threads) {
    (void)threads;
    return MIXES * HC * a[10].i * a[11].i;
}

static void norm_row(const float *row, const arg *a, int64_t k, int64_t begin, int64_t end) {
    int64_t dim = a[11].i;
    const void *norm = a[5].p;
    float gain = norm ? (float)(1 / sqrt((double)dot_float32(row, row, dim) / dim + a[12].d)) : 1;
    FOR_TYPE(a[1].i, for (int64_t j = begin; j < end; j++) put(a[7].p, T, k * dim + j, norm ? row[j] * (gain * get(norm, a[6].i, j)) : row[j]);)
}

/* What a token's mixes say: weights of its streams, post. */
static void read_mixes(const arg *a, const float *products, int64_t k, double *mixed, double *weights) {
    weigh(products, MIXES, a[11].i, a[12].d, a[3].p, a[4].p, mixed);
    for (int i = 0; i < HC; i++) weights[i] = sigmoid(mixed[i]) + a[13].d;
    for (int i = 0; i < HC; i++) ((float *)a[8].p)[k * HC + i] = (float)(2 * sigmoid(mixed[HC + i]));
}

static void pre_block(const arg *a, int64_t first, int64_t count, float *x) {
    int64_t dim = a[11].i;
    const team one = {0, 1, NULL};
    float *reduced = x + ALIKE * HC * dim, *products = reduced + ALIKE * dim;
    double mixed[ALIKE][MIXES], weights[HC];
    mix_block(a[0].p, a[1].i, a[2].p, MIXES, first, count, dim, x, products);
    for (int64_t k = 0; k < count; k++) {
        read_mixes(a, products + k * PRODUCTS, first + k, mixed[k], weights);
        reduce(x + k * HC * dim, weights, dim, reduced, &one);
        norm_row(reduced, a, first + k, 0, dim);
    }
    for (int64_t k = 0; k < count; k += TOGETHER)
        combine(mixed[k], count - k < TOGETHER ? count - k : TOGETHER, a[13].d, a[14].i, (float *)a[9].p + (first + k) * HC * HC);
}

/* (h, type, fn, scale, base, norm, norm_type, y, post, comb, tokens, dim, norm_eps, eps, iters): h [tokens, 4, dim] and y [tokens, dim] in
 * type; fn [24, 4 * dim]; norm [dim] or NULL: y is normed where it is given; post [tokens, 4]; comb [tokens, 4, 4]. All threads share
 * each of a few tokens; of more, a thread takes a block. */
static void pre(const arg *a, const team *t) {
    int64_t tokens = a[10].i, dim = a[11].i;
    float *x = (float *)t->scratch, *reduced = x + tokens * HC * dim, *products = reduced + tokens * dim;
    if (tokens > ALIKE) {
        for (int64_t k = take(t) * ALIKE; k < tokens; k = take(t) * ALIKE)
            pre_block(a, k, tokens - k < ALIKE ? tokens - k : ALIKE, x + t->own * block_floats(dim));
        return;
    }
    mix(a[0].p, a[1].i, a[2].p, MIXES, tokens, dim, x, products, t);
    for (int64_t k = 0; k < tokens; k++) {
        double mixed[MIXES], weights[HC];
        read_mixes(a, products + k * PRODUCTS, k, mixed, weights);
        if (k % t->threads == t->own) combine(mixed, 1, a[13].d, a[14].i, (float *)a[9].p + k * HC * HC);
        reduce(x + k * HC * dim, weights, dim, reduced + k * dim, t);
    }
    meet(t);
    for (int64_t k = 0; k < tokens; k++) norm_row(reduced + k * dim, a, k, first_of(dim, t), last_of(dim, t));
}

static int64_t head_bytes(const arg *a, int64_t threads) {
    if (a[6].i > ALIKE) return threads * block_floats(a[7].i) * (int64_t)sizeof(float);
    return a[6].i * ((HC + 1) * a[7].i + PRODUCTS) * (int64_t)sizeof(float);
}

static int64_t head_work(const arg *a, int64_t threads) {
    (void)threads;
    return HC * HC * a[6].i * a[7].i;
}

static void head_weights(const arg *a, const float *products, double *weights) {
    weigh(products, HC, a[7].i, a[8].d, a[3].p, a[4].p, weights);
    for (int i = 0; i < HC; i++) weights[i] = sigmoid(weights[i]) + a[9].d;
}

static void head_block(const arg *a, int64_t first, int64_t count, float *x) {
    int64_t dim = a[7].i;
    const team one = {0, 1, NULL};
    float *reduced = x + ALIKE * HC * dim, *products = reduced + ALIKE * dim;
    mix_block(a[0].p, a[1].i, a[2].p, HC, first, count, dim, x, products);
    for (int64_t k = 0; k < count; k++) {
        double weights[HC];
        head_weights(a, products + k * PRODUCTS, weights);
        reduce(x + k * HC * dim, weights, dim, reduced, &one);
        put_many(a[5].p, a[1].i, (first + k) * dim, reduced, dim);
    }
}

/* (h, type, fn, scale, base, y, tokens, dim, norm_eps, eps): fn [4, 4 * dim], scale [1]. */
static void to_head(const arg *a, const team *t) {
    int64_t tokens = a[6].i, dim = a[7].i;
    float *x = (float *)t->scratch, *reduced = x + tokens * HC * dim, *products = reduced + tokens * dim;
    if (tokens > ALIKE) {
        for (int64_t k = take(t) * ALIKE; k < tokens; k = take(t) * ALIKE)
            head_block(a, k, tokens - k < ALIKE ? tokens - k : ALIKE, x + t->own * block_floats(dim));
        return;
    }
    mix(a[0].p, a[1].i, a[2].p, HC, tokens, dim, x, products, t);
    for (int64_t k = 0; k < tokens; k++) {
        double weights[HC];
        head_weights(a, products + k * PRODUCTS, weights);
        reduce(x + k * HC * dim, weights, dim, reduced + k * dim, t);
        for (int64_t j = first_of(dim, t); j < last_of(dim, t); j++) put(a[5].p, a[1].i, k * dim + j, reduced[k * dim + j]);
    }
}

static int64_t post_work(const arg *a, int64_t threads) {
    (void)threads;
    return HC * a[6].i * a[7].i;
}

/* (y, h, type, post, comb, out, tokens, dim): out[n] = post[n] * y + sum_j comb[j][n] * h[j], rounded once; h, out [tokens, 4, dim],
 * y [tokens, dim]. All threads share each of a few tokens; of more, each has its own. */
static void spread_out(const arg *a, const team *t) {
    int64_t dim = a[7].i, few = a[6].i < 2 * t->threads;
    int64_t first_token = few ? 0 : first_of(a[6].i, t), last_token = few ? a[6].i : last_of(a[6].i, t);
    int64_t begin = few ? first_of(dim, t) : 0, end = few ? last_of(dim, t) : dim;
    const void *y = a[0].p, *h = a[1].p;
    void *out = a[5].p;
    for (int64_t k = first_token; k < last_token; k++)
        for (int n = 0; n < HC; n++) {
            const float *comb = (const float *)a[4].p + k * HC * HC;
            float own = ((const float *)a[3].p)[k * HC + n], a0 = comb[n], a1 = comb[HC + n], a2 = comb[2 * HC + n], a3 = comb[3 * HC + n];
            int64_t first = k * HC * dim;
            int64_t j = begin;
            FOR_TYPE(a[2].i, for (; j + LANES <= end; j += LANES) {
                floats low = a0 * get_lanes(h, T, first + j) + a1 * get_lanes(h, T, first + dim + j);
                floats high = a2 * get_lanes(h, T, first + 2 * dim + j) + a3 * get_lanes(h, T, first + 3 * dim + j);
                put_lanes(out, T, first + n * dim + j, own * get_lanes(y, T, k * dim + j) + (low + high));
            })
            for (; j < end; j++) {
                float low = a0 * get(h, a[2].i, first + j) + a1 * get(h, a[2].i, first + dim + j);
                float high = a2 * get(h, a[2].i, first + 2 * dim + j) + a3 * get(h, a[2].i, first + 3 * dim + j);
                put(out, a[2].i, first + n * dim + j, own * get(y, a[2].i, k * dim + j) + (low + high));
            }
        }
}

const entry hc_pre = {"hc_pre", pre, pre_bytes, pre_work};
const entry hc_head = {"hc_head", to_head, head_bytes, head_work};
const entry hc_post = {"hc_post", spread_out, no_bytes, post_work};
