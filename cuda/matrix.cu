/* Weights: [N, K] of T, row by row. A transposed matrix is the same numbers, read with the
 * strides exchanged, so it costs nothing and follows the other by itself. q8 is kept as the
 * bf16 numbers that it stands for.
 *
 * Filling converts on the host and waits: it happens while a model is loaded. What lies on the
 * device already is converted there (array.cu). */
#include "device.h"
#include "internal.h"
#include "tensor.h"

namespace acre {
namespace {

constexpr int THREADS = 256;
constexpr int64_t Q8_BLOCK = 32; /* numbers of a row that share a scale */
constexpr int64_t FILL_BYTES = 1 << 20;

/* What q8 keeps of x, in its place; what is not finite becomes 0, and the caller is told. */
void quantize(float *x, int64_t count) {
  for (int64_t first = 0; first < count; first += Q8_BLOCK) {
    int64_t end = acre_min(first + Q8_BLOCK, count);
    float highest = 0.0f;
    for (int64_t i = first; i < end; i++) highest = fmaxf(highest, fabsf(x[i]));
    uint16_t scale = acre_to_bf16(highest / 127);
    if (acre_from_bf16(scale) * 127 < highest) scale++;
    for (int64_t i = first; i < end; i++) {
      float quotient = rintf(x[i] / acre_from_bf16(scale));
      if (!(fabsf(quotient) <= 127)) quotient = 0.0f;
      float number = acre_from_bf16(scale) * quotient + 0.0f; /* never -0 */
      x[i] = acre_from_bf16(acre_to_bf16(number));
    }
  }
}

/* Rows of the host's array as T, one after the other; false where one is not finite. */
bool convert(char *to, float *row, const acre_matrix *matrix, const acre_array *host,
             int64_t first, int64_t rows) {
  size_t row_bytes = (size_t)matrix->K * acre_dtype_size(matrix->dtype);
  bool finite = true;
  for (int64_t i = 0; i < rows; i++, to += row_bytes) {
    acre_array_row(row, host, first + i);
    finite &= acre_store_row(to, matrix->dtype, row, matrix->K);
    if (matrix->weights != ACRE_WEIGHTS_Q8) continue;
    quantize(row, matrix->K);
    acre_store_row(to, matrix->dtype, row, matrix->K);
  }
  return finite;
}

/* x [rows, K] dense, and the numbers of W from row `first` on. */
template <class T>
__global__ void matrix_get_kernel(float *x, const T *W, int64_t row_step,
                                  int64_t column_step, int64_t rows, int64_t K) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < K; c += blockDim.x)
      x[i * K + c] = widen(W[i * row_step + c * column_step]);
}

template <class T>
__global__ void matrix_set_kernel(T *W, int64_t row_step, int64_t column_step,
                                  const float *x, int64_t rows, int64_t K) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < K; c += blockDim.x)
      W[i * row_step + c * column_step] = narrow<T>(x[i * K + c]);
}

acre_status check_matrix(int64_t N, int64_t K, acre_dtype dtype, acre_weights weights,
                         int64_t *bytes, acre_error *error) {
  if (N < 1 || K < 1)
    return acre_fail(error, ACRE_BAD_SHAPE,
                     "matrix is [%lld, %lld], expected positive sizes", (long long)N,
                     (long long)K);
  if (dtype != ACRE_F32 && dtype != ACRE_BF16)
    return acre_fail(error, ACRE_UNSUPPORTED, "matrix dtype is %s, expected f32 or bf16",
                     acre_dtype_name(dtype));
  if (weights == ACRE_WEIGHTS_Q8 && dtype != ACRE_BF16)
    return acre_fail(error, ACRE_UNSUPPORTED, "q8 weights need dtype bf16, got %s",
                     acre_dtype_name(dtype));
  if (!acre_mul(bytes, N, K) || !acre_mul(bytes, *bytes, (int64_t)acre_dtype_size(dtype)))
    return acre_fail(error, ACRE_NO_MEMORY, "matrix [%lld, %lld] is too large",
                     (long long)N, (long long)K);
  return ACRE_OK;
}

}  // namespace
}  // namespace acre

acre_status acre_cuda_matrix_create(acre_backend *base, acre_matrix **out, int64_t N,
                                    int64_t K, acre_dtype dtype, acre_weights weights,
                                    acre_error *error) {
  *out = NULL;
  int64_t bytes = 0;
  ACRE_TRY(acre::check_matrix(N, K, dtype, weights, &bytes, error));
  acre_matrix *made = (acre_matrix *)acre_alloc_zero(sizeof *made);
  if (!made) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a matrix");
  acre_status status = acre::alloc(base, &made->buffer, (size_t)bytes, error);
  if (status != ACRE_OK) {
    acre_free(made);
    return status;
  }
  *made = acre_matrix{(acre::backend *)base, made->buffer, N, K, K, 1, dtype, weights};
  *out = made;
  return ACRE_OK;
}

void acre_cuda_matrix_release(acre_matrix *matrix) {
  if (!matrix) return;
  acre_buffer_release(matrix->buffer);
  acre_free(matrix);
}

void acre_cuda_matrix_fill(acre_matrix *matrix, int64_t row, const acre_array *host,
                           bool *finite) {
  using namespace acre;
  int64_t count = host->shape[0], K = matrix->K;
  if (host->on_device) {
    size_t at = (size_t)(row * K) * acre_dtype_size(matrix->dtype);
    return store_array(matrix->owner, (char *)acre_buffer_data(matrix->buffer) + at,
                       matrix->dtype, matrix->weights == ACRE_WEIGHTS_Q8, host, finite);
  }
  size_t row_bytes = (size_t)K * acre_dtype_size(matrix->dtype);
  int64_t some = acre_max(1, FILL_BYTES / (int64_t)row_bytes);
  acre_queue *loader = matrix->owner->loader;
  float *wide = (float *)acre_alloc((size_t)K * sizeof *wide);
  char *typed = (char *)acre_alloc((size_t)some * row_bytes);
  acre_mutex_lock(matrix->owner->loading);
  if (!wide || !typed)
    check(&loader->failure, cudaErrorMemoryAllocation,
          ACRE_SITE("host memory for weights"));
  for (int64_t i = 0; i < count && wide && typed; i += some) {
    int64_t rows = acre_min(some, count - i);
    *finite &= convert(typed, wide, matrix, host, i, rows);
    send(loader, (char *)acre_buffer_data(matrix->buffer) + (size_t)(row + i) * row_bytes,
         typed, (size_t)rows * row_bytes);
  }
  on_device scope(matrix->owner->ordinal);
  check(&loader->failure, cudaStreamSynchronize(loader->stream),
        ACRE_SITE("cudaStreamSynchronize"));
  acre_mutex_unlock(matrix->owner->loading);
  acre_free(wide), acre_free(typed);
}

void acre_cuda_matrix_get(acre_queue *queue, float *x, const acre_matrix *W, int64_t row,
                          int64_t rows) {
  using namespace acre;
  for_dtype(W->dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *from = (const T *)acre_buffer_data(W->buffer) + row * W->row_step;
    ACRE_LAUNCH(queue, matrix_get_kernel<T>, rows, THREADS, 0, x, from, W->row_step,
                W->column_step, rows, W->K);
  });
}

void acre_cuda_matrix_set(acre_queue *queue, acre_matrix *W, int64_t row, const float *x,
                          int64_t rows) {
  using namespace acre;
  for_dtype(W->dtype, [&](auto zero) {
    using T = decltype(zero);
    T *to = (T *)acre_buffer_data(W->buffer) + row * W->row_step;
    ACRE_LAUNCH(queue, matrix_set_kernel<T>, rows, THREADS, 0, to, W->row_step,
                W->column_step, x, rows, W->K);
  });
}

acre_status acre_cuda_matrix_transpose(acre_queue *queue, acre_matrix **out,
                                       const acre_matrix *W, acre_error *error) {
  (void)queue;
  if (*out) return ACRE_OK;
  acre_matrix *made = (acre_matrix *)acre_alloc_zero(sizeof *made);
  if (!made) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a matrix");
  acre_buffer_retain(W->buffer);
  *made = acre_matrix{W->owner,       W->buffer,   W->K,     W->N,
                      W->column_step, W->row_step, W->dtype, ACRE_WEIGHTS_SAME};
  *out = made;
  return ACRE_OK;
}
