/* The lightning indexer: scores of packed keys, and the best of them. */
#include "panel.h"
#include "rows.h"

typedef struct {
    const char *q; /* [batch, seq, heads, dim] in type */
    const float *weights; /* [batch, seq, heads] */
    const char *cache;
    const int32_t *index, *visible, *offset; /* [batch, rows]; [batch, seq] each */
    int32_t *picks;                          /* [batch, seq, topk] */
    const layout *l;
    int64_t type, plain_type, slots, batch, seq, heads, dim, rows, topk;
    float scale;
} indexer;

static indexer read_indexer(const arg *a) {
    return (indexer){a[0].p, a[1].p, a[2].p,  a[3].p,  a[4].p,  a[5].p,  a[6].p,  a[7].p,  a[8].i,
                     a[9].i, a[10].i, a[11].i, a[12].i, a[13].i, a[14].i, a[15].i, a[16].i, (float)a[17].d};
}

enum { SCORES = 1 << 22 }; /* that are there at a time, more for one token alone */

static int64_t room_of(const indexer *x) { return (x->rows + PANEL - 1) / PANEL * PANEL; }

static int64_t tokens_at_once(const indexer *x) { /* of each sequence */
    int64_t most = SCORES / (x->batch * room_of(x) + 1);
    return most < 1 ? 1 : most < x->seq ? most : x->seq;
}

static int64_t key_bytes(const indexer *x) { /* of each thread: a panel, and its keys as they lie */
    return (panel_bytes(x->dim, 1) + PANEL * x->dim * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static int64_t bytes(const arg *a, int64_t threads) {
    indexer x = read_indexer(a);
    return threads * key_bytes(&x) + x.batch * tokens_at_once(&x) * room_of(&x) * (int64_t)sizeof(float) + 64;
}

static int64_t work(const arg *a, int64_t threads) {
    indexer x = read_indexer(a);
    (void)threads;
    return x.batch * x.seq * x.heads * x.dim * (1 + x.rows / 4);
}

/* Order of scores as order of integers, NaN above all. */
static uint32_t rank_of(float score) {
    uint32_t bits = bits_of(score == 0 ? 0 : score);
    return isnan(score) ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The topk best of the first ``seen`` scores, of equals the lower row, in the order of rows; -1 where there are fewer. */
static void choose_rows(const float *scores, int64_t seen, int64_t topk, int32_t offset, int32_t *picks) {
    int64_t count = 0, wanted = topk < seen ? topk : seen;
    uint32_t bound = 0; /* rank of the wanted-th best: found byte by byte */
    int64_t equal = seen;
    if (wanted < seen) {
        int64_t left = wanted;
        for (int shift = 24; shift >= 0; shift -= 8) {
            int64_t counts[256] = {0};
            for (int64_t r = 0; r < seen; r++) {
                uint32_t rank = rank_of(scores[r]);
                if (shift == 24 || rank >> (shift + 8) == bound >> (shift + 8)) counts[rank >> shift & 255]++;
            }
            int64_t byte = 255;
            while (counts[byte] < left) left -= counts[byte--];
            bound |= (uint32_t)byte << shift;
        }
        equal = left;
    }
    for (int64_t r = 0; r < seen && count < wanted; r++) {
        uint32_t rank = rank_of(scores[r]);
        if (wanted == seen || rank > bound || (rank == bound && equal-- > 0)) picks[count++] = (int32_t)r + offset;
    }
    while (count < topk) picks[count++] = -1;
}

/* Scores of PANEL keys from ``first`` on, for tokens begin .. end - 1 of sequence b; scores [end - begin, room]. */
static void score(const indexer *x, int64_t b, int64_t first, int64_t begin, int64_t end, char *scratch, float *scores) {
    int64_t most = 0, room = room_of(x), type = x->type == BFLOAT16 ? BFLOAT16 : FLOAT32, width = x->heads * x->dim * size_of(x->type);
    for (int64_t s = begin; s < end; s++) most = x->visible[b * x->seq + s] > most ? x->visible[b * x->seq + s] : most;
    if (first >= most) return;
    char *keys = scratch + panel_bytes(x->dim, 1);
    int64_t rows = x->rows - first < PANEL ? x->rows - first : PANEL;
    for (int64_t r = 0; r < rows; r++)
        if (!read_slot(x->cache, x->slots, x->plain_type, x->index[b * x->rows + first + r], keys, type, r * x->dim, x->l)) {
            fail(NOT_MINE);
            return;
        }
    const weight w = {keys, NULL, type};
    panel p = panel_in(scratch, x->dim, 0);
    fill_panel(&p, &w, 0, rows, x->type, 0);
    for (int64_t s = begin; s < end; s++) {
        int64_t token = b * x->seq + s;
        if (first >= x->visible[token]) continue;
        floats sum[PANEL / LANES] = {{0}};
        for (int64_t head = 0; head < x->heads; head += ABREAST) {
            int64_t count = x->heads - head < ABREAST ? x->heads - head : ABREAST;
            const void *q[ABREAST];
            float hits[ABREAST][PANEL] __attribute__((aligned(64)));
            for (int64_t g = 0; g < count; g++) q[g] = x->q + token * width + (head + g) * x->dim * size_of(x->type);
            panel_products(&p, q, NULL, x->type, count, hits);
            for (int64_t g = 0; g < count; g++)
                for (int64_t i = 0; i < PANEL / LANES; i++) {
                    floats hit = load(hits[g] + i * LANES);
                    sum[i] += x->weights[token * x->heads + head + g] * x->scale * (floats)((words)hit & ~(words)(hit < 0));
                }
        }
        for (int64_t i = 0; i < PANEL / LANES; i++) store(scores + (s - begin) * room + first + i * LANES, sum[i]);
    }
}

static void run(const arg *a, const team *t) {
    indexer x = read_indexer(a);
    char *scratch = (char *)(((uintptr_t)t->scratch + 63) & ~(uintptr_t)63);
    int64_t room = room_of(&x), panels = room / PANEL, step = tokens_at_once(&x);
    float *scores = (float *)(scratch + t->threads * key_bytes(&x));
    for (int64_t begin = 0; begin < x.seq; begin += step) {
        int64_t count = x.seq - begin < step ? x.seq - begin : step;
        if (begin) meet(t);
        for (int64_t n = take(t); n < x.batch * panels; n = take(t))
            score(&x, n / panels, n % panels * PANEL, begin, begin + count, scratch + t->own * key_bytes(&x), scores + n / panels * step * room);
        meet(t);
        for (int64_t n = take(t); n < x.batch * count; n = take(t)) {
            int64_t b = n / count, token = b * x.seq + begin + n % count;
            int64_t seen = x.visible[token] < 0 ? 0 : x.visible[token] < x.rows ? x.visible[token] : x.rows;
            choose_rows(scores + (b * step + n % count) * room, seen, x.topk, x.offset[token], x.picks + token * x.topk);
        }
    }
}

const entry index_topk = {"index_topk", run, bytes, work};
