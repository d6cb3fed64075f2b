/* The operations that are products: in float32, with the library's sums.
 *
 * swiglu and matmul_back need room for intermediate numbers; they take as many rows at a time
 * as the workspace holds. */
#include "gemm.h"

#include "device.h"

namespace acre {
namespace {

gemm_side side_of(const acre_matrix *W) {
  bool turned = W->column_step != 1 && W->K > 1;
  int64_t step =
      turned ? W->column_step : acre_max(W->row_step, W->K); /* of one row: any */
  return gemm_side{acre_buffer_data(W->buffer), step, turned};
}

template <class T>
__global__ void widen_kernel(float *y, const T *x, int64_t n) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
    y[i] = widen(x[i]);
}

}  // namespace
}  // namespace acre

void acre_cuda_matmul(acre_queue *queue, float *y, int64_t y_stride, const void *x,
                      const acre_matrix *W, const float *bias, int64_t rows,
                      bool accumulate) {
  acre::gemm(queue, acre::gemm_job{y,
                                   y_stride,
                                   {x, W->K, false},
                                   acre::side_of(W),
                                   rows,
                                   W->N,
                                   W->K,
                                   W->dtype,
                                   bias,
                                   accumulate});
}

void acre_cuda_swiglu(acre_queue *queue, void *y, const void *x, const acre_matrix *gate,
                      const acre_matrix *up, int64_t rows) {
  using namespace acre;
  int64_t N = gate->N, each = 2 * N * (int64_t)sizeof(float);
  int64_t size = (int64_t)acre_dtype_size(gate->dtype);
  int64_t some = acre_min(rows, acre_max(1, (int64_t)workspace_room(queue) / each));
  if (rows <= 0) return;
  float *products = (float *)workspace(queue, (size_t)(some * each));
  for (int64_t i = 0; products && i < rows; i += some) {
    int64_t count = acre_min(some, rows - i);
    const char *x_i = (const char *)x + i * gate->K * size;
    acre_cuda_matmul(queue, products, N, x_i, gate, NULL, count, false);
    acre_cuda_matmul(queue, products + count * N, N, x_i, up, NULL, count, false);
    acre_cuda_gated(queue, (char *)y + i * N * size, products, products + count * N,
                    count * N, gate->dtype);
  }
}

/* dy is float32, so x becomes float32, too. */
void acre_cuda_matmul_back(acre_queue *queue, float *dW, const float *dy, int64_t dy_stride,
                           const void *x, int64_t rows, int64_t N, int64_t K,
                           acre_dtype dtype) {
  using namespace acre;
  int64_t each = K * (int64_t)sizeof(float), size = (int64_t)acre_dtype_size(dtype);
  int64_t some = rows;
  float *wide = NULL;
  if (rows <= 0) return;
  if (dtype != ACRE_F32) {
    some = acre_min(rows, acre_max(1, (int64_t)workspace_room(queue) / each));
    wide = (float *)workspace(queue, (size_t)(some * each));
    if (!wide) return;
  }
  for (int64_t i = 0; i < rows; i += some) {
    int64_t count = acre_min(some, rows - i);
    const void *x_i = (const char *)x + i * K * size;
    if (wide)
      ACRE_LAUNCH(queue, widen_kernel<bf16>, blocks_for(count * K, 256), 256, 0, wide,
                  (const bf16 *)x_i, count * K);
    gemm(queue, gemm_job{dW,
                         K,
                         {dy + i * dy_stride, dy_stride, true},
                         {wide ? wide : x_i, K, true},
                         N,
                         K,
                         count,
                         ACRE_F32,
                         NULL,
                         true});
  }
}
