/* Products with a vector in BF16, two channels at a time, where the CPU has such an instruction (AVX-512 BF16) and one that looks up 64
 * bytes at once (VBMI): codes become BF16 by two look-ups, which is exact. Sums are float32; BF16 values below the normal ones count as 0.
 */
#pragma once
#include <immintrin.h>

INLINE int in_pairs(int64_t x_type, int64_t weight_type, int64_t cols) {
    return x_type == BFLOAT16 && weight_type != FLOAT32 && cols % 128 == 0;
}

/* Where channel j stands, so that it meets its weight: bytes are widened in halves of sixteen (E4M3), and each nibble of a word of four has
 * a register of its own (E2M1). */
INLINE int64_t pair_place(int64_t j, int64_t weight_type) {
    if (weight_type == CODES_E4M3) return j / 64 * 64 + j % 16 / 8 * 32 + j % 64 / 16 * 8 + j % 8;
    if (weight_type == CODES_E2M1) return j / 128 * 128 + j % 4 * 32 + j % 128 / 4;
    return j;
}

static inline __m512 add_pairs(__m512 sum, __m512i w, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

/* 128 channels. */
static inline __m512 four_products(const __m512i *w, const uint16_t *x) {
    __m512 a = add_pairs(_mm512_setzero_ps(), w[0], x), b = add_pairs(_mm512_setzero_ps(), w[1], x + 32);
    return add_pairs(a, w[2], x + 64) + add_pairs(b, w[3], x + 96);
}

INLINE const uint16_t *of(const float *x) { return (const uint16_t *)x; }

INLINE void pairs_bfloat16(const uint16_t *w, const float *const *x, int count, int64_t cols, __m512 *sums) {
    __m512 part[SHARED][4];
    for (int v = 0; v < count; v++)
        for (int k = 0; k < 4; k++) part[v][k] = _mm512_setzero_ps();
    for (int64_t j = 0; j < cols; j += 128) {
        fetch(w + j, 256);
        for (int k = 0; k < 4; k++) {
            __m512i pairs = _mm512_loadu_si512(w + j + 32 * k);
            for (int v = 0; v < count; v++) part[v][k] = add_pairs(part[v][k], pairs, of(x[v]) + j + 32 * k);
        }
    }
    for (int v = 0; v < count; v++) sums[v] = (part[v][0] + part[v][1]) + (part[v][2] + part[v][3]);
}

/* Bytes of the BF16 of every magnitude of E4M3, and the BF16 of E2M1's codes in the last four bits of five. */
static uint8_t e4m3_high[128], e4m3_low[128];
static uint16_t e2m1_values[32];

__attribute__((constructor)) static void fill_tables(void) {
    for (int code = 0; code < 128; code++) {
        uint16_t bits = bfloat16(e4m3((uint8_t)code));
        e4m3_high[code] = (uint8_t)(bits >> 8);
        e4m3_low[code] = (uint8_t)bits;
    }
    for (int code = 0; code < 32; code++) e2m1_values[code] = bfloat16(e2m1((uint8_t)code));
}

INLINE void pairs_e4m3(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols,
                              __m512 *sums) {
    __m512i high0 = _mm512_loadu_si512(e4m3_high), high1 = _mm512_loadu_si512(e4m3_high + 64), sign = _mm512_set1_epi8((char)0x80);
    __m512i low0 = _mm512_loadu_si512(e4m3_low), low1 = _mm512_loadu_si512(e4m3_low + 64);
    for (int v = 0; v < count; v++) sums[v] = _mm512_setzero_ps();
    for (int64_t j = 0; j < cols; j += E4M3_BLOCK) {
        __m512 factor = _mm512_set1_ps(scale_value(scale[j / E4M3_BLOCK]));
        __m512i wide[4];
        fetch(w + j, E4M3_BLOCK);
        for (int half = 0; half < 2; half++) {
            __m512i code = _mm512_loadu_si512(w + j + 64 * half), low = _mm512_permutex2var_epi8(low0, code, low1);
            __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, code, high1), _mm512_and_si512(code, sign));
            wide[2 * half] = _mm512_unpacklo_epi8(low, high);
            wide[2 * half + 1] = _mm512_unpackhi_epi8(low, high);
        }
        for (int v = 0; v < count; v++) sums[v] = _mm512_fmadd_ps(four_products(wide, of(x[v]) + j), factor, sums[v]);
    }
}

/* Scales of four groups, each for a quarter of a register: exponents, but for 2^-127 and NaN. */
static inline __m512 four_scales(const uint8_t *scale) {
    int32_t bytes;
    memcpy(&bytes, scale, 4);
    __m512i byte = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128(bytes), _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)));
    __m512i value = _mm512_slli_epi32(byte, 23);
    value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(byte, _mm512_setzero_si512()), _mm512_set1_epi32(0x400000));
    return (__m512)_mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
}

INLINE void pairs_e2m1(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols,
                              __m512 *sums) {
    __m512i table = _mm512_loadu_si512(e2m1_values);
    for (int v = 0; v < count; v++) sums[v] = _mm512_setzero_ps();
    for (int64_t j = 0; j < cols; j += 128) { /* a group is a quarter of a register */
        __m512i code = _mm512_loadu_si512(w + j / 2);
        __m512i wide[4] = {_mm512_permutexvar_epi16(code, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 4), table),
                           _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 8), table), _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 12), table)};
        __m512 factor = four_scales(scale + j / E2M1_GROUP);
        fetch(w + j / 2, 64);
        for (int v = 0; v < count; v++) sums[v] = _mm512_fmadd_ps(four_products(wide, of(x[v]) + j), factor, sums[v]);
    }
}

INLINE void pair_sums(const char *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, int64_t type, float *to) {
    __m512 sums[SHARED];
    if (type == BFLOAT16)
        pairs_bfloat16((const uint16_t *)w, x, count, cols, sums);
    else if (type == CODES_E4M3)
        pairs_e4m3((const uint8_t *)w, scale, x, count, cols, sums);
    else
        pairs_e2m1((const uint8_t *)w, scale, x, count, cols, sums);
    for (int v = 0; v < count; v++) to[v] = total((floats)sums[v]);
}
