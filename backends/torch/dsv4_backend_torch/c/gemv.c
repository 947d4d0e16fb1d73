/* Rows times weights as they lie in memory. A few rows, a decode step's, take as long as it takes to read the weights; for more, a panel of
 * a weight's rows is decoded once and multiplied from the cache.
 *
 * y[t][i] = sum_j weight[i][j] * x[t][j], products and sums in float32, y rounded once. A row's sum is formed by one thread and in
 * one order, so that the number of threads does not show in the bits, nor that of rows up to ALIKE, nor that of more than ALIKE.
 */
#include "products.h"

static int64_t most(const product *p, int64_t count) { /* bytes of what one thread makes of one product */
    int64_t bytes = 0;
    for (int64_t n = 0; n < count; n++) {
        int64_t own = p[n].tokens > ALIKE ? panel_bytes(p[n].cols, 1) : p[n].tokens * room(p[n].cols) * (int64_t)sizeof(float);
        bytes = own > bytes ? own : bytes;
    }
    return (bytes + 63) / 64 * 64;
}

/* Whether a product's vectors are laid out for tiles. */
static int is_laid(const product *p) { return p->tokens > ALIKE && for_tiles(p->x_type, p->w.type, p->cols); }

/* Tiles of vectors that are laid out for product n; 0: none, or they are those of the product before. */
static int64_t tiles_of(const product *p, int64_t n) {
    const product *own = p + n, *last = own - 1;
    if (!is_laid(own)) return 0;
    if (n && is_laid(last) && own->x == last->x && own->cols == last->cols && own->tokens == last->tokens && own->x_stride == last->x_stride) return 0;
    return (own->tokens + TALL - 1) / TALL;
}

int64_t products_bytes(const product *p, int64_t count, int64_t threads) {
    int64_t laid = 0;
    for (int64_t n = 0; n < count; n++) laid += tiles_of(p, n) * laid_bytes(p[n].cols);
    return most(p, count) * threads + laid + 64;
}

/* Each thread has its share of the rows. */
static void few(const product *p, float *x, const team *t) {
    int64_t step = p->x_stride * size_of(p->x_type), stride = room(p->cols);
    const float *vectors[ALIKE];
    for (int64_t k = 0; k < p->tokens; k++) {
        spread(p->x + k * step, p->x_type, p->w.type, p->cols, x + k * stride);
        vectors[k] = x + k * stride;
    }
    for (int64_t i = first_of(p->out, t); i < last_of(p->out, t); i++) {
        float sums[ALIKE];
        dots(&p->w, p->first + i, p->cols, vectors, p->x_type, p->tokens, sums);
        for (int64_t k = 0; k < p->tokens; k++) put(p->y, p->y_type, k * p->y_stride + i, sums[k]);
    }
}

/* A product's panels, each for all tokens or, where there are not enough for all threads, for a part of them. */
static int64_t panels_of(const product *p) { return (p->out + PANEL - 1) / PANEL; }

static int64_t parts_of(const product *p, const team *t) {
    int64_t wanted = (4 * t->threads + panels_of(p) - 1) / panels_of(p), most = (p->tokens + 63) / 64;
    return t->threads == 1 ? 1 : wanted < most ? wanted : most;
}

static const char *vector(const product *p, int64_t k) { return p->x + k * p->x_stride * size_of(p->x_type); }

static void many(const product *p, int64_t item, int64_t parts, char *scratch, const char *laid) {
    int64_t row = item / parts * PANEL, rows = p->out - row < PANEL ? p->out - row : PANEL, part = item % parts;
    int64_t sets = (p->tokens + ABREAST - 1) / ABREAST, end = sets * (part + 1) / parts * ABREAST;
    panel w = panel_in(scratch, p->cols, 0);
    fill_panel(&w, &p->w, p->first + row, rows, p->x_type, laid != NULL);
    for (int64_t k = sets * part / parts * ABREAST; k < end && k < p->tokens; k += ABREAST) {
        int64_t count = p->tokens - k < ABREAST ? p->tokens - k : ABREAST;
        const void *x[ABREAST];
        float sums[ABREAST][PANEL] __attribute__((aligned(64)));
        for (int64_t v = 0; v < count; v++) x[v] = vector(p, k + v);
        panel_products(&w, x, laid ? laid + k / TALL * laid_bytes(p->cols) : NULL, p->x_type, count, sums);
        for (int64_t v = 0; v < count; v++) put_many(p->y, p->y_type, (k + v) * p->y_stride + row, sums[v], rows);
    }
}

static void lay_tile(const product *p, int64_t tile, char *laid) {
    int64_t first = tile * TALL, count = p->tokens - first < TALL ? p->tokens - first : TALL;
    const void *x[TALL];
    for (int64_t v = 0; v < count; v++) x[v] = vector(p, first + v);
    lay_vectors(x, count, p->cols, laid + tile * laid_bytes(p->cols));
}

/* Vectors of all products, by all threads. */
static void lay_all(const product *p, int64_t count, char *laid, const team *t) {
    int64_t next = -1, begin = 0;
    for (int64_t n = 0; n < count; n++) {
        int64_t tiles = tiles_of(p, n);
        if (tiles && next < 0) next = take(t);
        for (; tiles && next < begin + tiles; next = take(t)) lay_tile(p + n, next - begin, laid);
        begin += tiles, laid += tiles * laid_bytes(p[n].cols);
    }
    if (next >= 0) meet(t);
}

void multiply(const product *p, int64_t count, char *scratch, const team *t) {
    scratch = (char *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    char *laid = scratch + most(p, count) * t->threads, *behind = laid;
    scratch += most(p, count) * t->own;
    lay_all(p, count, laid, t);
    int64_t next = -1, begin = 0;
    for (int64_t n = 0; n < count; n++) {
        int64_t tiles = tiles_of(p, n);
        if (tiles) laid = behind, behind += tiles * laid_bytes(p[n].cols);
        if (p[n].tokens <= ALIKE) {
            few(p + n, (float *)scratch, t);
            continue;
        }
        int64_t parts = parts_of(p + n, t), items = panels_of(p + n) * parts;
        if (next < 0) next = take(t);
        for (; next < begin + items; next = take(t)) many(p + n, next - begin, parts, scratch, is_laid(p + n) ? laid : NULL);
        begin += items;
    }
}

static int64_t bytes(const arg *a, int64_t threads) { return products_bytes(a[0].p, a[1].i, threads); }

static int64_t work(const arg *a, int64_t threads) {
    const product *p = a[0].p;
    int64_t values = 0;
    (void)threads;
    for (int64_t n = 0; n < a[1].i; n++) values += p[n].out * p[n].cols * (p[n].tokens > ALIKE ? p[n].tokens / ALIKE : 1);
    return values;
}

/* (products, how many). */
static void run(const arg *a, const team *t) { multiply(a[0].p, a[1].i, t->scratch, t); }

const entry gemv = {"gemv", run, bytes, work};
