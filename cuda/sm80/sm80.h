/* Operations for compute capability 8.0 and later, in the place of the plain ones. */
#ifndef ACRE_CUDA_SM80_H
#define ACRE_CUDA_SM80_H

#include "internal.h"

/* bf16 and head_dim 64, 80, 96, 128, 256 by matrix units; all else by the plain kernels. */
void acre_cuda_sm80_attend(acre_queue *, void *out, int64_t out_stride, float *lse,
                           const float *q, int64_t q_stride, const acre_keys *prefix,
                           const acre_keys *own, int64_t seen, int64_t rows, bool split,
                           const acre_heads *);
void acre_cuda_sm80_attend_back(acre_queue *, float *dqkv, float *dk, float *dv,
                                float *scratch, const float *dout, const void *out,
                                const float *lse, const void *q, const acre_keys *prefix,
                                const acre_keys *own, int64_t rows, const acre_heads *);

#endif
