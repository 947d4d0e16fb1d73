/* Attention of a few tokens to the rows that each lists, and the compressor's mixture of a few windows. */
#include "rows.h"
#include "tile.h"

typedef struct {
    const char *q, *kv, *ring, *old; /* q [tokens, heads, dim], kv [own, dim] in type; ring, old: caches of layout */
    const int32_t *ring_index, *old_index, *idxs; /* idxs [tokens, picks] count in [ring_index | kv | old_index] */
    const float *sink;                            /* [heads] */
    char *y;
    const layout *l;
    int64_t type, plain_type, ring_slots, old_slots, recent, own, olds, tokens, heads, dim, picks;
    float scale;
} attention;

static attention read_attention(const arg *a) {
    return (attention){a[0].p,  a[1].p,  a[2].p,  a[3].p,  a[4].p,  a[5].p,  a[6].p,  a[7].p,  a[8].p,  a[9].p,         a[10].i,
                       a[11].i, a[12].i, a[13].i, a[14].i, a[15].i, a[16].i, a[17].i, a[18].i, a[19].i, a[20].i, (float)a[21].d};
}

static int64_t whole(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

static int64_t floats_of(const attention *s) { /* list, rows twice, a query and its scores for each head */
    return whole(s->picks) * (1 + 2 * s->dim) + s->heads * (s->dim + whole(s->picks));
}

static int64_t attention_bytes(const arg *a, int64_t threads) {
    attention s = read_attention(a);
    (void)threads;
    return floats_of(&s) * (int64_t)sizeof(float) + 64;
}

static int64_t attention_work(const arg *a, int64_t threads) {
    attention s = read_attention(a);
    (void)threads;
    return s.tokens * s.picks * s.dim * s.heads / 4;
}

/* Row i of [ring_index | kv | old_index] as float32. */
static void fetch_row(const attention *s, int64_t i, float *to) {
    int found;
    if (i < s->recent)
        found = read_slot(s->ring, s->ring_slots, s->plain_type, s->ring_index[i], to, FLOAT32, 0, s->l);
    else if (i < s->recent + s->own) {
        found = 1;
        FOR_TYPE(s->type, for (int64_t j = 0; j < s->dim; j++) to[j] = get(s->kv, T, (i - s->recent) * s->dim + j);)
    } else {
        i -= s->recent + s->own;
        found = i < s->olds && read_slot(s->old, s->old_slots, s->plain_type, s->old_index[i], to, FLOAT32, 0, s->l);
    }
    if (!found) {
        memset(to, 0, s->dim * sizeof(float));
        fail(NOT_MINE);
    }
}

/* Softmax with the sink of count scores; those behind them, up to a whole tile, become 0. */
static void weigh(float *scores, int64_t count, float sink) {
    float top = sink, sum = 0;
    for (int64_t r = 0; r < count; r++) top = scores[r] > top ? scores[r] : top;
    for (int64_t r = count; r < whole(count); r++) scores[r] = -INFINITY;
    floats parts = {0};
    for (int64_t r = 0; r < whole(count); r += LANES) {
        floats e = exponential(load(scores + r) - top);
        parts += e;
        store(scores + r, e);
    }
    sum = total(parts) + (float)exp((double)sink - top);
    for (int64_t r = 0; r < whole(count); r++) scores[r] /= sum;
}

/* to [vectors, dim] = weights [vectors, count] times values [count, dim], for a group of vectors. */
static void mix_rows(const float *weights, int64_t stride, int64_t vectors, const float *values, int64_t count, int64_t dim, float *to) {
    for (int64_t d = 0; d < dim; d += TILE) {
        tile sums[GROUP] = {{0}};
        if (vectors == GROUP)
            for (int64_t r = 0; r < count; r++) {
                tile value;
                memcpy(&value, values + r * dim + d, sizeof value);
                for (int g = 0; g < GROUP; g++) sums[g] += weights[g * stride + r] * value;
            }
        else
            for (int64_t r = 0; r < count; r++)
                for (int64_t g = 0; g < vectors; g++) {
                    tile value;
                    memcpy(&value, values + r * dim + d, sizeof value);
                    sums[g] += weights[g * stride + r] * value;
                }
        for (int64_t g = 0; g < vectors; g++) memcpy(to + g * dim + d, &sums[g], sizeof(tile));
    }
}

/* A token's rows are unpacked once, in their own order and channel by channel; then each thread has some of the heads. What is not listed
 * (-1) is left out, so that the bits do not depend on how far a list was filled up. */
static void attend(const arg *a, const team *t) {
    attention s = read_attention(a);
    int64_t room = whole(s.picks), dim = s.dim;
    tile *channels = (tile *)(((uintptr_t)t->scratch + 63) & ~(uintptr_t)63); /* [room / TILE][dim][TILE] */
    float *values = (float *)channels + room * dim, *queries = values + room * dim, *scores = queries + s.heads * dim;
    int32_t *listed = (int32_t *)(scores + s.heads * room);
    for (int64_t k = 0; k < s.tokens; k++) {
        int64_t count = 0;
        const int32_t *idxs = s.idxs + k * s.picks;
        if (k) meet(t);
        for (int64_t j = 0; j < s.picks; j++) {
            if (idxs[j] < 0) continue;
            if (t->own == 0) listed[count] = idxs[j];
            count++;
        }
        meet(t);
        for (int64_t block = t->own; block < whole(count) / TILE; block += t->threads)
            for (int64_t r = 0; r < TILE; r++) {
                float *row = values + (block * TILE + r) * dim, *column = (float *)(channels + block * dim) + r;
                if (block * TILE + r < count)
                    fetch_row(&s, listed[block * TILE + r], row);
                else
                    memset(row, 0, dim * sizeof(float));
                for (int64_t j = 0; j < dim; j++) column[j * TILE] = row[j];
            }
        meet(t);
        int64_t groups = (s.heads + GROUP - 1) / GROUP;
        for (int64_t group = first_of(groups, t); group < last_of(groups, t); group++) {
            int64_t head = group * GROUP, heads = s.heads - head < GROUP ? s.heads - head : GROUP;
            float *q = queries + head * dim, *own = scores + head * room;
            FOR_TYPE(s.type, for (int64_t j = 0; j < heads * dim; j++) q[j] = get(s.q, T, (k * s.heads + head) * dim + j) * s.scale;)
            for (int64_t block = 0; block < whole(count) / TILE; block++) {
                tile out[GROUP];
                tile_products(q, dim, heads, channels + block * dim, dim, out);
                for (int64_t g = 0; g < heads; g++) memcpy(own + g * room + block * TILE, &out[g], sizeof(tile));
            }
            for (int64_t g = 0; g < heads; g++) weigh(own + g * room, count, s.sink[head + g]);
            mix_rows(own, room, heads, values, count, dim, q);
            FOR_TYPE(s.type, for (int64_t j = 0; j < heads * dim; j++) put(s.y, T, (k * s.heads + head) * dim + j, q[j]);)
        }
    }
}

static int64_t compress_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[3].i * a[6].i * a[4].i;
}

/* (kv_score, ape, window_idxs, rows, span, ratio, dim, pool, y, type): kv_score [pool, 2 * width], ape [ratio, width]; y [rows, dim] in type.
 * As the contract says; where no token of a window is there, zeros. */
static void mix_windows(const arg *a, const team *t) {
    const float *pool = a[0].p, *ape = a[1].p;
    int64_t span = a[4].i, ratio = a[5].i, dim = a[6].i, width = span / ratio * dim, parts = dim / LANES;
    for (int64_t n = first_of(a[3].i * parts, t); n < last_of(a[3].i * parts, t); n++) {
        int64_t row = n / parts, c = n % parts * LANES;
        const int32_t *idxs = (const int32_t *)a[2].p + row * span;
        floats top = all(-0x1.fffffep127f), sum = {0}, mixed = {0};
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < span; j++) {
                if (idxs[j] < 0) continue;
                if (idxs[j] >= a[7].i) {
                    fail(NOT_MINE);
                    return;
                }
                int64_t at = c + (span > ratio && j >= ratio ? dim : 0);
                const float *token = pool + (int64_t)idxs[j] * 2 * width;
                floats score = load(token + width + at) + load(ape + j % ratio * width + at);
                if (pass == 0) {
                    top = choose((words)(score > top), score, top);
                } else {
                    floats e = exponential(score - top);
                    sum += e;
                    mixed += e * load(token + at);
                }
            }
        for (int l = 0; l < LANES; l++) put(a[8].p, a[9].i, row * dim + c + l, sum[l] == 0 ? 0 : mixed[l] / sum[l]);
    }
}

const entry sparse_attn = {"sparse_attn", attend, attention_bytes, attention_work};
const entry compress = {"compress", mix_windows, no_bytes, compress_work};
