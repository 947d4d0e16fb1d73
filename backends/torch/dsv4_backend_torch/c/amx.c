/* Tiles of sixteen rows by sixteen vectors. A word of a tile is two channels: a weight's row has them as they lie, vectors stand side by side. */
#include "amx.h"

#if BY_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static int allowed; /* a process asks Linux for them once */

__attribute__((constructor)) static void ask(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    allowed = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

int has_tiles(void) { return allowed; }

void lay_vectors(const void *const *x, int64_t count, int64_t cols, char *to) {
    uint16_t square[TALL][DEEP] __attribute__((aligned(64))) = {{0}};
    for (int64_t k = 0; k < cols; k += DEEP, to += sizeof square) {
        int64_t n = cols - k < DEEP ? cols - k : DEEP;
        if (n < DEEP) memset(square, 0, sizeof square);
        for (int64_t v = 0; v < count; v++) {
            const uint16_t *from = (const uint16_t *)x[v] + k;
            if (n == DEEP)
                memcpy(square[v], from, sizeof square[v]);
            else
                memcpy(square[v], from, n * 2);
        }
        turn(square, TALL, to, TALL);
    }
}

void multiply_tiles(const char *rows, int64_t stride, const char *laid, int64_t vectors, int64_t cols, float (*to)[2 * TALL]) {
    static const struct {
        uint8_t palette, row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } eight __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {TALL, TALL, TALL, TALL, TALL, TALL, TALL, TALL}};
    float sums[4][TALL][TALL] __attribute__((aligned(64)));
    const char *more = vectors > TALL ? laid + laid_bytes(cols) : NULL;
    _tile_loadconfig(&eight);
    for (int64_t k = 0; k < deep(cols); k += DEEP) { /* 0 to 3: sums; 4, 5: rows; 6, 7: vectors */
        _tile_loadd(4, rows + 2 * k, stride);
        _tile_loadd(5, rows + 2 * k + TALL * stride, stride);
        _tile_loadd(6, laid + 2 * k * TALL, 2 * DEEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (!more) continue;
        _tile_loadd(7, more + 2 * k * TALL, 2 * DEEP);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 4 * TALL);
    _tile_stored(1, sums[1], 4 * TALL);
    turn(sums[0], TALL, to[0], 2 * TALL);
    turn(sums[1], TALL, to[0] + TALL, 2 * TALL);
    if (more) {
        _tile_stored(2, sums[2], 4 * TALL);
        _tile_stored(3, sums[3], 4 * TALL);
        turn(sums[2], TALL, to[TALL], 2 * TALL);
        turn(sums[3], TALL, to[TALL] + TALL, 2 * TALL);
    }
    _tile_release();
}
#else
int has_tiles(void) { return 0; }

void lay_vectors(const void *const *x, int64_t count, int64_t cols, char *to) { (void)x, (void)count, (void)cols, (void)to; }

void multiply_tiles(const char *rows, int64_t stride, const char *laid, int64_t vectors, int64_t cols, float (*to)[2 * TALL]) {
    (void)rows, (void)stride, (void)laid, (void)vectors, (void)cols, (void)to;
}
#endif
