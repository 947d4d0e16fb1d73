/* E4M3 and E2M1 codes in blocks with E8M0 scales. */
#pragma once
#include "values.h"

typedef struct {
    int mantissa, least; /* bits; exponent of the least normal number */
    float max, floor;    /* least amax that a scale is made for */
} format;

static const format E4M3 = {3, -6, 448, 1e-4f}, E2M1 = {1, 0, 6, 6 * 0x1p-126f};

/* Exponent byte of the least power of two that fits a block into the format; 255 beside what is not finite. */
static inline uint32_t scale_byte(const float *x, int64_t block, format f) {
    float amax = f.floor;
    int finite = 1;
    for (int64_t j = 0; j < block; j++) {
        float value = fabsf(x[j]);
        finite &= value <= 0x1.fffffep127f;
        amax = value > amax ? value : amax;
    }
    return finite ? (bits_of(amax * (1 / f.max)) + 0x7fffff) >> 23 : 255;
}

static inline float scale_value(uint32_t byte) { return byte == 255 ? NAN : byte ? of_bits(byte << 23) : 0x1p-127f; }

/* Clamped and rounded to nearest even on the format's grid: adding 1.5 * 2^(exponent + 23 - mantissa) leaves no room for finer bits. */
static inline float on_grid(float x, format f) {
    float y = x > f.max ? f.max : x < -f.max ? -f.max : x;
    uint32_t exponent = bits_of(y) & 0x7f800000, least = (uint32_t)(127 + f.least) << 23;
    float shift = of_bits((exponent > least ? exponent : least) + ((uint32_t)(23 - f.mantissa) << 23) + (1u << 22));
    return copysignf((y + shift) - shift, y);
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
