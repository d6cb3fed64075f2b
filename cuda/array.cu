/* Arrays that others have on this device, of any float dtype and strides, into our own memory,
 * without a way through the host. Read on the stream whose handle is given out, so that their
 * owners can have what makes them go before it.
 *
 * A number goes by float32, as the host takes it, and q8 has the same scales: the same bits. */
#include "device.h"
#include "internal.h"

#include <string.h>

namespace acre {

struct f16 {
  uint16_t bits;
};

/* Without its sign a float16 is a float32 with 15 for 127 in the exponent. */
__device__ __forceinline__ float widen(f16 x) {
  uint32_t rest = (uint32_t)(x.bits & 0x7fff) << 13;
  bool finite = rest < 0x7c00u << 13;
  float magnitude =
      finite ? __uint_as_float(rest) * 0x1p112f : __uint_as_float(0x7f800000u | rest);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
__device__ __forceinline__ float widen(double x) { return (float)x; }

namespace {

constexpr int THREADS = 256;
constexpr int64_t Q8_BLOCK = 32; /* numbers of a row that share a scale */

template <class S>
struct source {
  const S *data;
  int64_t row, column; /* strides */
  int64_t rows, columns;
};

template <class T, class S>
__global__ void store_kernel(T *dst, source<S> from, int *odd) {
  for (int64_t i = blockIdx.x; i < from.rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < from.columns; c += blockDim.x) {
      T x = narrow<T>(widen(from.data[i * from.row + c * from.column]));
      dst[i * from.columns + c] = x;
      if (!isfinite(widen(x))) *odd = 1;
    }
}

/* The bf16 that all numbers of a block are multiples of. */
__device__ __forceinline__ float scale_of(float highest) {
  uint32_t bits = __float_as_uint(widen(narrow<bf16>(highest / 127)));
  if (__uint_as_float(bits) * 127 < highest) bits += 0x10000u;
  return __uint_as_float(bits);
}

/* A thread has a block of numbers at a time. */
template <class S>
__global__ void store_q8_kernel(bf16 *dst, source<S> from, int *odd) {
  int64_t blocks = (from.columns + Q8_BLOCK - 1) / Q8_BLOCK;
  for (int64_t i = blockIdx.x; i < from.rows; i += gridDim.x)
    for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
      const S *row = from.data + i * from.row;
      int64_t first = b * Q8_BLOCK, end = first + Q8_BLOCK;
      if (end > from.columns) end = from.columns;
      float highest = 0.0f;
      for (int64_t c = first; c < end; c++) {
        float x = widen(row[c * from.column]);
        highest = fmaxf(highest, fabsf(x));
        if (!isfinite(widen(narrow<bf16>(x)))) *odd = 1;
      }
      float scale = scale_of(highest);
      for (int64_t c = first; c < end; c++) {
        float quotient = rintf(widen(row[c * from.column]) / scale);
        if (!(fabsf(quotient) <= 127)) quotient = 0.0f;
        dst[i * from.columns + c] = narrow<bf16>(scale * quotient + 0.0f); /* never -0 */
      }
    }
}

template <class S>
void store_from(acre_queue *queue, void *dst, acre_dtype dtype, bool q8,
                const acre_array *array, int *odd) {
  bool flat = array->ndim == 1;
  source<S> from = {(const S *)array->data, flat ? 0 : array->strides[0],
                    array->strides[flat ? 0 : 1], flat ? 1 : array->shape[0],
                    array->shape[flat ? 0 : 1]};
  if (q8) {
    ACRE_LAUNCH(queue, store_q8_kernel<S>, from.rows, THREADS, 0, (bf16 *)dst, from, odd);
    return;
  }
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    ACRE_LAUNCH(queue, (store_kernel<T, S>), from.rows, THREADS, 0, (T *)dst, from, odd);
  });
}

void store_any(acre_queue *queue, void *dst, acre_dtype dtype, bool q8,
               const acre_array *array, int *odd) {
  switch (array->dtype) {
    case ACRE_F32: return store_from<float>(queue, dst, dtype, q8, array, odd);
    case ACRE_BF16: return store_from<bf16>(queue, dst, dtype, q8, array, odd);
    case ACRE_F16: return store_from<f16>(queue, dst, dtype, q8, array, odd);
    case ACRE_F64: return store_from<double>(queue, dst, dtype, q8, array, odd);
  }
}

}  // namespace

void store_array(backend *owner, void *dst, acre_dtype dtype, bool q8,
                 const acre_array *array, bool *finite) {
  acre_queue *loader = owner->loader;
  on_device scope(owner->ordinal);
  acre_mutex_lock(owner->loading);
  int found = 0, *odd = (int *)workspace(loader, sizeof *odd);
  acre_cuda_clear(loader, odd, sizeof *odd);
  if (odd) store_any(loader, dst, dtype, q8, array, odd);
  download(loader, &found, odd,
           sizeof found); /* waits; a failure is told by the next sync */
  acre_mutex_unlock(owner->loading);
  *finite &= !found;
}

}  // namespace acre

void *acre_cuda_stream(acre_backend *base) {
  return ((acre::backend *)base)->loader->stream;
}

acre_status acre_cuda_fetch(acre_backend *base, void *host, const void *src, size_t bytes,
                            acre_error *error) {
  acre::backend *owner = (acre::backend *)base;
  acre_mutex_lock(owner->loading);
  acre::download(owner->loader, host, src, bytes);
  acre_status status = base->ops->sync(owner->loader, error);
  acre_mutex_unlock(owner->loading);
  return status;
}

void acre_cuda_store_array(acre_backend *base, void *dst, acre_dtype dtype,
                           const acre_array *array, bool *finite) {
  acre::store_array((acre::backend *)base, dst, dtype, false, array, finite);
}
