/* A few rows through experts: y = shared + sum_k w2[e] (silu(min(w1[e] x, limit)) * clamp(w3[e] x, -limit, limit) * share[k]), e being
 * the row's k-th expert.
 *
 * What a product gives and the activation are rounded to act_type, as between linear layers; the sum over experts is float32, in
 * the order in which a row names them. Rows of one expert share the reading of its weights. Threads meet three times: when x is laid
 * out, when all of an activation is there, and when that is laid out for w2.
 */
#include "weights.h"

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

static int64_t bytes(const arg *a, int64_t threads) {
    layer l = read_layer(a);
    (void)threads;
    return (l.rows * room(l.dim) + l.rows * l.topk * (2 * room(l.inter) + l.dim)) * (int64_t)sizeof(float);
}

static int64_t work(const arg *a, int64_t threads) {
    layer l = read_layer(a);
    (void)threads;
    return 3 * l.rows * l.topk * l.dim * l.inter;
}

/* In E4M3 and back where it is to be quantised, and spread for a weight's type. Not finite: not for it. */
static void lay_out(const float *x, int64_t begin, int64_t end, int64_t cols, int64_t act_type, int64_t weight_type, int64_t quantise,
                    float *to) {
    float scale = 1;
    if (quantise) {
        uint32_t byte = scale_byte(x + begin, end - begin, E4M3);
        if (byte == 255) fail(NOT_MINE);
        scale = scale_value(byte);
    }
    float values[E4M3_BLOCK];
    for (int64_t j = begin; j < end; j++) values[j - begin] = quantise ? rounded(on_grid(x[j] / scale, E4M3) * scale, act_type) : x[j];
    lay(values, begin, end, act_type, weight_type, cols, to);
}

static float activated(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate; /* NaN stays */
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1 + expf(-gate)) * up;
}

/* A pair is a row and one of its experts. Those of pair p's expert, if p is the first of them and the expert is here: how many. */
static int64_t pairs_of(const layer *l, int64_t p, int64_t *found) {
    int64_t e = l->chosen[p] - l->first, count = 0;
    if (e < 0 || e >= l->experts) return 0;
    for (int64_t q = 0; q < p; q++)
        if (l->chosen[q] == l->chosen[p]) return 0;
    for (int64_t q = p; q < l->rows * l->topk; q++)
        if (l->chosen[q] == l->chosen[p]) found[count++] = q;
    return count;
}

static void run(const arg *a, const team *t) {
    layer l = read_layer(a);
    int64_t pairs = l.rows * l.topk, dim = l.dim, inter = l.inter, own[pairs];
    float *x = (float *)t->scratch, *hidden = x + l.rows * room(dim), *laid_out = hidden + pairs * room(inter);
    float *part = laid_out + pairs * room(inter), gate[pairs], up[pairs];
    const float *vectors[pairs];
    for (int64_t r = t->own; r < l.rows; r += t->threads)
        spread(l.x + r * dim * size_of(l.act_type), l.act_type, l.weights->type, dim, x + r * room(dim));
    meet(t);
    for (int64_t p = 0; p < pairs; p++) {
        int64_t count = pairs_of(&l, p, own);
        const weight *w = l.weights + 3 * (l.chosen[p] - l.first);
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
    for (int64_t p = 0; p < pairs; p++) {
        int64_t count = pairs_of(&l, p, own);
        const weight *w = l.weights + 3 * (l.chosen[p] - l.first) + 2;
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

const entry moe = {"moe", run, bytes, work};
