/* A weight matrix as the CPU keeps it: panels of 16 output columns, see kernels.h. */
#ifndef ACRE_CPU_MATMUL_H
#define ACRE_CPU_MATMUL_H

#include "cpu.h"

struct acre_matrix {
  cpu_backend *backend;
  acre_buffer *buffer;
  int64_t N;
  int64_t K;
  acre_dtype dtype; /* T of what it is multiplied with */
  acre_weights weights;
};

static inline const acre_typed *acre_matrix_typed(const acre_matrix *W) {
  const acre_kernels *kernels = &W->backend->kernels;
  return W->weights == ACRE_WEIGHTS_Q8 ? &kernels->q8 : &kernels->of[W->dtype];
}

/* Bytes of one panel, and of its first k numbers (whole blocks). */
static inline int64_t acre_panel_bytes(const acre_matrix *W) {
  const acre_typed *T = acre_matrix_typed(W);
  return acre_ceil_div(W->K, T->pack_k) * T->pack_bytes;
}
static inline int64_t acre_packed_offset(const acre_matrix *W, int64_t k) {
  const acre_typed *T = acre_matrix_typed(W);
  return k / T->pack_k * T->pack_bytes;
}

#endif
