/* RoPE of a few tokens. */
#include "values.h"

/* x, y [tokens, heads, dim] in type; turn [tokens, half, 2]: cosine and sine; the last 2 * half channels are turned, in pairs. */
int apply_rope(const void *x, void *y, int64_t type, const float *turn, int64_t tokens, int64_t heads, int64_t dim, int64_t half,
               int64_t inverse) {
    float sign = inverse ? -1 : 1;
    for (int64_t t = 0; t < tokens; t++, turn += 2 * half)
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (t * heads + head) * dim, bytes = size_of(type);
            memcpy((char *)y + at * bytes, (const char *)x + at * bytes, (dim - 2 * half) * bytes);
            at += dim - 2 * half;
            FOR_TYPE(type, for (int64_t i = 0; i < half; i++) {
                float a = get(x, T, at + 2 * i), b = get(x, T, at + 2 * i + 1), cosine = turn[2 * i], sine = sign * turn[2 * i + 1];
                put(y, T, at + 2 * i, a * cosine - b * sine);
                put(y, T, at + 2 * i + 1, a * sine + b * cosine);
            })
        }
    return DONE;
}
