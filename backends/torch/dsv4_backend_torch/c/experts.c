/* One row through several experts: y = shared + sum_e w2[e] (silu(min(w1[e] x, limit)) * clamp(w3[e] x, -limit, limit) * share[e]).
 *
 * What a product gives and the activation are rounded to act_type, as between linear layers; the sum over experts is float32.
 * Threads meet twice: when all of an activation is there, and when it is laid out for w2.
 */
#include "weights.h"

/* In E4M3 and back where it is to be quantised, and spread for a weight's type. Not finite: not for it. */
static int lay_out(const float *x, int64_t begin, int64_t end, int64_t cols, int64_t act_type, int64_t weight_type, int quantise,
                   float *to) {
    float scale = 1;
    if (quantise) {
        uint32_t byte = scale_byte(x + begin, end - begin, E4M3);
        if (byte == 255) return NOT_MINE;
        scale = scale_value(byte);
    }
    for (int64_t j = begin; j < end; j++)
        to[place(j, cols, weight_type)] = quantise ? rounded(on_grid(x[j] / scale, E4M3) * scale, act_type) : x[j];
    return DONE;
}

/* weights: w1, w3 [inter, dim] and w2 [dim, inter], expert by expert. share [count] or NULL: not weighted. shared [dim] in act_type,
 * or NULL. quantise: the activation, in blocks of 128. */
int experts(const weight *weights, const void *x, const float *share, const void *shared, void *y, int64_t act_type, int64_t y_type,
            int64_t count, int64_t dim, int64_t inter, int64_t quantise, float limit) {
    int64_t stride = inter + SLACK;
    float *row = malloc((dim + SLACK + count * (inter + stride)) * sizeof(float)), *hidden = row + dim + SLACK;
    float *laid_out = hidden + count * inter;
    int status = DONE;
    if (!row) return NO_MEMORY;
    spread(x, act_type, weights->type, dim, row);
#pragma omp parallel reduction(max : status) if (3 * count * dim * inter > ALONE)
    {
        int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
        for (int64_t e = 0; e < count; e++)
            for (int64_t i = inter * own / threads; i < inter * (own + 1) / threads; i++) {
                float gate = rounded(dot(weights + 3 * e, i, dim, row), act_type);
                float up = rounded(dot(weights + 3 * e + 1, i, dim, row), act_type);
                gate = gate > limit ? limit : gate; /* NaN stays */
                up = up > limit ? limit : up < -limit ? -limit : up;
                float value = gate / (1 + expf(-gate)) * up;
                hidden[e * inter + i] = rounded(share ? value * share[e] : value, act_type);
            }
#pragma omp barrier
#pragma omp for collapse(2)
        for (int64_t e = 0; e < count; e++)
            for (int64_t begin = 0; begin < inter; begin += E4M3_BLOCK) {
                int64_t end = inter - begin < E4M3_BLOCK ? inter : begin + E4M3_BLOCK;
                int done = lay_out(hidden + e * inter, begin, end, inter, act_type, weights[2].type, quantise, laid_out + e * stride);
                if (done > status) status = done;
            }
        for (int64_t i = dim * own / threads; i < dim * (own + 1) / threads; i++) {
            float sum = shared ? get(shared, act_type, i) : 0;
            for (int64_t e = 0; e < count; e++) sum += rounded(dot(weights + 3 * e + 2, i, inter, laid_out + e * stride), act_type);
            put(y, y_type, i, sum);
        }
    }
    free(row);
    return status;
}
