/* Products of many vectors with a panel of a weight's rows, which is decoded once: float32, or two channels of BF16 at a time where the CPU
 * multiplies those.
 *
 * Each sum is formed channel by channel, so that it does not depend on how many vectors there are.
 */
#pragma once
#include "weights.h"

enum { PANEL = 2 * LANES };                   /* rows of a panel: two registers */
enum { ABREAST = BYTES == 64 ? 8 : 6 };       /* vectors that are multiplied at a time: their sums fit into the registers */

typedef struct {
    int64_t cols, pairs; /* pairs: of BF16, not float32 */
    float *values;       /* [cols][PANEL], or [cols / 2][PANEL][2] in BF16 */
    float *vectors;      /* ABREAST of them, widened */
} panel;

/* Bytes of scratch for panels of such rows, so many at a time. */
int64_t panel_bytes(int64_t cols, int64_t panels);

/* Where the n-th of the panels of one thread is in its scratch. */
panel panel_in(char *scratch, int64_t cols, int64_t n);

/* Decode rows first .. first + rows - 1 of w, rows <= PANEL, to be multiplied by vectors of x_type; the panel's other rows are zeros. */
void fill_panel(panel *p, const weight *w, int64_t first, int64_t rows, int64_t x_type);

/* to[v][i] = row i times vector v, for count <= ABREAST vectors of x_type. */
void panel_products(const panel *p, const void *const *x, int64_t x_type, int64_t count, float (*to)[PANEL]);
