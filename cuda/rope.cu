/* Rotation by position, of queries, of keys on their way into the cache, and of kept keys.
 *
 * A block takes a row, a thread a pair (i, i + d/2) of one head at a time; the pair is read
 * before it is written, so all of it works in place. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

/* A row of rows of heads, as the pairs that its threads take. */
struct pair_of {
  int64_t low, high; /* offsets in the row */
  int angle;
  __device__ pair_of(int pair, int half)
      : low(pair / half * 2 * (int64_t)half + pair % half),
        high(low + half),
        angle(pair % half) {}
};

__device__ __forceinline__ void rotate_pair(float *a, float *b, float cosine, float sine) {
  float from =
      *a; /* the fused operations are named: all three kernels give the same bits */
  *a = fmaf(-*b, sine, from * cosine);
  *b = fmaf(*b, cosine, from * sine);
}

/* How many steps of a loop have been taken (backend.h); none outside of one. */
__device__ __forceinline__ int64_t taken(const int32_t *steps) {
  return steps ? *steps : 0;
}

__global__ void rope_kernel(float *x, int64_t x_stride, const float *cos, const float *sin,
                            int64_t rows, int heads, int half, const int32_t *steps) {
  int64_t moved = taken(steps) * half;
  cos += moved, sin += moved;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    float *row = x + i * x_stride;
    for (int p = (int)threadIdx.x; p < heads * half; p += (int)blockDim.x) {
      pair_of at(p, half);
      float a = row[at.low], b = row[at.high];
      rotate_pair(&a, &b, cos[i * half + at.angle], sin[i * half + at.angle]);
      row[at.low] = a, row[at.high] = b;
    }
  }
}

template <class T>
__global__ void store_kv_kernel(T *raw, T *rotated, T *values, const float *k,
                                const float *v, int64_t kv_stride, const float *cos,
                                const float *sin, int64_t rows, int heads, int half,
                                const int32_t *steps) {
  int64_t width = 2 * (int64_t)heads * half, moved = taken(steps);
  cos += moved * half, sin += moved * half;
  rotated += moved * width, values += moved * width;
  if (raw) raw += moved * width;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const float *k_i = k + i * kv_stride, *v_i = v + i * kv_stride;
    for (int p = (int)threadIdx.x; p < heads * half; p += (int)blockDim.x) {
      pair_of at(p, half);
      T low = narrow<T>(k_i[at.low]), high = narrow<T>(k_i[at.high]);
      float a = widen(low), b = widen(high);
      rotate_pair(&a, &b, cos[i * half + at.angle], sin[i * half + at.angle]);
      if (raw) raw[i * width + at.low] = low, raw[i * width + at.high] = high;
      rotated[i * width + at.low] = narrow<T>(a);
      rotated[i * width + at.high] = narrow<T>(b);
      values[i * width + at.low] = narrow<T>(v_i[at.low]);
      values[i * width + at.high] = narrow<T>(v_i[at.high]);
    }
  }
}

template <class T>
__global__ void rotate_kernel(T *rotated, const T *raw, const float *cos, const float *sin,
                              int64_t rows, int heads, int half) {
  int64_t width = 2 * (int64_t)heads * half;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    for (int p = (int)threadIdx.x; p < heads * half; p += (int)blockDim.x) {
      pair_of at(p, half);
      float a = widen(raw[i * width + at.low]), b = widen(raw[i * width + at.high]);
      rotate_pair(&a, &b, cos[i * half + at.angle], sin[i * half + at.angle]);
      rotated[i * width + at.low] = narrow<T>(a);
      rotated[i * width + at.high] = narrow<T>(b);
    }
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_rope(acre_queue *queue, float *x, int64_t x_stride, const float *cos,
                    const float *sin, int64_t position, int64_t rows, int64_t heads,
                    int64_t head_dim) {
  int64_t half = head_dim / 2, first = position * half;
  ACRE_LAUNCH(queue, acre::rope_kernel, rows, acre::threads_for(heads * head_dim), 0, x,
              x_stride, cos + first, sin + first, rows, (int)heads, (int)half,
              queue->steps);
}

void acre_cuda_store_kv(acre_queue *queue, void *raw, void *rotated, void *values,
                        const float *k, const float *v, int64_t kv_stride, const float *cos,
                        const float *sin, int64_t position, int64_t rows,
                        const acre_heads *heads) {
  using namespace acre;
  int64_t half = heads->head_dim / 2, first = position * half;
  int threads = threads_for(heads->kv_heads * heads->head_dim);
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    ACRE_LAUNCH(queue, store_kv_kernel<T>, rows, threads, 0, (T *)raw, (T *)rotated,
                (T *)values, k, v, kv_stride, cos + first, sin + first, rows,
                (int)heads->kv_heads, (int)half, queue->steps);
  });
}

void acre_cuda_rotate(acre_queue *queue, void *rotated, const void *raw, const float *cos,
                      const float *sin, int64_t position, int64_t rows,
                      const acre_heads *heads) {
  using namespace acre;
  int64_t half = heads->head_dim / 2, first = position * half;
  int threads = threads_for(heads->kv_heads * heads->head_dim);
  for_dtype(heads->dtype, [&](auto zero) {
    using T = decltype(zero);
    ACRE_LAUNCH(queue, rotate_kernel<T>, rows, threads, 0, (T *)rotated, (const T *)raw,
                cos + first, sin + first, rows, (int)heads->kv_heads, (int)half);
  });
}
