/* Dot products of a vector with rows of weights as they lie in memory: float32, BF16, E4M3 and E2M1 codes with their scales. */
#pragma once
#include "formats.h"

#define AHEAD 1024 /* bytes between what is multiplied and what is fetched: a few times memory's latency */

enum { CODES_E4M3 = 2, CODES_E2M1 = 3 }; /* beside FLOAT32 and BFLOAT16 */
enum { E4M3_BLOCK = 128, E2M1_GROUP = 32 };

/* [out, cols], rows one after another; scale: E8M0 bytes [ceil(out / 128), ceil(cols / 128)] or [out, cols / 32], of codes only. */
typedef struct {
    const char *data;
    const uint8_t *scale;
    int64_t type;
} weight;

/* Channels in a word of such a weight. Channel j of a vector that is multiplied by it stands at place(j): each of a word's channels
 * has a part of its own, so that a register of words meets registers of neighbours. */
static inline int64_t per_word(int64_t type) { return type == FLOAT32 ? 1 : type == BFLOAT16 ? 2 : type == CODES_E4M3 ? 4 : 8; }

static inline int64_t part(int64_t cols, int64_t type) { return (cols + per_word(type) - 1) / per_word(type); }

static inline int64_t place(int64_t j, int64_t cols, int64_t type) { return j % per_word(type) * part(cols, type) + j / per_word(type); }

enum { SLACK = 8 }; /* floats that a vector of cols channels may take more than cols */

static inline void fetch(const void *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)from + line + AHEAD);
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && BYTES == 64 && !defined(NO_PAIRS)
#include "pairs.h"
#else
static inline int in_pairs(int64_t x_type, int64_t weight_type, int64_t cols) { return (void)x_type, (void)weight_type, (void)cols, 0; }
static inline int64_t pair_place(int64_t j, int64_t weight_type) { return (void)weight_type, j; }
static inline void dots_pairs(const char *w, const uint8_t *scale, const float *x, int64_t stride, int64_t count, int64_t cols, int64_t type,
                              float *to) {
    (void)w, (void)scale, (void)x, (void)stride, (void)count, (void)cols, (void)type, (void)to;
}
#endif

/* Channel j of a vector in x_type, laid out for such a weight. */
static inline void lay(float *to, int64_t j, float value, int64_t x_type, int64_t weight_type, int64_t cols) {
    if (in_pairs(x_type, weight_type, cols))
        ((uint16_t *)to)[pair_place(j, weight_type)] = bfloat16(value);
    else
        to[place(j, cols, weight_type)] = value;
}

static inline void spread(const void *x, int64_t type, int64_t weight_type, int64_t cols, float *to) {
    if (in_pairs(type, weight_type, cols)) {
        for (int64_t j = 0; j < cols; j++) ((uint16_t *)to)[pair_place(j, weight_type)] = ((const uint16_t *)x)[j];
        return;
    }
    int64_t step = per_word(weight_type), size = part(cols, weight_type);
    FOR_TYPE(type,
        for (int64_t k = 0; k < step; k++)
            for (int64_t j = k; j < cols; j += step) to[k * size + j / step] = get(x, T, j);
    )
}

static inline float dot_float32(const float *w, const float *x, int64_t cols) {
    floats a = {0}, b = {0}, c = {0}, d = {0};
    int64_t j = 0;
    for (; j + 4 * LANES <= cols; j += 4 * LANES) {
        fetch(w + j, 4 * BYTES);
        a += load(w + j) * load(x + j);
        b += load(w + j + LANES) * load(x + j + LANES);
        c += load(w + j + 2 * LANES) * load(x + j + 2 * LANES);
        d += load(w + j + 3 * LANES) * load(x + j + 3 * LANES);
    }
    float sum = total((a + b) + (c + d));
    for (; j < cols; j++) sum += w[j] * x[j];
    return sum;
}

/* Each channel of a word is a shift or a mask away from float32. */
static inline float dot_bfloat16(const uint16_t *w, const float *x, int64_t cols) {
    const float *odd = x + part(cols, BFLOAT16);
    floats a = {0}, b = {0}, c = {0}, d = {0};
    int64_t j = 0;
    for (; j + 4 * LANES <= cols; j += 4 * LANES) {
        fetch(w + j, 2 * BYTES);
        words p = load_words(w + j), q = load_words(w + j + 2 * LANES);
        a += (floats)(p << 16) * load(x + j / 2);
        b += (floats)(p & 0xffff0000u) * load(odd + j / 2);
        c += (floats)(q << 16) * load(x + j / 2 + LANES);
        d += (floats)(q & 0xffff0000u) * load(odd + j / 2 + LANES);
    }
    float sum = total((a + b) + (c + d));
    for (; j < cols; j++) sum += widen(w[j]) * x[place(j, cols, BFLOAT16)];
    return sum;
}

/* Code k of each word, as e4m3 gives it. */
static inline floats values_e4m3(words code, int k) {
    words magnitude = (code >> 8 * k & 0x7f) << 20;
    words nan = (words)(magnitude == 0x7f00000) & 0x7fc00000u;
    return (floats)((code << (24 - 8 * k) & 0x80000000u) | magnitude | nan) * 0x1p120f;
}

static inline float dot_e4m3(const uint8_t *w, const uint8_t *scale, const float *x, int64_t cols) {
    int64_t quarter = part(cols, CODES_E4M3);
    floats sum = {0};
    float rest = 0;
    for (int64_t begin = 0; begin < cols; begin += E4M3_BLOCK) {
        int64_t end = cols - begin < E4M3_BLOCK ? cols : begin + E4M3_BLOCK, j = begin;
        float factor = scale_value(scale[begin / E4M3_BLOCK]), few = 0;
        floats a = {0}, b = {0};
        fetch(w + begin, E4M3_BLOCK);
        for (; j + 4 * LANES <= end; j += 4 * LANES) {
            words code = load_words(w + j);
            const float *at = x + j / 4;
            a += values_e4m3(code, 0) * load(at);
            b += values_e4m3(code, 1) * load(at + quarter);
            a += values_e4m3(code, 2) * load(at + 2 * quarter);
            b += values_e4m3(code, 3) * load(at + 3 * quarter);
        }
        for (; j < end; j++) few += e4m3(w[j]) * x[place(j, cols, CODES_E4M3)];
        sum += (a + b) * factor;
        rest += few * factor;
    }
    return total(sum) + rest;
}

/* Code k of each word. */
static inline floats values_e2m1(words code, int k) {
    words sign = code << (28 - 4 * k) & 0x80000000u;
#if defined(__GNUC__) && !defined(__clang__) && LANES >= 8 /* one instruction looks up a register of codes by their last bits */
    floats magnitude;
    for (int lane = 0; lane < LANES; lane++) magnitude[lane] = e2m1((uint8_t)(lane % 8));
    return (floats)((words)__builtin_shuffle(magnitude, code >> 4 * k) | sign);
#else /* 1.m * 2^e is twice the value, or where e is 0 the value plus 1: whichever gives less */
    floats twice = (floats)(((code >> 4 * k & 7) << 22) + (127u << 23)), less = twice - 1, half = twice * .5f;
    words first = (words)(less < half);
    return (floats)((first & (words)less) | (~first & (words)half) | sign);
#endif
}

/* Scales of a register of words, four of which are a group. */
static inline floats scales_e2m1(const uint8_t *scale) {
    uint32_t bytes = 0;
    words shift;
    memcpy(&bytes, scale, LANES / 4);
    for (int lane = 0; lane < LANES; lane++) shift[lane] = lane / 4 * 8;
    words byte = ((words){0} + bytes) >> shift & 0xff;
    return (floats)(byte << 23 | ((words)(byte == 0) & 0x400000) | ((words)(byte == 255) & 0x7fc00000));
}

static inline float dot_e2m1(const uint8_t *w, const uint8_t *scale, const float *x, int64_t cols) {
    int64_t eighth = cols / 8, j = 0;
    floats sum = {0};
    float rest = 0;
    for (; j + 8 * LANES <= cols; j += 8 * LANES) { /* a word is a quarter of a group */
        words code = load_words(w + j / 2);
        const float *at = x + j / 8;
        floats a = {0}, b = {0};
        fetch(w + j / 2, BYTES);
        for (int k = 0; k < 8; k += 2) {
            a += values_e2m1(code, k) * load(at + k * eighth);
            b += values_e2m1(code, k + 1) * load(at + (k + 1) * eighth);
        }
        sum += (a + b) * scales_e2m1(scale + j / E2M1_GROUP);
    }
    for (; j < cols; j++) rest += e2m1(w[j / 2] >> j % 2 * 4) * x[place(j, cols, CODES_E2M1)] * scale_value(scale[j / E2M1_GROUP]);
    return total(sum) + rest;
}

/* Row i of a weight times count vectors of x_type that were spread for its type, a stride of floats apart. One order of sums for each, whoever
 * asks and whatever is beside it. */
static inline void dots(const weight *w, int64_t i, int64_t cols, const float *x, int64_t x_type, int64_t stride, int64_t count, float *to) {
    int64_t scales = (cols + E4M3_BLOCK - 1) / E4M3_BLOCK;
    const uint8_t *scale = w->type == CODES_E4M3 ? w->scale + i / E4M3_BLOCK * scales : w->scale + i * (cols / E2M1_GROUP);
    const char *row = w->data + (w->type == CODES_E2M1 ? i * (cols / 2) : i * cols * (w->type == FLOAT32 ? 4 : w->type == BFLOAT16 ? 2 : 1));
    if (in_pairs(x_type, w->type, cols)) {
        dots_pairs(row, scale, x, stride, count, cols, w->type, to);
        return;
    }
    for (int64_t v = 0; v < count; v++, x += stride) switch (w->type) {
        case FLOAT32: to[v] = dot_float32((const float *)row, x, cols); break;
        case BFLOAT16: to[v] = dot_bfloat16((const uint16_t *)row, x, cols); break;
        case CODES_E4M3: to[v] = dot_e4m3((const uint8_t *)row, scale, x, cols); break;
        default: to[v] = dot_e2m1((const uint8_t *)row, scale, x, cols);
        }
}

static inline float dot(const weight *w, int64_t i, int64_t cols, const float *x, int64_t x_type) {
    float one;
    dots(w, i, cols, x, x_type, 0, 1, &one);
    return one;
}

enum { FEW = 8 }; /* vectors at most */
