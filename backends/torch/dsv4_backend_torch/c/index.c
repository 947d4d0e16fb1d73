/* The lightning indexer of a few tokens: scores of packed keys, and the best of them. */
#include "rows.h"
#include "tile.h"

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

static int64_t whole(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

static int64_t bytes(const arg *a, int64_t threads) { /* keys of each thread; queries; scores */
    indexer x = read_indexer(a);
    return (threads * 2 * TILE * x.dim + x.batch * x.seq * (x.heads * x.dim + whole(x.rows))) * (int64_t)sizeof(float) + 64;
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

static void run(const arg *a, const team *t) {
    indexer x = read_indexer(a);
    int64_t tokens = x.batch * x.seq, dim = x.dim, room = whole(x.rows), tiles = room / TILE;
    tile *channels = (tile *)(((uintptr_t)t->scratch + 63) & ~(uintptr_t)63) + t->own * 2 * dim;
    float *key = (float *)(channels + dim);
    float *queries = (float *)(channels + (t->threads - t->own) * 2 * dim), *scores = queries + tokens * x.heads * dim;
    FOR_TYPE(x.type, for (int64_t j = first_of(tokens * x.heads * dim, t); j < last_of(tokens * x.heads * dim, t); j++)
        queries[j] = get(x.q, T, j);)
    meet(t);
    for (int64_t n = first_of(x.batch * tiles, t); n < last_of(x.batch * tiles, t); n++) {
        int64_t b = n / tiles, first = n % tiles * TILE, most = 0;
        for (int64_t s = 0; s < x.seq; s++) most = x.visible[b * x.seq + s] > most ? x.visible[b * x.seq + s] : most;
        if (first >= most) continue;
        for (int64_t r = 0; r < TILE; r++) {
            int there = first + r < x.rows && read_slot(x.cache, x.slots, x.plain_type, x.index[b * x.rows + first + r], key, FLOAT32, 0, x.l);
            if (first + r < x.rows && !there) fail(NOT_MINE);
            for (int64_t j = 0; j < dim; j++) ((float *)(channels + j))[r] = there ? key[j] : 0;
        }
        for (int64_t s = 0; s < x.seq; s++) {
            int64_t token = b * x.seq + s;
            tile sum = {0};
            for (int64_t head = 0; head < x.heads; head += GROUP) {
                int64_t heads = x.heads - head < GROUP ? x.heads - head : GROUP;
                tile hits[GROUP];
                tile_products(queries + (token * x.heads + head) * dim, dim, heads, channels, dim, hits);
                for (int64_t g = 0; g < heads; g++) {
                    float weight = x.weights[token * x.heads + head + g] * x.scale;
                    sum += weight * (tile)((tile_words)hits[g] & ~(tile_words)(hits[g] < 0));
                }
            }
            memcpy(scores + token * room + first, &sum, sizeof sum);
        }
    }
    meet(t);
    for (int64_t token = t->own; token < tokens; token += t->threads) {
        int64_t seen = x.visible[token] < 0 ? 0 : x.visible[token] < x.rows ? x.visible[token] : x.rows;
        choose_rows(scores + token * room, seen, x.topk, x.offset[token], x.picks + token * x.topk);
    }
}

const entry index_topk = {"index_topk", run, bytes, work};
