/* Attention of tokens to the rows that each lists, and the compressor's mixture of windows. */
#include "rows.h"
#include "tile.h"
#include "weights.h"

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

enum { BLOCK = 16 }; /* tokens that attend together: neighbours list mostly the same rows */

/* What attends to some rows: the list of them, in two layouts, how often each is listed, queries and scores of all heads. */
typedef struct {
    float *channels; /* [room / TILE][dim][TILE]: a register holds one channel of TILE rows */
    float *values;   /* [dim / TILE][room][TILE]: a register holds TILE channels of one row */
    float *queries, *scores, *times;
    int32_t *listed, *place; /* [room]; [all rows]: where a row is in the list, -1: nowhere */
    int64_t room;
} space;

static int64_t rows_of(const attention *s) { return s->recent + s->own + s->olds; }

static int64_t room_of(const attention *s) { return whole(s->picks + s->picks / 2); }

static int64_t space_bytes(const attention *s) {
    int64_t room = room_of(s), floats = room * (2 + 2 * s->dim) + s->heads * (s->dim + room) + (rows_of(s) + 15) / 16 * 16;
    return (floats * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static space space_in(const attention *s, char *scratch) {
    int64_t room = room_of(s);
    float *channels = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63), *values = channels + room * s->dim;
    float *queries = values + room * s->dim, *scores = queries + s->heads * s->dim, *times = scores + s->heads * room;
    return (space){channels, values, queries, scores, times, (int32_t *)(times + room), (int32_t *)(times + 2 * room), room};
}

/* Whether each thread has tokens of its own; else all share each token. */
static int64_t apart(const attention *s, int64_t threads) { return s->tokens > 1 && s->tokens >= threads; }

static int64_t attention_bytes(const arg *a, int64_t threads) {
    attention s = read_attention(a);
    return (apart(&s, threads) ? threads : 1) * space_bytes(&s) + 64;
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

/* Softmax with the sink of count scores, of which those count that are listed: as often as ``times`` says, or once where it is NULL. Those
 * behind them, up to a whole tile, become 0. */
static void weigh(float *scores, int64_t count, float sink, const float *times) {
    float top = sink, sum = 0;
    if (times)
        for (int64_t r = 0; r < count; r++) scores[r] = times[r] > 0 ? scores[r] : -INFINITY;
    for (int64_t r = 0; r < count; r++) top = scores[r] > top ? scores[r] : top;
    for (int64_t r = count; r < whole(count); r++) scores[r] = -INFINITY;
    floats parts = {0};
    for (int64_t r = 0; r < whole(count); r += LANES) {
        floats e = exponential(load(scores + r) - top);
        if (times) e *= load(times + r);
        parts += e;
        store(scores + r, e);
    }
    sum = total(parts) + (float)exp((double)sink - top);
    for (int64_t r = 0; r < whole(count); r++) scores[r] /= sum;
}

/* to [vectors, dim] = weights [vectors, count] times rows, for a group of vectors; values: [dim / TILE][room][TILE]. */
static void mix_rows(const float *weights, int64_t stride, int64_t vectors, const float *values, int64_t room, int64_t count, int64_t dim, float *to) {
    for (int64_t d = 0; d < dim; d += TILE, values += room * TILE) {
        tile sums[GROUP] = {{0}};
        if (vectors == GROUP)
            for (int64_t r = 0; r < count; r++) {
                tile value;
                memcpy(&value, values + r * TILE, sizeof value);
                for (int g = 0; g < GROUP; g++) sums[g] += weights[g * stride + r] * value;
            }
        else
            for (int64_t r = 0; r < count; r++)
                for (int64_t g = 0; g < vectors; g++) {
                    tile value;
                    memcpy(&value, values + r * TILE, sizeof value);
                    sums[g] += weights[g * stride + r] * value;
                }
        for (int64_t g = 0; g < vectors; g++) memcpy(to + g * dim + d, &sums[g], sizeof(tile));
    }
}

/* A tile of listed rows in both layouts; says whether all are finite. */
static int unpack_tile(const attention *s, const space *own, int64_t count, int64_t first) {
    int64_t dim = s->dim;
    float rows[TILE][TILE] __attribute__((aligned(64))), *row = own->channels + first * dim; /* rows, before they are turned */
    tile sum = {0};
    for (int64_t r = 0; r < TILE; r++) {
        if (first + r < count)
            fetch_row(s, own->listed[first + r], row);
        else
            memset(row, 0, dim * sizeof(float));
        for (int64_t d = 0; d < dim; d += TILE) {
            tile part;
            memcpy(&part, row + d, sizeof part);
            memcpy(own->values + d * own->room + (first + r) * TILE, &part, sizeof part);
            sum += part * 0;
        }
    }
    for (int64_t d = 0; d < dim; d += TILE) {
        for (int64_t r = 0; r < TILE; r++) memcpy(rows[r], own->values + d * own->room + (first + r) * TILE, sizeof(tile));
        for (int64_t r = 0; r < TILE; r += LANES)
            for (int64_t j = 0; j < TILE; j += LANES) turn(&rows[r][j], TILE, own->channels + (first * dim) + (d + j) * TILE + r, TILE);
    }
    for (int l = 1; l < TILE; l++) sum[0] += sum[l];
    return sum[0] == 0;
}

/* A group of a token's heads. */
static void attend_heads(const attention *s, const space *own, int64_t k, int64_t group, int64_t count, const float *times) {
    int64_t head = group * GROUP, heads = s->heads - head < GROUP ? s->heads - head : GROUP, dim = s->dim;
    float *q = own->queries + head * dim, *scores = own->scores + head * own->room;
    FOR_TYPE(s->type, for (int64_t j = 0; j < heads * dim; j++) q[j] = get(s->q, T, (k * s->heads + head) * dim + j) * s->scale;)
    for (int64_t row = 0; row < count; row += TILE) {
        tile out[GROUP];
        tile_products(q, dim, heads, (const tile *)(own->channels + row * dim), dim, out);
        for (int64_t g = 0; g < heads; g++) memcpy(scores + g * own->room + row, &out[g], sizeof(tile));
    }
    for (int64_t g = 0; g < heads; g++) weigh(scores + g * own->room, count, s->sink[head + g], times);
    mix_rows(scores, own->room, heads, own->values, own->room, count, dim, q);
    put_many(s->y, s->type, (k * s->heads + head) * dim, q, heads * dim);
}

static int64_t groups_of(const attention *s) { return (s->heads + GROUP - 1) / GROUP; }

/* The rows that a token lists, in their own order; what is not listed (-1) is left out, so that the bits do not depend on how far a list was
 * filled up. */
static int64_t list_rows(const attention *s, int64_t k, int32_t *listed) {
    int64_t count = 0;
    for (int64_t j = 0; j < s->picks; j++)
        if (s->idxs[k * s->picks + j] >= 0) listed[count++] = s->idxs[k * s->picks + j];
    return count;
}

/* Tokens one by one, each by all threads: its rows are unpacked once, then each thread has some of the heads. */
static void attend_shared(const attention *s, const team *t) {
    space own = space_in(s, t->scratch);
    for (int64_t k = 0; k < s->tokens; k++) {
        int64_t count = 0;
        if (k) meet(t);
        for (int64_t j = 0; j < s->picks; j++) count += s->idxs[k * s->picks + j] >= 0;
        if (t->own == 0) list_rows(s, k, own.listed);
        meet(t);
        for (int64_t n = t->own; n < whole(count) / TILE; n += t->threads) unpack_tile(s, &own, count, n * TILE);
        meet(t);
        for (int64_t group = first_of(groups_of(s), t); group < last_of(groups_of(s), t); group++) attend_heads(s, &own, k, group, count, NULL);
    }
}

static void attend_alone(const attention *s, const space *own, int64_t k) {
    int64_t count = list_rows(s, k, own->listed);
    for (int64_t first = 0; first < count; first += TILE) unpack_tile(s, own, count, first);
    for (int64_t group = 0; group < groups_of(s); group++) attend_heads(s, own, k, group, count, NULL);
}

/* Adds a token's rows to the list where all find room; the list's length, or -1. */
static int64_t add_rows(const attention *s, const space *own, int64_t k, int64_t count) {
    int64_t before = count;
    for (int64_t j = 0; j < s->picks; j++) {
        int64_t i = s->idxs[k * s->picks + j];
        if (i < 0 || (i < rows_of(s) && own->place[i] >= 0)) continue;
        if (i >= rows_of(s) || count == own->room) {
            while (count > before) own->place[own->listed[--count]] = -1;
            return -1;
        }
        own->place[i] = (int32_t)count;
        own->listed[count++] = (int32_t)i;
    }
    return count;
}

/* Tokens first .. end - 1, as many at a time as list few enough rows: all of those are unpacked once, and the others' do not count for a token. */
static void attend_together(const attention *s, const space *own, int64_t first, int64_t end) {
    while (first < end) {
        int64_t count = 0, k = first;
        for (int64_t more; k < end && (more = add_rows(s, own, k, count)) >= 0; k++) count = more;
        int finite = k > first + 1;
        for (int64_t row = 0; finite && row < count; row += TILE) finite = unpack_tile(s, own, count, row);
        for (int64_t token = first; finite && token < k; token++) {
            memset(own->times, 0, own->room * sizeof(float));
            for (int64_t j = 0; j < s->picks; j++)
                if (s->idxs[token * s->picks + j] >= 0) own->times[own->place[s->idxs[token * s->picks + j]]]++;
            for (int64_t group = 0; group < groups_of(s); group++) attend_heads(s, own, token, group, count, own->times);
        }
        for (int64_t r = 0; r < count; r++) own->place[own->listed[r]] = -1;
        k = k > first ? k : first + 1;
        for (; !finite && first < k; first++) attend_alone(s, own, first); /* 0 times infinity would reach them all */
        first = k;
    }
}

static void attend(const arg *a, const team *t) {
    attention s = read_attention(a);
    if (!apart(&s, t->threads)) {
        attend_shared(&s, t);
        return;
    }
    space own = space_in(&s, t->scratch + t->own * space_bytes(&s));
    int64_t block = s.tokens > ALIKE ? BLOCK : 1;
    for (int64_t i = 0; block > 1 && i < rows_of(&s); i++) own.place[i] = -1;
    for (int64_t k = take(t) * block; k < s.tokens; k = take(t) * block) {
        if (block == 1)
            attend_alone(&s, &own, k);
        else
            attend_together(&s, &own, k, k + block < s.tokens ? k + block : s.tokens);
    }
}

static int64_t compress_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[3].i * a[6].i * a[4].i;
}

/* (kv_score, ape, window_idxs, rows, span, ratio, dim, pool, y, type, state, slots, index, recent): window_idxs counts in [state[index] |
 * kv_score]; kv_score [pool, 2 * width], state [slots, 2 * width], index [recent] or -1 for zeros, ape [ratio, width]; y [rows, dim] in
 * type. As the contract says; where no token of a window is there, zeros. */
static void mix_windows(const arg *a, const team *t) {
    const float *pool = a[0].p, *ape = a[1].p, *state = a[10].p;
    const int32_t *index = a[12].p;
    int64_t span = a[4].i, ratio = a[5].i, dim = a[6].i, width = span / ratio * dim, parts = dim / LANES, recent = a[13].i;
    for (int64_t n = first_of(a[3].i * parts, t); n < last_of(a[3].i * parts, t); n++) {
        int64_t row = n / parts, c = n % parts * LANES;
        const int32_t *idxs = (const int32_t *)a[2].p + row * span;
        floats top = all(-0x1.fffffep127f), sum = {0}, mixed = {0};
        for (int pass = 0; pass < 2; pass++)
            for (int64_t j = 0; j < span; j++) {
                int64_t i = idxs[j], slot = i >= 0 && i < recent ? index[i] : 0;
                if (i < 0) continue;
                if (i >= recent + a[7].i || slot >= a[11].i) {
                    fail(NOT_MINE);
                    return;
                }
                int64_t at = c + (span > ratio && j >= ratio ? dim : 0);
                const float *token = i < recent ? state + slot * 2 * width : pool + (i - recent) * 2 * width;
                floats score = load(ape + j % ratio * width + at);
                if (slot >= 0) score += load(token + width + at);
                if (pass == 0) {
                    top = choose((words)(score > top), score, top);
                } else {
                    floats e = exponential(score - top);
                    sum += e;
                    if (slot >= 0) mixed += e * load(token + at);
                }
            }
        put_lanes(a[8].p, a[9].i, row * dim + c, choose((words)(sum == 0), all(0), mixed / sum));
    }
}

const entry sparse_attn = {"sparse_attn", attend, attention_bytes, attention_work};
const entry compress = {"compress", mix_windows, no_bytes, compress_work};
