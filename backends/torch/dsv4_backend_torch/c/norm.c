/* RMS norm of a few rows. */
#include "values.h"

/* y = x / sqrt(mean(x^2) + eps) * weight, rounded once; x, y [rows, dim] in one type; weight [dim] or NULL. */
int rms_norm(const char *x, char *y, int64_t type, const void *weight, int64_t weight_type, int64_t rows, int64_t dim, double eps) {
    int64_t bytes = dim * size_of(type);
    for (int64_t t = 0; t < rows; t++, x += bytes, y += bytes) {
        float parts[LANES] = {0}, square = 0;
        FOR_TYPE(type,
            for (int64_t j = 0; j + LANES <= dim; j += LANES)
                for (int l = 0; l < LANES; l++) parts[l] += get(x, T, j + l) * get(x, T, j + l);
            for (int64_t j = dim / LANES * LANES; j < dim; j++) square += get(x, T, j) * get(x, T, j);
        )
        for (int l = 0; l < LANES; l++) square += parts[l];
        float scale = (float)(1 / sqrt((double)square / dim + eps));
        FOR_TYPE(type,
            if (weight)
                for (int64_t j = 0; j < dim; j++) put(y, T, j, get(x, T, j) * scale * get(weight, weight_type, j));
            else
                for (int64_t j = 0; j < dim; j++) put(y, T, j, get(x, T, j) * scale);
        )
    }
    return DONE;
}
