/* Hyper-connections of a few tokens with four streams. */
#include "weights.h"

enum { HC = 4, MIXES = HC * (HC + 2) };

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

/* h [tokens, 4, dim] and y [tokens, dim] in type; fn [24, 4 * dim]; norm [dim] or NULL: y is normed where it is given; post [tokens, 4];
 * comb [tokens, 4, 4]. */
int hc_pre(const char *h, int64_t type, const float *fn, const float *scale, const float *base, const void *norm, int64_t norm_type,
           char *y, float *post, float *comb, int64_t tokens, int64_t dim, double norm_eps, double eps, int64_t iters) {
    float *x = malloc((HC + 1) * dim * sizeof(float) + 1), *reduced = x + HC * dim;
    if (!x) return NO_MEMORY;
    for (int64_t t = 0; t < tokens; t++) {
        float products[MIXES + 1];
        spread(h + t * HC * dim * size_of(type), type, FLOAT32, HC * dim, x);
#pragma omp parallel for schedule(static) if (MIXES * HC * dim > ALONE)
        for (int i = 0; i <= MIXES; i++) products[i] = dot_float32(i < MIXES ? fn + i * HC * dim : x, x, HC * dim);
        double mixes[MIXES], pre[HC], root = sqrt((double)products[MIXES] / (HC * dim) + norm_eps);
        for (int i = 0; i < MIXES; i++) mixes[i] = products[i] / root * scale[i < 2 * HC ? i / HC : 2] + base[i];
        for (int i = 0; i < HC; i++) {
            pre[i] = sigmoid(mixes[i]) + eps;
            post[t * HC + i] = (float)(2 * sigmoid(mixes[HC + i]));
        }
        sinkhorn((double(*)[HC])(mixes + 2 * HC), eps, iters);
        for (int i = 0; i < HC * HC; i++) comb[t * HC * HC + i] = (float)mixes[2 * HC + i];
        float a = (float)pre[0], b = (float)pre[1], c = (float)pre[2], d = (float)pre[3];
        for (int64_t j = 0; j < dim; j++) reduced[j] = a * x[j] + b * x[dim + j] + c * x[2 * dim + j] + d * x[3 * dim + j];
        if (norm) {
            float gain = (float)(1 / sqrt((double)dot_float32(reduced, reduced, dim) / dim + norm_eps));
            for (int64_t j = 0; j < dim; j++) reduced[j] *= gain * get(norm, norm_type, j);
        }
        FOR_TYPE(type, for (int64_t j = 0; j < dim; j++) put(y, T, t * dim + j, reduced[j]);)
    }
    free(x);
    return DONE;
}

/* out[n] = post[n] * y + sum_j comb[j][n] * h[j], rounded once; h, out [tokens, 4, dim], y [tokens, dim], all in type. */
int hc_post(const void *y, const void *h, int64_t type, const float *post, const float *comb, void *out, int64_t tokens, int64_t dim) {
    for (int64_t t = 0; t < tokens; t++, post += HC, comb += HC * HC)
        for (int n = 0; n < HC; n++) {
            float own = post[n], a = comb[n], b = comb[HC + n], c = comb[2 * HC + n], d = comb[3 * HC + n];
            int64_t first = t * HC * dim;
            FOR_TYPE(type, for (int64_t j = 0; j < dim; j++) {
                float low = a * get(h, T, first + j) + b * get(h, T, first + dim + j);
                float high = c * get(h, T, first + 2 * dim + j) + d * get(h, T, first + 3 * dim + j);
                put(out, T, first + n * dim + j, own * get(y, T, t * dim + j) + (low + high));
            })
        }
    return DONE;
}
