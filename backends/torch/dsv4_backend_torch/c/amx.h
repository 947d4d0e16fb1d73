/* Products of BF16 by tiles (AMX): rows of a weight as they lie, times vectors that are laid out for it.
 *
 * Sums are float32, each formed in one order, whoever is beside it; BF16 values below the normal ones count as 0.
 */
#pragma once
#include "values.h"

#if defined(__AMX_BF16__) && BY_PAIRS && defined(__linux__)
#define BY_TILES 1
#else
#define BY_TILES 0
#endif

enum { TALL = 16, DEEP = 32 }; /* rows or vectors of a tile; channels */

int has_tiles(void); /* whether this CPU has them, and this process may use them; else the others are not called */

/* Whole tiles of channels, and the bytes of a tile's vectors, laid out. */
static inline int64_t deep(int64_t cols) { return (cols + DEEP - 1) / DEEP * DEEP; }
static inline int64_t laid_bytes(int64_t cols) { return deep(cols) * TALL * 2; }

/* Lay out count <= TALL vectors; those that are missing, and channels behind the last, become zeros. */
void lay_vectors(const void *const *x, int64_t count, int64_t cols, char *to);

/* to[v][i] = row i times vector v, for two tiles of rows, a stride of bytes apart, and one or two of laid vectors. */
void multiply_tiles(const char *rows, int64_t stride, const char *laid, int64_t vectors, int64_t cols, float (*to)[2 * TALL]);
