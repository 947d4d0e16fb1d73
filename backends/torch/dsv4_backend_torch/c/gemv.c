/* A few rows times weights as they lie in memory: a decode step's products, which take as long as it takes to read the weights.
 *
 * y[t][i] = sum_j weight[i][j] * x[t][j], products and sums in float32, y rounded once. A row's sum is formed by one thread and in
 * one order, so that neither the number of threads nor that of rows shows in the bits.
 */
#include "weights.h"

/* One product: x [tokens, cols], contiguous; y [tokens, out], tokens a stride of elements apart. */
typedef struct {
    weight w;
    const char *x;
    char *y;
    int64_t x_type, y_type, out, cols, tokens, y_stride;
} product;

static void rows(const product *p, int64_t begin, int64_t end, float *x) {
    int64_t bytes = p->cols * size_of(p->x_type), stride = p->cols + SLACK;
    for (int64_t t = 0; t < p->tokens; t++) spread(p->x + t * bytes, p->x_type, p->w.type, p->cols, x + t * stride);
    for (int64_t i = begin; i < end; i++)
        for (int64_t t = 0; t < p->tokens; t++) put(p->y, p->y_type, t * p->y_stride + i, dot(&p->w, i, p->cols, x + t * stride));
}

/* Every thread takes its share of each product's rows. */
int gemv(const product *products, int64_t count) {
    int64_t most = 1, size = 0;
    int status = DONE;
    for (int64_t n = 0; n < count; n++) {
        const product *p = products + n;
        if (p->tokens * (p->cols + SLACK) > most) most = p->tokens * (p->cols + SLACK);
        size += p->out * p->cols;
    }
#pragma omp parallel reduction(max : status) if (size > ALONE)
    {
        int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
        float *x = malloc(most * sizeof(float));
        if (!x) status = NO_MEMORY;
        for (int64_t n = 0; n < count && x; n++) {
            int64_t out = products[n].out;
            rows(products + n, out * own / threads, out * (own + 1) / threads, x);
        }
        free(x);
    }
    return status;
}
