/* What other languages call: kernels by their names, and tapes of them (team.c). */
#include "team.h"
#include <string.h>

extern const entry gemv, moe, gate, rms_norm, act_qdq, hadamard, rotation, apply_rope, hc_pre, hc_head, hc_post, embedding, cache_write,
    cache_read, copy, sparse_attn, compress, index_topk;

static const entry *const kernels[] = {&gemv,    &moe,     &gate,      &rms_norm,    &act_qdq,    &hadamard, &rotation,    &apply_rope, &hc_pre,
                                       &hc_head, &hc_post, &embedding, &cache_write, &cache_read, &copy,     &sparse_attn, &compress,   &index_topk};

CALLED_FROM_OUTSIDE const void *find_kernel(const char *name) {
    for (unsigned long i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(kernels[i]->name, name)) return kernels[i];
    return 0;
}
