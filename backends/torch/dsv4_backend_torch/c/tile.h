/* Products of a few vectors with sixteen rows at a time, which stand channel by channel. */
#pragma once
#include "values.h"

enum { TILE = 16, GROUP = 4 };
typedef float tile __attribute__((vector_size(4 * TILE)));
typedef uint32_t tile_words __attribute__((vector_size(4 * TILE)));

/* out[g][r] = sum_d q[g * stride + d] * rows[d][r] for count <= GROUP vectors. */
static inline void tile_products(const float *q, int64_t stride, int64_t count, const tile *rows, int64_t dim, tile *out) {
    if (count == GROUP) {
        tile a = {0}, b = {0}, c = {0}, d = {0};
        const float *q1 = q + stride, *q2 = q1 + stride, *q3 = q2 + stride;
        for (int64_t j = 0; j < dim; j++) {
            tile row = rows[j];
            a += q[j] * row;
            b += q1[j] * row;
            c += q2[j] * row;
            d += q3[j] * row;
        }
        out[0] = a, out[1] = b, out[2] = c, out[3] = d;
        return;
    }
    for (int64_t g = 0; g < count; g++) {
        tile a = {0};
        for (int64_t j = 0; j < dim; j++) a += q[g * stride + j] * rows[j];
        out[g] = a;
    }
}
