/* A weight matrix as the CPU keeps it: panels of 16 output columns, see kernels.h. */
#ifndef ACRE_CPU_MATMUL_H
#define ACRE_CPU_MATMUL_H

#include "cpu.h"

struct acre_matrix {
  cpu_backend *backend;
  acre_buffer *buffer;
  int64_t N;
  int64_t K;
  acre_dtype dtype;
};

/* Elements of one panel. */
static inline int64_t acre_panel_size(const acre_matrix *W) {
  return ACRE_PANEL * (W->dtype == ACRE_BF16 ? acre_round_up(W->K, 2) : W->K);
}

#endif
