/* E4M3 and E2M1 codes in blocks with E8M0 scales. */
#pragma once
#include "values.h"

typedef struct {
    int mantissa, least; /* bits; exponent of the least normal number */
    float max, floor;    /* least amax that a scale is made for */
} format;

static const format E4M3 = {3, -6, 448, 1e-4f}, E2M1 = {1, 0, 6, 6 * 0x1p-126f};

static inline float scale_value(uint32_t byte) { return byte == 255 ? NAN : byte ? of_bits(byte << 23) : 0x1p-127f; }

/* A block of n values, whole registers, over the least power of two that fits them into the format, clamped and rounded to nearest even on
 * its grid, in place: adding 1.5 * 2^(exponent + 23 - mantissa) leaves no room for finer bits. The power's exponent byte, between 1 and 253,
 * so that multiplying by the inverse is dividing; 255 beside what is not finite: values are then as they were. */
static inline uint32_t to_grid(float *x, int64_t n, format f) {
    words top = {0}, least = (words){0} + ((uint32_t)(127 + f.least) << 23), half = (words){0} + (((uint32_t)(23 - f.mantissa) << 23) + (1u << 22));
    for (int64_t j = 0; j < n; j += LANES) {
        words size = (words)load(x + j) & 0x7fffffff;
        top = (words)choose((words)(size > top), (floats)size, (floats)top);
    }
    uint32_t most = bits_of(f.floor);
    for (int l = 0; l < LANES; l++) most = top[l] > most ? top[l] : most;
    if (most >= 0x7f800000) return 255;
    uint32_t byte = (bits_of(of_bits(most) * (1 / f.max)) + 0x7fffff) >> 23;
    float inverse = 1 / scale_value(byte);
    for (int64_t j = 0; j < n; j += LANES) {
        floats y = load(x + j) * inverse;
        words sign = (words)y & 0x80000000u;
        y = choose((words)(y > f.max), all(f.max), choose((words)(y < -f.max), all(-f.max), y));
        words exponent = (words)y & 0x7f800000;
        floats shift = (floats)((words)choose((words)(exponent > least), (floats)exponent, (floats)least) + half);
        store(x + j, (floats)(((words)((y + shift) - shift) & 0x7fffffff) | sign));
    }
    return byte;
}

/* The same, times the power again; says whether all were finite. */
static inline int quantise(float *x, int64_t n, format f) {
    uint32_t byte = to_grid(x, n, f);
    if (byte == 255) return 0;
    for (int64_t j = 0; j < n; j += LANES) store(x + j, load(x + j) * scale_value(byte));
    return 1;
}

/* Code of a value on the grid. */
static inline uint8_t code_of(float value, format f) {
    uint32_t magnitude = bits_of(value) & 0x7fffffff, least = (uint32_t)(127 + f.least) << 23;
    uint32_t small = (uint32_t)(fabsf(value) * (float)(1 << (f.mantissa - f.least)));
    uint32_t normal = ((magnitude - least) >> (23 - f.mantissa)) + (1u << f.mantissa);
    int sign = f.mantissa == 3 ? 7 : 3;
    return (uint8_t)((magnitude < least ? small : normal) | bits_of(value) >> 31 << sign);
}

/* Sign and magnitude in float32's places are the value times 2^-120, subnormal ones too. */
static inline float e4m3(uint8_t code) {
    uint32_t magnitude = code & 0x7f, nan = magnitude == 0x7f ? 0x7fc00000 : 0;
    return of_bits((code & 0x80u) << 24 | magnitude << 20 | nan) * 0x1p120f;
}

static inline float e2m1(uint8_t code) {
    static const float values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    return values[code & 15];
}

/* Registers of words: code k of each, and scales of one byte each. */
static inline floats values_e4m3(words code, int k) {
    words magnitude = (code >> 8 * k & 0x7f) << 20;
    words nan = (words)(magnitude == 0x7f00000) & 0x7fc00000u;
    return (floats)((code << (24 - 8 * k) & 0x80000000u) | magnitude | nan) * 0x1p120f;
}

static inline floats values_e2m1(words code, int k) {
#if defined(__GNUC__) && !defined(__clang__) && LANES >= 8 /* one instruction looks up a register by codes' last bits */
    floats values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = e2m1((uint8_t)lane);
    floats found = (floats)__builtin_shuffle((words)values, code >> 4 * k);
    return LANES == 16 ? found : (floats)((words)found | (code << (28 - 4 * k) & 0x80000000u));
#else /* 1.m * 2^e is twice the value, or where e is 0 the value plus 1: whichever gives less */
    words sign = code << (28 - 4 * k) & 0x80000000u;
    floats twice = (floats)(((code >> 4 * k & 7) << 22) + (127u << 23)), less = twice - 1, half = twice * .5f;
    words first = (words)(less < half);
    return (floats)((first & (words)less) | (~first & (words)half) | sign);
#endif
}

static inline floats values_e8m0(words byte) {
    return (floats)(byte << 23 | ((words)(byte == 0) & 0x400000) | ((words)(byte == 255) & 0x7fc00000));
}
