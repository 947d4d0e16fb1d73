/* Products with codes on any CPU: each channel of a word has a part of the vector. */
#pragma once

#ifndef E4M3_BY_HALVES
INLINE int64_t e4m3_place(int64_t j, int64_t cols) { return j % 4 * ((cols + 3) / 4) + j / 4; }

INLINE void e4m3_sums(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, float *to) {
    int64_t quarter = (cols + 3) / 4;
    floats sum[SHARED] = {0};
    float rest[SHARED] = {0};
    for (int64_t begin = 0; begin < cols; begin += E4M3_BLOCK) {
        int64_t end = cols - begin < E4M3_BLOCK ? cols : begin + E4M3_BLOCK, j = begin;
        float factor = scale_value(scale[begin / E4M3_BLOCK]);
        floats part[SHARED][2] = {0};
        fetch(w + begin, E4M3_BLOCK);
        for (; j + 4 * LANES <= end; j += 4 * LANES) {
            words code = load_words(w + j);
            for (int k = 0; k < 4; k++) {
                floats value = values_e4m3(code, k);
                for (int v = 0; v < count; v++) part[v][k % 2] += value * load(x[v] + j / 4 + k * quarter);
            }
        }
        for (int v = 0; v < count; v++) sum[v] += (part[v][0] + part[v][1]) * factor;
        for (int v = 0; j < end && v < count; v++) /* apart: with a loop inside, what is above would not stay in registers */
            for (int64_t i = j; i < end; i++) rest[v] += e4m3(w[i]) * factor * x[v][e4m3_place(i, cols)];
    }
    for (int v = 0; v < count; v++) to[v] = total(sum[v]) + rest[v];
}

#endif

#ifndef E2M1_BY_HALVES
INLINE int64_t e2m1_place(int64_t j, int64_t cols) { return j % 8 * (cols / 8) + j / 8; }

/* Scales of a register of words, four of which are a group. */
static inline floats scales_e2m1(const uint8_t *scale) {
    uint32_t bytes = 0;
    words shift;
    memcpy(&bytes, scale, LANES / 4);
    for (int lane = 0; lane < LANES; lane++) shift[lane] = lane / 4 * 8;
    return values_e8m0(((words){0} + bytes) >> shift & 0xff);
}

INLINE void e2m1_sums(const uint8_t *w, const uint8_t *scale, const float *const *x, int count, int64_t cols, float *to) {
    int64_t eighth = cols / 8, j = 0;
    floats sum[SHARED] = {0};
    for (; j + 8 * LANES <= cols; j += 8 * LANES) { /* a word is a quarter of a group */
        words code = load_words(w + j / 2);
        floats factor = scales_e2m1(scale + j / E2M1_GROUP), part[SHARED][2] = {0};
        fetch(w + j / 2, BYTES);
        for (int k = 0; k < 8; k++) {
            floats value = values_e2m1(code, k);
            for (int v = 0; v < count; v++) part[v][k % 2] += value * load(x[v] + j / 8 + k * eighth);
        }
        for (int v = 0; v < count; v++) sum[v] += (part[v][0] + part[v][1]) * factor;
    }
    for (int v = 0; v < count; v++) {
        float rest = 0;
        for (int64_t i = j; i < cols; i++) rest += e2m1(w[i / 2] >> i % 2 * 4) * x[v][e2m1_place(i, cols)] * scale_value(scale[i / E2M1_GROUP]);
        to[v] = total(sum[v]) + rest;
    }
}
#endif
