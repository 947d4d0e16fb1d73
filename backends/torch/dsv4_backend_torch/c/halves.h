/* Codes become float32 by way of half precision, which AVX2's CPUs widen (F16C): E4M3's bits in half precision's places are the value times
 * 2^-8, subnormal ones too, and each E2M1 value is the high byte of a half. */
#pragma once
#include <immintrin.h>
#define E4M3_BY_HALVES

INLINE int64_t e4m3_place(int64_t j, int64_t cols) { return (void)cols, j; }

/* Eight or sixteen halves. */
#if BYTES == 64
typedef __m256i halves;
INLINE floats widen_halves(halves h) { return (floats)_mm512_cvtph_ps(h); }
INLINE halves halves_of_codes(const uint8_t *code) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)code)); }
INLINE halves in_place(halves code) { return _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16((short)0xbfff)); }
#else
typedef __m128i halves;
INLINE floats widen_halves(halves h) { return (floats)_mm256_cvtph_ps(h); }
INLINE halves halves_of_codes(const uint8_t *code) { return _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)code)); }
INLINE halves in_place(halves code) { return _mm_and_si128(_mm_slli_epi16(code, 7), _mm_set1_epi16((short)0xbfff)); }
#endif

/* A NaN's code becomes a number here; it is looked for beside that, and makes the whole sum NaN. */
INLINE void e4m3_sums(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, float *to) {
    floats sum[SHARED] = {0};
    float rest[SHARED] = {0};
    __m256i nan = _mm256_setzero_si256(), ones = _mm256_set1_epi8(-1), sign = _mm256_set1_epi8((char)0x80);
    for (int64_t begin = 0; begin < cols; begin += E4M3_BLOCK) {
        int64_t end = cols - begin < E4M3_BLOCK ? cols : begin + E4M3_BLOCK, j = begin;
        float factor = scale_value(scale[begin / E4M3_BLOCK]);
        floats part[SHARED][2] = {0};
        fetch(w + begin, E4M3_BLOCK);
        for (; j + 32 <= end; j += 32) {
            nan = _mm256_or_si256(nan, _mm256_cmpeq_epi8(_mm256_or_si256(_mm256_loadu_si256((const __m256i *)(w + j)), sign), ones));
            for (int k = 0; k < 32 / LANES; k++) {
                floats value = widen_halves(in_place(halves_of_codes(w + j + k * LANES)));
                for (int v = 0; v < count; v++) part[v][k % 2] += value * load(x[v] + j + k * LANES);
            }
        }
        for (int v = 0; v < count; v++) sum[v] += (part[v][0] + part[v][1]) * factor;
        for (int v = 0; j < end && v < count; v++) /* apart: with a loop inside, what is above would not stay in registers */
            for (int64_t i = j; i < end; i++) rest[v] += e4m3(w[i]) * factor * x[v][i];
    }
    for (int v = 0; v < count; v++) to[v] = _mm256_testz_si256(nan, nan) ? total(sum[v]) * 256 + rest[v] : NAN;
}

#if BYTES == 32
#define E2M1_BY_HALVES
/* Of 64 channels the even ones stand before the odd ones, and of these the first eight of either group before the last eight. */
INLINE int64_t e2m1_place(int64_t j, int64_t cols) {
    return j < cols / 64 * 64 ? j / 64 * 64 + (j % 2 * 4 + j % 32 / 16 * 2 + j % 64 / 32) * 8 + j % 16 / 2 : j;
}

INLINE void e2m1_sums(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, float *to) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46, (char)0x80, (char)0xb8, (char)0xbc,
                                                              (char)0xbe, (char)0xc0, (char)0xc2, (char)0xc4, (char)0xc6));
    __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    floats sum[SHARED] = {0};
    int64_t j = 0;
    for (; j + 64 <= cols; j += 64) { /* two groups */
        __m256i code = _mm256_loadu_si256((const __m256i *)(w + j / 2));
        floats part[SHARED][2] = {0};
        fetch(w + j / 2, 32);
        for (int k = 0; k < 2; k++, code = _mm256_srli_epi16(code, 4)) {
            __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(code, nibble));
            __m256i wide[2] = {_mm256_unpacklo_epi8(zero, high), _mm256_unpackhi_epi8(zero, high)};
            for (int half = 0; half < 2; half++) {
                floats first = widen_halves(_mm256_castsi256_si128(wide[half])), second = widen_halves(_mm256_extracti128_si256(wide[half], 1));
                for (int v = 0; v < count; v++) {
                    const float *at = x[v] + j + (4 * k + 2 * half) * 8;
                    part[v][0] += first * load(at);
                    part[v][1] += second * load(at + 8);
                }
            }
        }
        float one = scale_value(scale[j / E2M1_GROUP]), other = scale_value(scale[j / E2M1_GROUP + 1]);
        for (int v = 0; v < count; v++) sum[v] += part[v][0] * one + part[v][1] * other;
    }
    for (int v = 0; v < count; v++) {
        float rest = 0;
        for (int64_t i = j; i < cols; i++) rest += e2m1(w[i / 2] >> i % 2 * 4) * x[v][i] * scale_value(scale[i / E2M1_GROUP]);
        to[v] = total(sum[v]) + rest;
    }
}
#endif
