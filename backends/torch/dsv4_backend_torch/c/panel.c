/* Panels: a few columns of all their rows are decoded as they lie, then turned so that a register holds one channel of many rows. */
#include "panel.h"

#if BY_PAIRS
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { PART = E4M3_BLOCK };              /* columns that are decoded at a time */
enum { LEAST_SCALE = 48, MOST_SCALE = 240 }; /* E8M0: codes times these are normal BF16 numbers, and so are products, see matmul.py */

static int64_t whole(int64_t cols) { return (cols + PART - 1) / PART * PART; }

static int64_t one_panel(int64_t cols) { return whole(cols) * PANEL * (int64_t)sizeof(float); }

int64_t panel_bytes(int64_t cols, int64_t panels) { return panels * one_panel(cols) + whole(cols) * IN_REGISTERS * (int64_t)sizeof(float); }

panel panel_in(char *scratch, int64_t cols, int64_t n) {
    float *vectors = (float *)scratch;
    return (panel){cols, 0, vectors + whole(cols) * IN_REGISTERS + n * whole(cols) * PANEL, vectors, NULL, 0};
}

/* A word of a row holds so many values. */
static int64_t values_of(int64_t type) { return type == FLOAT32 ? 1 : type == BFLOAT16 ? 2 : type == CODES_E4M3 ? 4 : 8; }

/* Value k of each word of a type, a constant. */
INLINE floats value_of(words word, int k, int64_t type) {
    if (type == FLOAT32) return (floats)word;
    if (type == BFLOAT16) return (floats)(k ? word & 0xffff0000u : word << 16);
    return type == CODES_E4M3 ? values_e4m3(word, k) : values_e2m1(word, k);
}

/* As memcpy, quickly where n is a multiple of ``often``, a constant: of a number that it does not know a compiler makes slow string moves. */
INLINE void copy_bytes(void *to, const void *from, int64_t n, int64_t often) {
    if (n % often) memcpy(to, from, n);
    else
        for (int64_t i = 0; i < n; i += often) memcpy((char *)to + i, (const char *)from + i, often);
}

/* Bytes of scales of PART columns of rows, a word for each row. */
static void fetch_scales(const weight *w, int64_t first, int64_t rows, int64_t cols, int64_t begin, int64_t n, uint32_t *scales) {
    int64_t blocks = (cols + E4M3_BLOCK - 1) / E4M3_BLOCK, groups = cols / E2M1_GROUP;
    for (int64_t r = 0; r < rows; r++) {
        scales[r] = 0;
        if (w->type == CODES_E4M3)
            scales[r] = w->scale[(first + r) / E4M3_BLOCK * blocks + begin / E4M3_BLOCK];
        else
            copy_bytes(scales + r, w->scale + (first + r) * groups + begin / E2M1_GROUP, n / E2M1_GROUP, 4);
    }
}

/* Words of PANEL rows, ``width`` apart, to columns of floats, of which ``count`` words are needed. Words are turned before they are decoded:
 * a register then holds the same columns of many rows. */
INLINE void decode_words(const uint32_t *part, int64_t width, int64_t count, const uint32_t *scales, int64_t type, float *to) {
    enum { GROUPS = PART / E2M1_GROUP };
    int64_t each = values_of(type);
    uint32_t turned[LANES][LANES] __attribute__((aligned(64)));
    for (int64_t r = 0; r < PANEL; r += LANES) {
        floats scale[GROUPS];
        for (int g = 0; type > BFLOAT16 && g < (type == CODES_E2M1 ? GROUPS : 1); g++) scale[g] = values_e8m0(load_words(scales + r) >> 8 * g & 0xff);
        for (int64_t k = 0; k < count; k += LANES) {
            turn(part + r * width + k, width, turned, LANES);
            for (int64_t i = 0; i < LANES && k + i < count; i++) {
                words word = load_words(turned[i]);
                for (int v = 0; v < each; v++) {
                    floats value = value_of(word, v, type);
                    if (type > BFLOAT16) value *= scale[type == CODES_E2M1 ? (k + i) * each / E2M1_GROUP : 0];
                    store(to + ((k + i) * each + v) * PANEL + r, value);
                }
            }
        }
    }
}

#if BY_PAIRS
static uint16_t e4m3_bits[128], e2m1_bits[32];

__attribute__((constructor)) static void fill_bits(void) {
    for (int code = 0; code < 128; code++) e4m3_bits[code] = bfloat16(e4m3((uint8_t)code));
    for (int code = 0; code < 32; code++) e2m1_bits[code] = bfloat16(e2m1((uint8_t)code));
}

/* The bytes of E4M3's magnitudes times a power of two: exponents are added, but to 0 and NaN. */
typedef struct {
    __m512i low[2], high[2];
} e4m3_table;

static e4m3_table e4m3_times(int scale) {
    __m512i exponent = _mm512_set1_epi16((short)((scale - 127) * 128)), value[4];
    for (int k = 0; k < 4; k++) {
        __mmask32 scaled = k == 0 ? 0xfffffffe : k == 3 ? 0x7fffffff : 0xffffffff;
        __m512i one = _mm512_loadu_si512(e4m3_bits + 32 * k);
        value[k] = _mm512_mask_add_epi16(one, scaled, one, exponent);
    }
    e4m3_table table;
    for (int half = 0; half < 2; half++) {
        __m256i low0 = _mm512_cvtepi16_epi8(value[2 * half]), low1 = _mm512_cvtepi16_epi8(value[2 * half + 1]);
        __m256i high0 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(value[2 * half], 8));
        __m256i high1 = _mm512_cvtepi16_epi8(_mm512_srli_epi16(value[2 * half + 1], 8));
        table.low[half] = _mm512_inserti64x4(_mm512_castsi256_si512(low0), low1, 1);
        table.high[half] = _mm512_inserti64x4(_mm512_castsi256_si512(high0), high1, 1);
    }
    return table;
}

/* 64 codes to BF16, in their order. */
INLINE void e4m3_by(const e4m3_table *t, __m512i code, uint16_t *to) {
    code = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), code);
    __m512i low = _mm512_permutex2var_epi8(t->low[0], code, t->low[1]), sign = _mm512_set1_epi8((char)0x80);
    __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(t->high[0], code, t->high[1]), _mm512_and_si512(code, sign));
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi8(low, high));
}

/* n <= PART columns of rows to BF16, rows a stride apart, of which a register more may be written; n is even, and whole groups of FP4. */
static void decode_pairs(const weight *w, int64_t first, int64_t rows, int64_t cols, int64_t begin, int64_t n, uint16_t *to, int64_t stride) {
    e4m3_table table;
    int made = -1;
    for (int64_t r = 0; r < rows; r++, to += stride) {
        int64_t row = first + r;
        if (w->type == BFLOAT16) {
            memcpy(to, (const uint16_t *)w->data + row * cols + begin, n * 2);
        } else if (w->type == CODES_E4M3) {
            const uint8_t *from = (const uint8_t *)w->data + row * cols + begin;
            int scale = w->scale[row / E4M3_BLOCK * ((cols + E4M3_BLOCK - 1) / E4M3_BLOCK) + begin / E4M3_BLOCK];
            if (scale != made) table = e4m3_times(made = scale);
            for (int64_t j = 0; j < n; j += 64) {
                __mmask64 there = n - j >= 64 ? ~0ull : (1ull << (n - j)) - 1;
                e4m3_by(&table, _mm512_maskz_loadu_epi8(there, from + j), to + j);
            }
        } else {
            const uint8_t *from = (const uint8_t *)w->data + (row * cols + begin) / 2, *scales = w->scale + (row * cols + begin) / E2M1_GROUP;
            __m512i values = _mm512_loadu_si512(e2m1_bits);
            for (int64_t j = 0; j < n; j += E2M1_GROUP) {
                __m512i exponent = _mm512_set1_epi16((short)((scales[j / E2M1_GROUP] - 127) * 128));
                __m512i scaled = _mm512_mask_add_epi16(values, 0xfefefefe, values, exponent);
                __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + j / 2)));
                __m512i code = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12)); /* of a word, the last five bits count */
                _mm512_storeu_si512(to + j, _mm512_permutexvar_epi16(code, scaled));
            }
        }
    }
}

static int scales_fit(const uint8_t *scales, int64_t n) {
    uint8_t least = 255, most = 0;
    for (int64_t i = 0; i < n; i++) {
        least = scales[i] < least ? scales[i] : least;
        most = scales[i] > most ? scales[i] : most;
    }
    return least >= LEAST_SCALE && most <= MOST_SCALE;
}

/* Whether products are of BF16 pairs, which is exact for the weight's values. */
static int fits_pairs(const weight *w, int64_t first, int64_t rows, int64_t cols, int64_t x_type) {
    if (x_type != BFLOAT16 || w->type == FLOAT32 || cols % 2) return 0;
    if (w->type == BFLOAT16) return 1;
    if (w->type == CODES_E2M1) return scales_fit(w->scale + first * (cols / E2M1_GROUP), rows * (cols / E2M1_GROUP));
    int64_t scales = (cols + E4M3_BLOCK - 1) / E4M3_BLOCK, top = first / E4M3_BLOCK, last = (first + rows - 1) / E4M3_BLOCK;
    return scales_fit(w->scale + top * scales, (last - top + 1) * scales);
}

INLINE void products_of_pairs(const panel *p, const uint16_t *const *x, int count, float (*to)[PANEL]) {
    __m512 sums[IN_REGISTERS][2];
    const __m512i *values = (const __m512i *)p->values;
    for (int v = 0; v < count; v++) sums[v][0] = sums[v][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->cols / 2; k++, values += 2) {
        __m512bh one = (__m512bh)_mm512_load_si512(values), other = (__m512bh)_mm512_load_si512(values + 1);
        for (int v = 0; v < count; v++) {
            int32_t pair;
            memcpy(&pair, x[v] + 2 * k, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[v][0] = _mm512_dpbf16_ps(sums[v][0], one, both);
            sums[v][1] = _mm512_dpbf16_ps(sums[v][1], other, both);
        }
    }
    for (int v = 0; v < count; v++) _mm512_storeu_ps(to[v], sums[v][0]), _mm512_storeu_ps(to[v] + 16, sums[v][1]);
}
#endif

INLINE void products_of_floats(const panel *p, const float *const *x, int count, float (*to)[PANEL]) {
    floats sums[IN_REGISTERS][2] = {{{0}}};
    const float *values = p->values;
    for (int64_t k = 0; k < p->cols; k++, values += PANEL) {
        floats one = load(values), other = load(values + LANES);
        for (int v = 0; v < count; v++) {
            floats factor = all(x[v][k]);
            sums[v][0] += factor * one;
            sums[v][1] += factor * other;
        }
    }
    for (int v = 0; v < count; v++) store(to[v], sums[v][0]), store(to[v] + LANES, sums[v][1]);
}

/* Rows of BF16 one below the other; those of a weight in BF16 are as they lie. */
#if BY_TILES
static void fill_rows(panel *p, const weight *w, int64_t first, int64_t rows) {
    p->stride = 2 * whole(p->cols), p->rows = (const char *)p->values;
    if (w->type == BFLOAT16 && rows == PANEL && p->cols % DEEP == 0) {
        p->stride = 2 * p->cols, p->rows = w->data + first * p->stride;
        return;
    }
    if (p->cols % DEEP) memset(p->values, 0, PANEL * p->stride);
    for (int64_t begin = 0; begin < p->cols; begin += PART) {
        int64_t n = p->cols - begin < PART ? p->cols - begin : PART;
        decode_pairs(w, first, rows, p->cols, begin, n, (uint16_t *)p->values + begin, p->stride / 2);
    }
}
#endif

void fill_panel(panel *p, const weight *w, int64_t first, int64_t rows, int64_t x_type, int laid) {
    (void)x_type, (void)laid;
    p->pairs = 0, p->rows = NULL;
#if BY_PAIRS
    p->pairs = fits_pairs(w, first, rows, p->cols, x_type);
#endif
#if BY_TILES
    if (p->pairs && laid) {
        fill_rows(p, w, first, rows);
        return;
    }
#endif
    uint32_t part[PANEL][PART] __attribute__((aligned(64))), scales[PANEL] = {0}; /* rows as they lie, or as BF16 */
    int64_t each = p->pairs ? 2 : values_of(w->type), width = PART / each;
    if (rows < PANEL || p->cols % PART) memset(part, 0, sizeof part);
    for (int64_t begin = 0; begin < p->cols; begin += PART) {
        int64_t n = p->cols - begin < PART ? p->cols - begin : PART, count = (n + each - 1) / each;
        float *to = p->values + (p->pairs ? begin / 2 : begin) * PANEL;
#if BY_PAIRS
        if (p->pairs) {
            decode_pairs(w, first, rows, p->cols, begin, n, (uint16_t *)part, PART);
            for (int64_t k = 0; k < count; k += LANES)
                for (int64_t r = 0; r < PANEL; r += LANES) turn(&part[0][0] + r * width + k, width, (uint32_t *)to + k * PANEL + r, PANEL);
            continue;
        }
#endif
        for (int64_t r = 0; r < rows; r++)
            copy_bytes(&part[0][0] + r * width, w->data + ((first + r) * p->cols + begin) * 4 / each, (n * 4 + each - 1) / each, 64);
        if (w->type > BFLOAT16) fetch_scales(w, first, rows, p->cols, begin, n, scales);
        switch (w->type) { /* constants: loops are compiled once for each */
        case FLOAT32: decode_words(&part[0][0], width, count, scales, FLOAT32, to); break;
        case BFLOAT16: decode_words(&part[0][0], width, count, scales, BFLOAT16, to); break;
        case CODES_E4M3: decode_words(&part[0][0], width, count, scales, CODES_E4M3, to); break;
        default: decode_words(&part[0][0], width, count, scales, CODES_E2M1, to);
        }
    }
}

#define FOR_COUNT(call)                                                                                                    \
    switch (count) {                                                                                                       \
    case 1: call(1); break;                                                                                                \
    case 2: call(2); break;                                                                                                \
    case 3: call(3); break;                                                                                                \
    case 4: call(4); break;                                                                                                \
    case 5: call(5); break;                                                                                                \
    case 6: call(6); break;                                                                                                \
    case 7: call(IN_REGISTERS < 7 ? IN_REGISTERS : 7); break;                                                              \
    default: call(IN_REGISTERS);                                                                                           \
    }

static void in_registers(const panel *p, const void *const *x, int64_t x_type, int64_t count, float (*to)[PANEL]) {
#if BY_PAIRS
    if (p->pairs) {
#define CALL(n) products_of_pairs(p, (const uint16_t *const *)x, n, to)
        FOR_COUNT(CALL)
#undef CALL
        return;
    }
#endif
    const float *wide[IN_REGISTERS];
    for (int64_t v = 0; v < count; v++) {
        wide[v] = x[v];
        if (x_type == FLOAT32) continue;
        float *own = p->vectors + v * p->cols;
        for (int64_t j = 0; j < p->cols; j++) own[j] = widen(((const uint16_t *)x[v])[j]);
        wide[v] = own;
    }
#define CALL(n) products_of_floats(p, wide, n, to)
    FOR_COUNT(CALL)
#undef CALL
}

void panel_products(const panel *p, const void *const *x, const char *laid, int64_t x_type, int64_t count, float (*to)[PANEL]) {
    if (p->rows) {
        multiply_tiles(p->rows, p->stride, laid, count, p->cols, (float(*)[2 * TALL])to);
        return;
    }
    for (int64_t v = 0; v < count; v += IN_REGISTERS) in_registers(p, x + v, x_type, count - v < IN_REGISTERS ? count - v : IN_REGISTERS, to + v);
}
