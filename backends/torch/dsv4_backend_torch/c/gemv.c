/* A few rows times weights as they lie in memory: a decode step's products, which take as long as it takes to read the weights.
 *
 * y[t][i] = sum_j weight[i][j] * x[t][j], products and sums in float32, y rounded once. A row's sum is formed by one thread and in
 * one order, so that neither the number of threads nor that of rows shows in the bits.
 */
#include "weights.h"

/* One product with out rows of a weight from ``first`` on: x [tokens, cols], y [tokens, out], tokens a stride of elements apart. */
typedef struct {
    weight w;
    const char *x;
    char *y;
    int64_t first, x_type, y_type, out, cols, tokens, x_stride, y_stride;
} product;

static int64_t most(const arg *a) { /* floats of one product's rows */
    const product *p = a[0].p;
    int64_t floats = 0;
    for (int64_t n = 0; n < a[1].i; n++)
        if (p[n].tokens * room(p[n].cols) > floats) floats = p[n].tokens * room(p[n].cols);
    return floats;
}

static int64_t bytes(const arg *a, int64_t threads) { return most(a) * threads * (int64_t)sizeof(float); }

static int64_t work(const arg *a, int64_t threads) {
    const product *p = a[0].p;
    int64_t values = 0;
    (void)threads;
    for (int64_t n = 0; n < a[1].i; n++) values += p[n].out * p[n].cols;
    return values;
}

/* (products, how many). Every thread takes its share of each product's rows. */
static void run(const arg *a, const team *t) {
    float *x = (float *)t->scratch + most(a) * t->own;
    for (const product *p = a[0].p, *end = p + a[1].i; p < end; p++) {
        int64_t step = p->x_stride * size_of(p->x_type), stride = room(p->cols);
        const float *vectors[FEW];
        for (int64_t k = 0; k < p->tokens; k++) {
            spread(p->x + k * step, p->x_type, p->w.type, p->cols, x + k * stride);
            vectors[k] = x + k * stride;
        }
        for (int64_t i = first_of(p->out, t); i < last_of(p->out, t); i++) {
            float sums[FEW];
            dots(&p->w, p->first + i, p->cols, vectors, p->x_type, p->tokens, sums);
            for (int64_t k = 0; k < p->tokens; k++) put(p->y, p->y_type, k * p->y_stride + i, sums[k]);
        }
    }
}

const entry gemv = {"gemv", run, bytes, work};
