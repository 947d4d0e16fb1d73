/* Float32 and BF16 values, one by one and in vector registers. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "team.h"

#ifndef BYTES /* of a vector register */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
#endif
#define LANES (BYTES / 4)

/* Whether BF16 values are multiplied in pairs, by the instructions for them. */
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && BYTES == 64
#define BY_PAIRS 1
#else
#define BY_PAIRS 0
#endif

enum { FLOAT32, BFLOAT16 };

/* Does something with T for the type, a constant: its loops are compiled once for each. */
#define FOR_TYPE(type, ...)        \
    if ((type) == FLOAT32) {       \
        enum { T = FLOAT32 };      \
        __VA_ARGS__                \
    } else {                       \
        enum { T = BFLOAT16 };     \
        __VA_ARGS__                \
    }

typedef float floats __attribute__((vector_size(BYTES)));
typedef uint32_t words __attribute__((vector_size(BYTES)));

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float widen(uint16_t bits) { return of_bits((uint32_t)bits << 16); }

static inline uint16_t bfloat16(float value) { /* to nearest even; NaN stays NaN */
    uint32_t bits = bits_of(value);
    return isnan(value) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

static inline float get(const void *from, int64_t type, int64_t i) {
    return type == FLOAT32 ? ((const float *)from)[i] : widen(((const uint16_t *)from)[i]);
}

static inline void put(void *to, int64_t type, int64_t i, float value) {
    if (type == FLOAT32)
        ((float *)to)[i] = value;
    else
        ((uint16_t *)to)[i] = bfloat16(value);
}

static inline float rounded(float value, int64_t type) { return type == FLOAT32 ? value : widen(bfloat16(value)); }

static inline floats load(const float *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline float total(floats v) {
    typedef float four __attribute__((vector_size(16)));
    four part[LANES / 4], sum;
    memcpy(part, &v, sizeof v);
    sum = part[0];
#if BYTES == 64
    sum = (sum + part[1]) + (part[2] + part[3]);
#elif BYTES == 32
    sum += part[1];
#endif
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline words load_words(const void *from) {
    words v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline floats get_lanes(const void *from, int64_t type, int64_t i) { /* LANES values from i on */
    typedef uint16_t shorts __attribute__((vector_size(BYTES / 2)));
    shorts half;
    if (type == FLOAT32) return load((const float *)from + i);
    memcpy(&half, (const uint16_t *)from + i, sizeof half);
    return (floats)(__builtin_convertvector(half, words) << 16);
}

static inline floats rounded_lanes(floats v, int64_t type) { /* as ``rounded`` */
    words bits = (words)v, up = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return type == FLOAT32 ? v : (floats)(((words)(v != v) & 0x7fc00000u) | (~(words)(v != v) & up));
}

static inline void put_lanes(void *to, int64_t type, int64_t i, floats v) {
    typedef uint16_t shorts __attribute__((vector_size(BYTES / 2)));
    v = rounded_lanes(v, type);
    shorts half = __builtin_convertvector((words)v >> 16, shorts);
    if (type == FLOAT32)
        memcpy((float *)to + i, &v, sizeof v);
    else
        memcpy((uint16_t *)to + i, &half, sizeof half);
}

static inline void put_many(void *to, int64_t type, int64_t i, const float *from, int64_t count) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        floats v;
        memcpy(&v, from + j, sizeof v);
        put_lanes(to, type, i + j, v);
    }
    for (; j < count; j++) put(to, type, i + j, from[j]);
}

static inline void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

/* Less 0, which any value stays: 0 plus -0 would be 0, so that a register would be added to. */
static inline floats all(float value) { return value - (floats){0}; }

static inline floats choose(words mask, floats yes, floats no) { return (floats)((mask & (words)yes) | (~mask & (words)no)); }

/* e^x within two units, and where it is below the normal numbers within the least of all; NaN stays. */
static inline floats exponential(floats x) {
    typedef int32_t whole_numbers __attribute__((vector_size(BYTES)));
    floats low = choose((words)(x < -104.f), all(-104.f), x), y = choose((words)(low > 88.f), all(88.f), low);
    floats n = y * 1.44269504f + 12582912.f; /* 1.5 * 2^23: what is left is a whole number */
    whole_numbers power = (whole_numbers)n - 0x4b400000, half = power >> 1; /* 2^power in two steps, each of which is a normal number */
    n -= 12582912.f;
    floats r = y - n * 0.693359375f + n * 2.12194440e-4f, p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return choose((words)(x != x), x, p * (floats)((half + 127) << 23) * (floats)((power - half + 127) << 23));
}

#if BYTES == 64
#define FOR_LANES(f, bit) {f(0, bit), f(1, bit), f(2, bit), f(3, bit), f(4, bit), f(5, bit), f(6, bit), f(7, bit), \
                           f(8, bit), f(9, bit), f(10, bit), f(11, bit), f(12, bit), f(13, bit), f(14, bit), f(15, bit)}
#elif BYTES == 32
#define FOR_LANES(f, bit) {f(0, bit), f(1, bit), f(2, bit), f(3, bit), f(4, bit), f(5, bit), f(6, bit), f(7, bit)}
#else
#define FOR_LANES(f, bit) {f(0, bit), f(1, bit), f(2, bit), f(3, bit)}
#endif
#define FROM_LOW(l, bit) ((l) & (bit) ? LANES + ((l) ^ (bit)) : (l))
#define FROM_HIGH(l, bit) ((l) & (bit) ? LANES + (l) : (l) | (bit))

/* One bit of a register's number and one of a lane's change places. */
#define EXCHANGE(bit)                                                                                \
    if ((bit) < LANES) {                                                                             \
        static const words low = FOR_LANES(FROM_LOW, bit), high = FOR_LANES(FROM_HIGH, bit);         \
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & (bit))) {                 \
            words a = r[i], b = r[(i | (bit)) % LANES];                                              \
            r[i] = __builtin_shuffle(a, b, low);                                                     \
            r[(i | (bit)) % LANES] = __builtin_shuffle(a, b, high);                                  \
        }                                                                                            \
    }

/* Turns a square of words: to[j * to_stride + i] = from[i * stride + j]. */
static inline __attribute__((always_inline)) void turn(const void *rows, int64_t stride, void *columns, int64_t to_stride) {
    const uint32_t *from = rows;
    uint32_t *to = columns;
#if defined(__GNUC__) && !defined(__clang__)
    words r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) r[i] = load_words(from + i * stride);
    EXCHANGE(1)
    EXCHANGE(2)
    EXCHANGE(4)
    EXCHANGE(8)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_stride, &r[i], sizeof r[i]);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j * to_stride + i] = from[i * stride + j];
#endif
}
