/* Dot products of a few vectors with rows of weights as they lie in memory: float32, BF16, E4M3 and E2M1 codes with their scales.
 *
 * A vector is first spread: widened, and its channels put where they meet the row's. Each has sums of its own in one order, whoever is beside it.
 */
#pragma once
#include "formats.h"

enum { CODES_E4M3 = 2, CODES_E2M1 = 3 }; /* beside FLOAT32 and BFLOAT16 */
enum { E4M3_BLOCK = 128, E2M1_GROUP = 32 };

/* [out, cols], rows one after another; scale: E8M0 bytes [ceil(out / 128), ceil(cols / 128)] or [out, cols / 32], of codes only. */
typedef struct {
    const char *data;
    const uint8_t *scale;
    int64_t type;
} weight;

enum { ALIKE = 8 }; /* so many vectors meet a row as it lies, by ``dots``, and their bits are those of one alone; more meet panels. As in compiled.py */

/* Floats that a vector of cols channels takes when it is spread: up to 8 more than cols, and whole cache lines. */
static inline int64_t room(int64_t cols) { return (cols + 8 + 15) / 16 * 16; }

/* A vector of x_type, or its channels from begin on, laid out for such a weight. */
void spread(const void *x, int64_t x_type, int64_t weight_type, int64_t cols, float *to);
void lay(const float *values, int64_t begin, int64_t end, int64_t x_type, int64_t weight_type, int64_t cols, float *to);

/* Row i of a weight times count vectors of x_type that were spread for its type. */
void dots(const weight *w, int64_t i, int64_t cols, const float *const *x, int64_t x_type, int64_t count, float *to);
float dot(const weight *w, int64_t i, int64_t cols, const float *x, int64_t x_type);
float dot_float32(const float *w, const float *x, int64_t cols);
