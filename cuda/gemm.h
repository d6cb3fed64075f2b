/* The one product that everything else is made of, by whichever library was found. */
#ifndef ACRE_CUDA_GEMM_H
#define ACRE_CUDA_GEMM_H

#include "internal.h"

namespace acre {

/* One side of a product, numbers of T: [rows, inner] with rows `step` apart, or turned:
 * [inner, rows]. */
struct gemm_side {
  const void *data;
  int64_t step;
  bool turned;
};

/* y[i, j] = (add ? y[i, j] : 0) + sum over c of x[i, c] * w[j, c] + bias[j], in float32. */
struct gemm_job {
  float *y;
  int64_t y_step;
  gemm_side x, w;
  int64_t rows, columns, inner;
  acre_dtype dtype;
  const float *bias; /* [columns], nullable */
  bool add;
};

void gemm(acre_queue *queue, const gemm_job &job);

/* cuBLASLt, from one of these directories (':' between, nullable) or wherever the loader
 * finds it. */
acre_status gemm_library_open(acre_gemm_library **out, const char *directories,
                              acre_error *error);
void gemm_library_close(acre_gemm_library *library);

/* What a queue needs for products; scratch is device memory. */
acre_status gemm_open(acre_gemm **out, const acre_gemm_library *library, void *scratch,
                      size_t bytes, acre_error *error);
void gemm_close(acre_gemm *gemm);

}  // namespace acre
#endif
