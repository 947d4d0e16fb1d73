/* Rows of the cache: packed as they are written, unpacked as they are read. */
#include "formats.h"

enum { PLAIN, KV, KEY };
enum { KV_BLOCK = 64, KEY_BLOCK = 32 };

/* How a row is stored: RowLayout of dsv4_core. width: bytes of a packed row; rope: its last channels, stored in BF16. */
typedef struct {
    int64_t kind, dim, rope, width;
} layout;

/* One row of BF16 channels. */
static int pack(const uint16_t *row, uint8_t *to, const layout *l) {
    int64_t block = l->kind == KV ? KV_BLOCK : KEY_BLOCK, channels = l->dim - l->rope;
    format f = l->kind == KV ? E4M3 : E2M1;
    uint8_t *scales = to + (l->kind == KV ? channels : channels / 2);
    float values[KV_BLOCK];
    memset(scales, 0, l->width - (scales - to));
    for (int64_t begin = 0; begin < channels; begin += block) {
        for (int64_t j = 0; j < block; j++) values[j] = widen(row[begin + j]);
        uint32_t byte = scale_byte(values, block, f);
        if (byte == 255) return NOT_MINE;
        float scale = scale_value(byte);
        scales[begin / block] = (uint8_t)byte;
        for (int64_t j = 0; j < block; j++) {
            uint8_t code = code_of(on_grid(values[j] / scale, f), f);
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

static void unpack(const uint8_t *stored, void *to, int64_t type, int64_t at, const layout *l) {
    int64_t block = l->kind == KV ? KV_BLOCK : KEY_BLOCK, channels = l->dim - l->rope;
    const uint8_t *scales = stored + (l->kind == KV ? channels : channels / 2);
    for (int64_t begin = 0; begin < channels; begin += block, at += block) {
        float scale = scale_value(scales[begin / block]);
        if (l->kind == KV) {
            FOR_TYPE(type, for (int64_t j = 0; j < KV_BLOCK; j++) put(to, T, at + j, e4m3(stored[begin + j]) * scale);)
        } else {
            FOR_TYPE(type, for (int64_t j = 0; j < KEY_BLOCK; j++) put(to, T, at + j, e2m1(stored[(begin + j) / 2] >> j % 2 * 4) * scale);)
        }
    }
    for (int64_t j = 0; j < l->rope; j++) {
        uint16_t bits;
        memcpy(&bits, stored + l->width - 2 * (l->rope - j), 2);
        put(to, type, at + j, widen(bits));
    }
}

/* Rows [n, dim] to the slots that index names; those of -1 are left out. rows: in type, BF16 where the layout packs.
 * An index out of range and a value that is not finite are not for it: slots of rows before that are then written. */
int cache_write(char *cache, int64_t slots, const char *rows, int64_t type, const int32_t *index, int64_t n, const layout *l) {
    int64_t bytes = l->dim * size_of(type), width = l->kind == PLAIN ? bytes : l->width;
    for (int64_t i = 0; i < n; i++) {
        if (index[i] >= slots) return NOT_MINE;
        char *to = cache + index[i] * width;
        if (index[i] < 0) continue;
        if (l->kind == PLAIN)
            memcpy(to, rows + i * bytes, bytes);
        else if (pack((const uint16_t *)(rows + i * bytes), (uint8_t *)to, l))
            return NOT_MINE;
    }
    return DONE;
}

/* Slots that index names to rows [n, dim] of row_type; zeros for -1. plain_type: of a plain cache. */
int cache_read(const char *cache, int64_t slots, int64_t plain_type, const int32_t *index, int64_t n, void *rows, int64_t row_type,
               const layout *l) {
    int status = DONE;
#pragma omp parallel for reduction(max : status) if (n * l->dim > ALONE)
    for (int64_t i = 0; i < n; i++) {
        int64_t slot = index[i], at = i * l->dim;
        if (slot >= slots)
            status = NOT_MINE;
        else if (slot < 0)
            for (int64_t j = 0; j < l->dim; j++) put(rows, row_type, at + j, 0);
        else if (l->kind == PLAIN)
            for (int64_t j = 0; j < l->dim; j++) put(rows, row_type, at + j, get(cache, plain_type, slot * l->dim + j));
        else
            unpack((const uint8_t *)cache + slot * l->width, rows, row_type, at, l);
    }
    return status;
}
