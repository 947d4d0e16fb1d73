/* Scatter, gather, copy. */
#include "rows.h"

/* One row of BF16 channels. */
static int pack(const uint16_t *row, uint8_t *to, const layout *l) {
    int64_t block = l->kind == KV ? KV_BLOCK : KEY_BLOCK, channels = l->dim - l->rope;
    format f = l->kind == KV ? E4M3 : E2M1;
    uint8_t *scales = to + (l->kind == KV ? channels : channels / 2);
    float values[KV_BLOCK];
    memset(scales, 0, l->width - (scales - to));
    for (int64_t begin = 0; begin < channels; begin += block) {
        for (int64_t j = 0; j < block; j++) values[j] = widen(row[begin + j]);
        uint32_t byte = to_grid(values, block, f);
        if (byte == 255) return NOT_MINE;
        scales[begin / block] = (uint8_t)byte;
        for (int64_t j = 0; j < block; j++) {
            uint8_t code = code_of(values[j], f);
            if (l->kind == KV)
                to[begin + j] = code;
            else if (j % 2)
                to[(begin + j) / 2] |= (uint8_t)(code << 4);
            else
                to[(begin + j) / 2] = code;
        }
    }
    memcpy(to + l->width - 2 * l->rope, row + channels, 2 * l->rope);
    return DONE;
}

/* (cache, slots, rows, type, index, n, layout): rows [n, dim] to the slots that index names; those of -1 are left out. rows: in type,
 * BF16 where the layout packs. An index out of range and a value that is not finite are not for it: slots of rows before are then written. */
static void write(const arg *a, const team *t) {
    const layout *l = a[6].p;
    const char *rows = a[2].p;
    const int32_t *index = a[4].p;
    int64_t bytes = l->dim * size_of(a[3].i), width = l->kind == PLAIN ? bytes : l->width;
    for (int64_t i = first_of(a[5].i, t); i < last_of(a[5].i, t); i++) {
        if (index[i] >= a[1].i) {
            fail(NOT_MINE);
            return;
        }
        char *to = (char *)a[0].p + index[i] * width;
        if (index[i] < 0) continue;
        if (l->kind == PLAIN)
            memcpy(to, rows + i * bytes, bytes);
        else if (pack((const uint16_t *)(rows + i * bytes), (uint8_t *)to, l)) {
            fail(NOT_MINE);
            return;
        }
    }
}

static int64_t write_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[5].i * ((const layout *)a[6].p)->dim;
}

/* (cache, slots, plain_type, index, n, rows, row_type, layout): slots that index names to rows [n, dim]. */
static void read(const arg *a, const team *t) {
    const layout *l = a[7].p;
    const int32_t *index = a[3].p;
    for (int64_t i = first_of(a[4].i, t); i < last_of(a[4].i, t); i++)
        if (!read_slot(a[0].p, a[1].i, a[2].i, index[i], a[5].p, a[6].i, i * l->dim, l)) fail(NOT_MINE);
}

static int64_t read_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[4].i * ((const layout *)a[7].p)->dim;
}

/* (from, to, rows, bytes, from_stride, to_stride): bytes of each row. */
static void run_copy(const arg *a, const team *t) {
    for (int64_t i = first_of(a[2].i, t); i < last_of(a[2].i, t); i++)
        memcpy((char *)a[1].p + i * a[5].i, (const char *)a[0].p + i * a[4].i, a[3].i);
}

static int64_t copy_work(const arg *a, int64_t threads) {
    (void)threads;
    return a[2].i * a[3].i / 4;
}

const entry cache_write = {"cache_write", write, no_bytes, write_work};
const entry cache_read = {"cache_read", read, no_bytes, read_work};
const entry copy = {"copy", run_copy, no_bytes, copy_work};
