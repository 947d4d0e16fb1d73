/* The products of weights.h. What is made of a row's codes serves SHARED vectors. */
#include "weights.h"

#define AHEAD 4096 /* bytes between what is multiplied and what is fetched: a few times the latency of a slow memory */
#define INLINE static inline __attribute__((always_inline))

enum { SHARED = BYTES == 64 ? 4 : 2 }; /* vectors of one pass over a row: their sums fit into the registers */

static inline void fetch(const void *from, int64_t bytes) { /* into the second cache level: the first can wait for few lines at once */
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)from + line + AHEAD, 0, 2);
}

#if defined(__F16C__) && defined(__AVX2__) && BYTES >= 32
#include "halves.h"
#endif
#include "codes.h"

#if BY_PAIRS
#include "pairs.h"
#else
INLINE int in_pairs(int64_t x_type, int64_t weight_type, int64_t cols) { return (void)x_type, (void)weight_type, (void)cols, 0; }
INLINE int64_t pair_place(int64_t j, int64_t weight_type) { return (void)weight_type, j; }
INLINE void pair_sums(const char *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, int64_t type, float *to) {
    (void)w, (void)scale, (void)x, (void)count, (void)cols, (void)type, (void)to;
}
#endif

/* Where channel j of a vector stands: each of a word's two BF16 weights, which are a shift or a mask away from float32, has a part of its own. */
INLINE int64_t place(int64_t j, int64_t cols, int64_t type) {
    if (type == BFLOAT16) return j % 2 * ((cols + 1) / 2) + j / 2;
    return type == CODES_E4M3 ? e4m3_place(j, cols) : type == CODES_E2M1 ? e2m1_place(j, cols) : j;
}

INLINE void lay_one(float *to, int64_t j, float value, int64_t x_type, int64_t weight_type, int64_t cols) {
    if (in_pairs(x_type, weight_type, cols))
        ((uint16_t *)to)[pair_place(j, weight_type)] = bfloat16(value);
    else
        to[place(j, cols, weight_type)] = value;
}

INLINE void spread_for(const void *x, int64_t type, int64_t weight_type, int64_t cols, float *to) {
    FOR_TYPE(type, for (int64_t j = 0; j < cols; j++) lay_one(to, j, get(x, T, j), T, weight_type, cols);)
}

void spread(const void *x, int64_t type, int64_t weight_type, int64_t cols, float *to) {
    switch (weight_type) { /* constants: places are found without a division */
    case FLOAT32: spread_for(x, type, FLOAT32, cols, to); break;
    case BFLOAT16: spread_for(x, type, BFLOAT16, cols, to); break;
    case CODES_E4M3: spread_for(x, type, CODES_E4M3, cols, to); break;
    default: spread_for(x, type, CODES_E2M1, cols, to);
    }
}

void lay(const float *values, int64_t begin, int64_t end, int64_t x_type, int64_t weight_type, int64_t cols, float *to) {
    for (int64_t j = begin; j < end; j++) lay_one(to, j, values[j - begin], x_type, weight_type, cols);
}

INLINE void float32_sums(const float *w, const float *const *x, int count, int64_t cols, float *to) {
    floats part[SHARED][4] = {0};
    int64_t j = 0;
    for (; j + 4 * LANES <= cols; j += 4 * LANES) {
        fetch(w + j, 4 * BYTES);
        for (int k = 0; k < 4; k++) {
            floats row = load(w + j + k * LANES);
            for (int v = 0; v < count; v++) part[v][k] += row * load(x[v] + j + k * LANES);
        }
    }
    for (int v = 0; v < count; v++) {
        to[v] = total((part[v][0] + part[v][1]) + (part[v][2] + part[v][3]));
        for (int64_t i = j; i < cols; i++) to[v] += w[i] * x[v][i];
    }
}

INLINE void bfloat16_sums(const uint16_t *w, const float *const *x, int count, int64_t cols, float *to) {
    floats part[SHARED][4] = {0};
    int64_t j = 0, odd = (cols + 1) / 2;
    for (; j + 4 * LANES <= cols; j += 4 * LANES) {
        fetch(w + j, 2 * BYTES);
        for (int k = 0; k < 4; k += 2) {
            words pair = load_words(w + j + k * LANES);
            for (int v = 0; v < count; v++) {
                const float *at = x[v] + j / 2 + k / 2 * LANES;
                part[v][k] += (floats)(pair << 16) * load(at);
                part[v][k + 1] += (floats)(pair & 0xffff0000u) * load(at + odd);
            }
        }
    }
    for (int v = 0; v < count; v++) {
        to[v] = total((part[v][0] + part[v][1]) + (part[v][2] + part[v][3]));
        for (int64_t i = j; i < cols; i++) to[v] += widen(w[i]) * x[v][place(i, cols, BFLOAT16)];
    }
}

INLINE void sums(const char *w, const uint8_t *scale, const float *const *x, int64_t x_type, int count, int64_t cols, int64_t type, float *to) {
    if (in_pairs(x_type, type, cols))
        pair_sums(w, scale, x, count, cols, type, to);
    else if (type == FLOAT32)
        float32_sums((const float *)w, x, count, cols, to);
    else if (type == BFLOAT16)
        bfloat16_sums((const uint16_t *)w, x, count, cols, to);
    else if (type == CODES_E4M3)
        e4m3_sums((const uint8_t *)w, scale, x, count, cols, to);
    else
        e2m1_sums((const uint8_t *)w, scale, x, count, cols, to);
}

void dots(const weight *w, int64_t i, int64_t cols, const float *const *x, int64_t x_type, int64_t count, float *to) {
    int64_t scales = (cols + E4M3_BLOCK - 1) / E4M3_BLOCK;
    const uint8_t *scale = w->type == CODES_E4M3 ? w->scale + i / E4M3_BLOCK * scales : w->scale + i * (cols / E2M1_GROUP);
    const char *row = w->data + (w->type == CODES_E2M1 ? i * (cols / 2) : i * cols * (w->type == FLOAT32 ? 4 : w->type == BFLOAT16 ? 2 : 1));
    for (; count >= SHARED; count -= SHARED, x += SHARED, to += SHARED) sums(row, scale, x, x_type, SHARED, cols, w->type, to);
    if (count >= 2) {
        sums(row, scale, x, x_type, 2, cols, w->type, to);
        count -= 2, x += 2, to += 2;
    }
    if (count) sums(row, scale, x, x_type, 1, cols, w->type, to);
}

float dot(const weight *w, int64_t i, int64_t cols, const float *x, int64_t x_type) {
    float one;
    dots(w, i, cols, &x, x_type, 1, &one);
    return one;
}

float dot_float32(const float *w, const float *x, int64_t cols) {
    float one;
    float32_sums(w, &x, 1, cols, &one);
    return one;
}
