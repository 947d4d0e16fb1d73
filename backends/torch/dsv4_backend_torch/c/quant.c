/* Quantisation and dequantisation of a few rows. */
#include "formats.h"

/* The first channels of x to y in E4M3 (or E2M1) and back, in blocks; the others as they are; x, y [rows, dim] in type.
 * What is not finite is not for it: y is then unfinished. */
int act_qdq(const void *x, void *y, int64_t type, int64_t rows, int64_t dim, int64_t channels, int64_t block, int64_t is_e4m3) {
    format f = is_e4m3 ? E4M3 : E2M1;
    float values[block];
    memcpy(y, x, rows * dim * size_of(type));
    for (int64_t t = 0; t < rows; t++)
        for (int64_t begin = t * dim; begin < t * dim + channels; begin += block) {
            FOR_TYPE(type, for (int64_t j = 0; j < block; j++) values[j] = get(x, T, begin + j);)
            uint32_t byte = scale_byte(values, block, f);
            if (byte == 255) return NOT_MINE;
            float scale = scale_value(byte);
            FOR_TYPE(type, for (int64_t j = 0; j < block; j++) put(y, T, begin + j, on_grid(values[j] / scale, f) * scale);)
        }
    return DONE;
}
