/* Products of rows with weights: what a kernel is told of each, and all of them by a team. */
#pragma once
#include "panel.h"

/* One product with out rows of a weight from ``first`` on: x [tokens, cols], y [tokens, out], tokens a stride of elements apart. */
typedef struct {
    weight w;
    const char *x;
    char *y;
    int64_t first, x_type, y_type, out, cols, tokens, x_stride, y_stride;
} product;

int64_t products_bytes(const product *p, int64_t count, int64_t threads);            /* of scratch */
void multiply(const product *p, int64_t count, char *scratch, const team *t); /* results are there when all have met */
