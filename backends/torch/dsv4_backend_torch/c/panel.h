/* Products of many vectors with a panel of a weight's rows, which is decoded once: float32, or where the CPU multiplies it BF16, two channels
 * at a time or by tiles.
 *
 * Each sum is formed channel by channel, so that it does not depend on how many vectors there are.
 */
#pragma once
#include "amx.h"
#include "weights.h"

enum { PANEL = 2 * LANES };                            /* rows of a panel: two registers, two tiles */
enum { IN_REGISTERS = BYTES == 64 ? 8 : 6 };           /* vectors whose sums fit into the registers */
enum { ABREAST = BY_TILES ? 2 * TALL : IN_REGISTERS }; /* vectors that are multiplied at a time */

typedef struct {
    int64_t cols, pairs;    /* pairs: of BF16, not float32 */
    float *values;          /* [cols][PANEL], or [cols / 2][PANEL][2] in BF16 */
    float *vectors;         /* IN_REGISTERS of them, widened */
    const char *rows;       /* for tiles, else NULL: rows of BF16, a stride of bytes apart */
    int64_t stride;
} panel;

/* Bytes of scratch for panels of such rows, so many at a time. */
int64_t panel_bytes(int64_t cols, int64_t panels);

/* Where the n-th of the panels of one thread is in its scratch. */
panel panel_in(char *scratch, int64_t cols, int64_t n);

/* Whether vectors of x_type are to be laid out for tiles, where there are many of them. */
static inline int for_tiles(int64_t x_type, int64_t weight_type, int64_t cols) {
    return has_tiles() && x_type == BFLOAT16 && weight_type != FLOAT32 && cols % 2 == 0;
}

/* Decode rows first .. first + rows - 1 of w, rows <= PANEL, to be multiplied by vectors of x_type; what other rows of the panel give does
 * not count. */
void fill_panel(panel *p, const weight *w, int64_t first, int64_t rows, int64_t x_type, int laid);

/* to[v][i] = row i times vector v, for count <= ABREAST vectors of x_type, and the same laid out, if the panel was filled for that. */
void panel_products(const panel *p, const void *const *x, const char *laid, int64_t x_type, int64_t count, float (*to)[PANEL]);
