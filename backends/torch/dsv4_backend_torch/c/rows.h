/* Rows of the cache: packed as they are written, unpacked as they are read. */
#pragma once
#include "formats.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { PLAIN, KV, KEY };
enum { KV_BLOCK = 64, KEY_BLOCK = 32 };

/* How a row is stored: RowLayout of dsv4_core. width: bytes of a packed row; rope: its last channels, stored in BF16. */
typedef struct {
    int64_t kind, dim, rope, width;
} layout;

/* LANES codes, each in a word of its own; what stands above a code there does not count. Of the general form a compiler makes a move for each
 * byte. */
static inline words codes_e4m3(const uint8_t *from) {
#if defined(__AVX512F__) && BYTES == 64
    return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__) && BYTES == 32
    return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes code;
    memcpy(&code, from, sizeof code);
    return __builtin_convertvector(code, words);
#endif
}

static inline words codes_e2m1(const uint8_t *from) {
    typedef uint64_t pairs __attribute__((vector_size(BYTES)));
#if defined(__AVX512F__) && BYTES == 64
    pairs pair = (pairs)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)from));
#elif defined(__AVX2__) && BYTES == 32
    pairs pair = (pairs)_mm256_cvtepu8_epi64(_mm_loadu_si32(from));
#else
    typedef uint8_t bytes __attribute__((vector_size(LANES / 2)));
    bytes code;
    memcpy(&code, from, sizeof code);
    pairs pair = __builtin_convertvector(code, pairs);
#endif
    return (words)(pair | pair << 28);
}

static inline void unpack(const uint8_t *stored, void *to, int64_t type, int64_t at, const layout *l) {
    int64_t block = l->kind == KV ? KV_BLOCK : KEY_BLOCK, channels = l->dim - l->rope;
    const uint8_t *scales = stored + (l->kind == KV ? channels : channels / 2);
    for (int64_t begin = 0; begin < channels; begin += block, at += block) {
        float scale = scale_value(scales[begin / block]);
        for (int64_t j = 0; j < block; j += LANES) {
            floats value = l->kind == KV ? values_e4m3(codes_e4m3(stored + begin + j), 0) : values_e2m1(codes_e2m1(stored + (begin + j) / 2), 0);
            FOR_TYPE(type, put_lanes(to, T, at + j, value * scale);)
        }
    }
    const uint8_t *plain = stored + l->width - 2 * l->rope;
    int64_t j = 0;
    FOR_TYPE(type, for (; j + LANES <= l->rope; j += LANES) put_lanes(to, T, at + j, get_lanes(plain + 2 * j, BFLOAT16, 0));)
    for (; j < l->rope; j++) {
        uint16_t bits;
        memcpy(&bits, plain + 2 * j, 2);
        put(to, type, at + j, widen(bits));
    }
}

/* Slot of a cache [slots, width], plain ones of plain_type, as dim channels of type; zeros for -1. Says whether there is such a slot. */
static inline int read_slot(const char *cache, int64_t slots, int64_t plain_type, int64_t slot, void *to, int64_t type, int64_t at,
                            const layout *l) {
    if (slot >= slots) return 0;
    if (slot < 0)
        for (int64_t j = 0; j < l->dim; j++) put(to, type, at + j, 0);
    else if (l->kind == PLAIN)
        for (int64_t j = 0; j < l->dim; j++) put(to, type, at + j, get(cache, plain_type, slot * l->dim + j));
    else
        unpack((const uint8_t *)cache + slot * l->width, to, type, at, l);
    return 1;
}
