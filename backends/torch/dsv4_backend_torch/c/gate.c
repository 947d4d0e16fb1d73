/* Routing of one token. */
#include "weights.h"

/* scores = sqrt(softplus(weight x)), weight [experts, dim]; indices: the topk largest of scores + bias, of equals the lower one, or
 * where bias is NULL those that are given; shares: their scores over their sum, times route_scale. NaN is not for it. */
int gate(const void *x, int64_t type, const weight *w, const float *bias, int32_t *indices, float *shares, int64_t experts, int64_t dim,
         int64_t topk, float route_scale) {
    float *row = malloc((dim + SLACK + experts) * sizeof(float)), *scores = row + dim + SLACK, sum = 0;
    int status = DONE;
    if (!row) return NO_MEMORY;
    spread(x, type, w->type, dim, row);
#pragma omp parallel for schedule(static) reduction(max : status) if (experts * dim > ALONE)
    for (int64_t e = 0; e < experts; e++) {
        float product = dot(w, e, dim, row);
        scores[e] = (float)sqrt(product > 40 ? product : log1p(exp(product)));
        if (isnan(scores[e] + (bias ? bias[e] : 0))) status = NOT_MINE;
    }
    for (int64_t k = 0; k < topk && bias; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            int taken = 0;
            for (int64_t before = 0; before < k; before++) taken |= indices[before] == e;
            if (!taken && (best < 0 || scores[e] + bias[e] > scores[best] + bias[best])) best = e;
        }
        indices[k] = (int32_t)best;
    }
    for (int64_t k = 0; k < topk; k++) {
        if (indices[k] < 0 || indices[k] >= experts) status = NOT_MINE;
        if (status == DONE) sum += shares[k] = scores[indices[k]];
    }
    for (int64_t k = 0; k < topk; k++) shares[k] *= route_scale / sum;
    free(row);
    return status;
}
