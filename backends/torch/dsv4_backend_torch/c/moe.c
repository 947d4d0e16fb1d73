/* Rows through experts: y = shared + sum_k w2[e] (silu(min(w1[e] x, limit)) * clamp(w3[e] x, -limit, limit) * share[k]), e being
 * the row's k-th expert.
 *
 * What a product gives and the activation are rounded to act_type, as between linear layers; the sum over experts is float32: for few
 * rows in the order in which a row names them, for many in the order of experts. Rows of one expert share the reading of its weights.
 * Threads meet when rows are sorted by experts, when they are laid out, when all of an activation is there, and when that is laid out for w2.
 */
#include "panel.h"

enum { FEW_FOR_TILES = 2 }; /* rows of an expert up to which reading its weights as they lie takes as long */

typedef struct {
    const weight *weights; /* w1, w3 [inter, dim], w2 [dim, inter], expert by expert */
    const char *x;         /* [rows, dim] in act_type */
    const int32_t *chosen; /* [rows, topk], counted from first; those outside 0 .. experts - 1 are others' */
    const float *share;    /* [rows, topk] or NULL: not weighted */
    const char *shared;    /* [rows, dim] in act_type, or NULL */
    char *y;               /* [rows, dim] in y_type */
    int64_t act_type, y_type, rows, topk, experts, first, dim, inter, quantise; /* quantise: the activation, in blocks of 128 */
    float limit;
} layer;

static layer read_layer(const arg *a) {
    return (layer){a[0].p, a[1].p, a[2].p, a[3].p,  a[4].p,  a[5].p,  a[6].i,  a[7].i,
                   a[8].i, a[9].i, a[10].i, a[11].i, a[12].i, a[13].i, a[14].i, (float)a[15].d};
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* A pair is a row and one of its experts. Pairs in the order of experts; where each expert's begin, and the sets of at most TALL into which
 * they are divided. */
typedef struct {
    int64_t *order, *begins, *sets;
} sorting;

static int64_t sorting_bytes(const layer *l) { return aligned((l->rows * l->topk + 2 * (l->experts + 1)) * (int64_t)sizeof(int64_t)); }

static sorting sorting_in(const layer *l, char *scratch) {
    int64_t *order = (int64_t *)scratch, *begins = order + l->rows * l->topk;
    return (sorting){order, begins, begins + l->experts + 1};
}

/* Pairs in the order of their experts, and of rows within those; of experts that are here. */
static void sort_pairs(const layer *l, const sorting *s) {
    int64_t pairs = l->rows * l->topk, sum = 0;
    memset(s->begins, 0, (l->experts + 1) * sizeof(int64_t));
    for (int64_t p = 0; p < pairs; p++) {
        int64_t e = l->chosen[p] - l->first;
        if (e >= 0 && e < l->experts) s->begins[e]++;
    }
    for (int64_t e = 0; e <= l->experts; e++) {
        int64_t count = s->begins[e];
        s->begins[e] = sum;
        sum += count;
    }
    for (int64_t p = 0; p < pairs; p++) {
        int64_t e = l->chosen[p] - l->first;
        if (e >= 0 && e < l->experts) s->order[s->begins[e]++] = p;
    }
    for (int64_t e = l->experts; e > 0; e--) s->begins[e] = s->begins[e - 1];
    s->begins[0] = s->sets[0] = 0;
    for (int64_t e = 0; e < l->experts; e++) s->sets[e + 1] = s->sets[e] + (s->begins[e + 1] - s->begins[e] + TALL - 1) / TALL;
}

/* Whether vectors are laid out for tiles, of which an expert's have sets of their own. */
static int by_tiles(const layer *l) { return for_tiles(l->act_type, l->weights->type, l->dim) && l->inter % 2 == 0; }

/* Where things of many rows are in the scratch: pairs sorted, activations in act_type, sets of vectors laid out for tiles, and for each
 * thread its panels and sums of a panel's channels. */
typedef struct {
    sorting of;
    char *hidden, *laid, *own;
    int64_t bytes; /* of all */
} space;

static space space_of(const layer *l, char *scratch, int64_t threads, int64_t own) {
    int64_t pairs = l->rows * l->topk, widest = l->dim > l->inter ? l->dim : l->inter, sets = pairs / TALL + (pairs < l->experts ? pairs : l->experts);
    int64_t sorted = sorting_bytes(l), hidden = aligned(pairs * l->inter * size_of(l->act_type)), laid = by_tiles(l) ? sets * laid_bytes(widest) : 0;
    int64_t thread = aligned(panel_bytes(widest, 2) + l->rows * PANEL * (int64_t)sizeof(float));
    char *behind = scratch + sorted + hidden;
    return (space){sorting_in(l, scratch), scratch + sorted, behind, behind + laid + own * thread, sorted + hidden + laid + threads * thread};
}

/* Whether an expert's panels serve so many rows on average that decoding them pays. */
static int by_panels(const layer *l) { return l->rows > ALIKE && l->rows * l->topk > (by_tiles(l) ? FEW_FOR_TILES : ALIKE) * l->experts; }

static int64_t bytes(const arg *a, int64_t threads) {
    layer l = read_layer(a);
    if (by_panels(&l)) return space_of(&l, NULL, threads, 0).bytes;
    return sorting_bytes(&l) + (l.rows * room(l.dim) + l.rows * l.topk * (2 * room(l.inter) + l.dim)) * (int64_t)sizeof(float);
}

static int64_t work(const arg *a, int64_t threads) {
    layer l = read_layer(a);
    (void)threads;
    int64_t pairs = l.rows * l.topk, read = pairs < l.experts ? pairs : l.experts;
    return 3 * read * l.dim * l.inter * (1 + pairs / (l.experts * ALIKE));
}

/* In E4M3 and back where it is to be quantised, and spread for a weight's type. Not finite: not for it. */
static void lay_out(const float *x, int64_t begin, int64_t end, int64_t cols, int64_t act_type, int64_t weight_type, int64_t coded,
                    float *to) {
    float values[E4M3_BLOCK] = {0};
    memcpy(values, x + begin, (end - begin) * sizeof(float));
    if (coded && !quantise(values, E4M3_BLOCK, E4M3)) fail(NOT_MINE);
    for (int64_t j = 0; coded && j < end - begin; j++) values[j] = rounded(values[j], act_type);
    lay(values, begin, end, act_type, weight_type, cols, to);
}

static float activated(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate; /* NaN stays */
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1 + expf(-gate)) * up;
}

static void few(layer l, const team *t) {
    int64_t pairs = l.rows * l.topk, dim = l.dim, inter = l.inter;
    sorting s = sorting_in(&l, t->scratch);
    float *x = (float *)(t->scratch + sorting_bytes(&l)), *hidden = x + l.rows * room(dim), *laid_out = hidden + pairs * room(inter);
    float *part = laid_out + pairs * room(inter), gate[pairs], up[pairs];
    const float *vectors[pairs];
    if (t->own == 0) sort_pairs(&l, &s);
    for (int64_t r = t->own; r < l.rows; r += t->threads)
        spread(l.x + r * dim * size_of(l.act_type), l.act_type, l.weights->type, dim, x + r * room(dim));
    meet(t);
    for (int64_t e = 0; e < l.experts; e++) {
        int64_t count = s.begins[e + 1] - s.begins[e], *own = s.order + s.begins[e];
        const weight *w = l.weights + 3 * e;
        for (int64_t n = 0; n < count; n++) vectors[n] = x + own[n] / l.topk * room(dim);
        for (int64_t i = count ? first_of(inter, t) : inter; i < last_of(inter, t); i++) {
            dots(w, i, dim, vectors, l.act_type, count, gate);
            dots(w + 1, i, dim, vectors, l.act_type, count, up);
            for (int64_t n = 0; n < count; n++) {
                float value = activated(rounded(gate[n], l.act_type), rounded(up[n], l.act_type), l.limit);
                hidden[own[n] * inter + i] = rounded(l.share ? value * l.share[own[n]] : value, l.act_type);
            }
        }
    }
    meet(t);
    int64_t blocks = (inter + E4M3_BLOCK - 1) / E4M3_BLOCK;
    for (int64_t n = t->own; n < pairs * blocks; n += t->threads) {
        int64_t p = n / blocks, begin = n % blocks * E4M3_BLOCK, end = inter - begin < E4M3_BLOCK ? inter : begin + E4M3_BLOCK;
        int64_t e = l.chosen[p] - l.first;
        if (e < 0 || e >= l.experts) continue;
        lay_out(hidden + p * inter, begin, end, inter, l.act_type, l.weights[2].type, l.quantise, laid_out + p * room(inter));
    }
    meet(t);
    for (int64_t e = 0; e < l.experts; e++) {
        int64_t count = s.begins[e + 1] - s.begins[e], *own = s.order + s.begins[e];
        const weight *w = l.weights + 3 * e + 2;
        for (int64_t n = 0; n < count; n++) vectors[n] = laid_out + own[n] * room(inter);
        for (int64_t i = count ? first_of(dim, t) : dim; i < last_of(dim, t); i++) {
            dots(w, i, inter, vectors, l.act_type, count, gate);
            for (int64_t n = 0; n < count; n++) part[own[n] * dim + i] = rounded(gate[n], l.act_type);
        }
    }
    for (int64_t r = 0; r < l.rows; r++)
        for (int64_t i = first_of(dim, t); i < last_of(dim, t); i++) {
            float sum = l.shared ? get(l.shared, l.act_type, r * dim + i) : 0;
            for (int64_t p = r * l.topk; p < (r + 1) * l.topk; p++) {
                int64_t e = l.chosen[p] - l.first;
                if (e >= 0 && e < l.experts) sum += part[p * dim + i];
            }
            put(l.y, l.y_type, r * dim + i, sum);
        }
}

/* A register of ``activated``. */
static floats activations(floats gate, floats up, float limit) {
    gate = choose((words)(gate > limit), all(limit), gate);
    up = choose((words)(up > limit), all(limit), choose((words)(up < -limit), all(-limit), up));
    floats e = choose((words)(gate < -88.f), all(INFINITY), exponential(-gate));
    return gate / (1 + e) * up;
}

/* Where the vectors of an expert's pairs from n on, a whole number of sets behind its first, are laid out. */
static const char *laid_from(const layer *l, const space *s, int64_t e, int64_t n, int64_t cols) {
    return by_tiles(l) ? s->laid + (s->of.sets[e] + (n - s->of.begins[e]) / TALL) * laid_bytes(cols) : NULL;
}

/* The first pair of a set, and how many it has. */
static int64_t pairs_of(const sorting *s, int64_t set, int64_t *first) {
    int64_t e = 0;
    while (s->sets[e + 1] <= set) e++;
    *first = s->begins[e] + (set - s->sets[e]) * TALL;
    return s->begins[e + 1] - *first < TALL ? s->begins[e + 1] - *first : TALL;
}

/* A set's rows, laid out for w1 and w3. */
static void open_set(const layer *l, const space *s, int64_t set) {
    int64_t first, count = pairs_of(&s->of, set, &first);
    const void *x[TALL];
    for (int64_t v = 0; v < count; v++) x[v] = l->x + s->of.order[first + v] / l->topk * l->dim * size_of(l->act_type);
    lay_vectors(x, count, l->dim, s->laid + set * laid_bytes(l->dim));
}

/* A panel of an expert's gate and up for all its rows, activated. */
static void open_panel(const layer *l, const space *s, int64_t e, int64_t row) {
    int64_t rows = l->inter - row < PANEL ? l->inter - row : PANEL, end = s->of.begins[e + 1], widest = l->dim > l->inter ? l->dim : l->inter;
    panel w1 = panel_in(s->own, widest, 0), w3 = panel_in(s->own, widest, 1);
    w1.cols = w3.cols = l->dim;
    int tiles = by_tiles(l);
    fill_panel(&w1, l->weights + 3 * e, row, rows, l->act_type, tiles);
    fill_panel(&w3, l->weights + 3 * e + 1, row, rows, l->act_type, tiles);
    for (int64_t n = s->of.begins[e]; n < end; n += ABREAST) {
        int64_t count = end - n < ABREAST ? end - n : ABREAST;
        const void *x[ABREAST];
        float gate[ABREAST][PANEL] __attribute__((aligned(64))), up[ABREAST][PANEL] __attribute__((aligned(64)));
        for (int64_t v = 0; v < count; v++) x[v] = l->x + s->of.order[n + v] / l->topk * l->dim * size_of(l->act_type);
        const char *laid = laid_from(l, s, e, n, l->dim);
        panel_products(&w1, x, laid, l->act_type, count, gate);
        panel_products(&w3, x, laid, l->act_type, count, up);
        for (int64_t v = 0; v < count; v++) {
            float share = l->share ? l->share[s->of.order[n + v]] : 1;
            for (int64_t i = 0; i < PANEL; i += LANES)
                store(gate[v] + i, activations(rounded_lanes(load(gate[v] + i), l->act_type), rounded_lanes(load(up[v] + i), l->act_type), l->limit) * share);
            put_many(s->hidden, l->act_type, (n + v) * l->inter + row, gate[v], rows);
        }
    }
}

/* Activations of a pair in E4M3 and back. */
static void quantise_row(const layer *l, const space *s, int64_t n) {
    for (int64_t begin = 0; begin < l->inter; begin += E4M3_BLOCK) {
        int64_t count = l->inter - begin < E4M3_BLOCK ? l->inter - begin : E4M3_BLOCK, at = n * l->inter + begin;
        float values[E4M3_BLOCK] = {0};
        FOR_TYPE(l->act_type, for (int64_t j = 0; j < count; j++) values[j] = get(s->hidden, T, at + j);)
        if (!quantise(values, E4M3_BLOCK, E4M3)) fail(NOT_MINE);
        put_many(s->hidden, l->act_type, at, values, count);
    }
}

/* A set's activations, quantised and laid out for w2. */
static void close_set(const layer *l, const space *s, int64_t set) {
    int64_t first, count = pairs_of(&s->of, set, &first);
    const void *x[TALL];
    for (int64_t v = 0; v < count; v++) {
        if (l->quantise) quantise_row(l, s, first + v);
        x[v] = s->hidden + (first + v) * l->inter * size_of(l->act_type);
    }
    if (by_tiles(l)) lay_vectors(x, count, l->inter, s->laid + set * laid_bytes(l->inter));
}

/* A panel of all experts' results, summed. */
static void close_panel(const layer *l, const space *s, int64_t row) {
    int64_t rows = l->dim - row < PANEL ? l->dim - row : PANEL, widest = l->dim > l->inter ? l->dim : l->inter;
    panel w2 = panel_in(s->own, widest, 0);
    float(*sums)[PANEL] = (float(*)[PANEL])(s->own + panel_bytes(widest, 2));
    w2.cols = l->inter;
    for (int64_t r = 0; r < l->rows; r++)
        for (int64_t i = 0; i < rows; i++) sums[r][i] = l->shared ? get(l->shared, l->act_type, r * l->dim + row + i) : 0;
    for (int64_t e = 0; e < l->experts; e++) {
        int64_t end = s->of.begins[e + 1];
        if (end == s->of.begins[e]) continue;
        fill_panel(&w2, l->weights + 3 * e + 2, row, rows, l->act_type, by_tiles(l));
        for (int64_t n = s->of.begins[e]; n < end; n += ABREAST) {
            int64_t count = end - n < ABREAST ? end - n : ABREAST;
            const void *x[ABREAST];
            float part[ABREAST][PANEL] __attribute__((aligned(64)));
            for (int64_t v = 0; v < count; v++) x[v] = s->hidden + (n + v) * l->inter * size_of(l->act_type);
            panel_products(&w2, x, laid_from(l, s, e, n, l->inter), l->act_type, count, part);
            for (int64_t v = 0; v < count; v++) {
                float *sum = sums[s->of.order[n + v] / l->topk];
                for (int64_t i = 0; i < PANEL; i += LANES) store(sum + i, load(sum + i) + rounded_lanes(load(part[v] + i), l->act_type));
            }
        }
    }
    for (int64_t r = 0; r < l->rows; r++) put_many(l->y, l->y_type, r * l->dim + row, sums[r], rows);
}

static void many(layer l, const team *t) {
    space s = space_of(&l, t->scratch, t->threads, t->own);
    if (t->own == 0) sort_pairs(&l, &s.of);
    meet(t);
    int64_t panels = (l.inter + PANEL - 1) / PANEL, sets = s.of.sets[l.experts];
    if (by_tiles(&l)) {
        for (int64_t n = take(t); n < sets; n = take(t)) open_set(&l, &s, n);
        meet(t);
    }
    for (int64_t n = take(t); n < l.experts * panels; n = take(t))
        if (s.of.begins[n / panels] < s.of.begins[n / panels + 1]) open_panel(&l, &s, n / panels, n % panels * PANEL);
    meet(t);
    for (int64_t n = take(t); n < sets; n = take(t)) close_set(&l, &s, n);
    meet(t);
    for (int64_t n = take(t); n * PANEL < l.dim; n = take(t)) close_panel(&l, &s, n * PANEL);
}

static void run(const arg *a, const team *t) {
    layer l = read_layer(a);
    if (by_panels(&l))
        many(l, t);
    else
        few(l, t);
}

const entry moe = {"moe", run, bytes, work};
