/* Rows moved, rounded, averaged and added.
 *
 * Bytes are copied in the widest units that all addresses allow. Rows that lie in host memory
 * come through the staging memory, as uploads do, unless it is pinned; rows that the device
 * reads by itself are copied by one kernel for many spans, or by the copy engine where a span
 * is long. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

constexpr int THREADS = 256;
constexpr int64_t LONG_SPAN = 1 << 18; /* bytes that are worth a copy of their own */

/* ------------------------------------------------------------------ indexed rows */

template <class U, bool SCATTER>
__global__ void indexed_kernel(U *y, const U *x, const int32_t *index, int64_t rows,
                               int64_t units) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    U *to = y + (SCATTER ? index[i] : i) * units;
    const U *from = x + (SCATTER ? i : index[i]) * units;
    for (int64_t c = threadIdx.x; c < units; c += blockDim.x) to[c] = from[c];
  }
}

/* Calls with a zero of the widest unit that divides these addresses and sizes. */
template <class F>
void for_unit(uintptr_t bits, F call) {
  if (bits % sizeof(uint4) == 0)
    call(uint4{});
  else if (bits % sizeof(uint32_t) == 0)
    call(uint32_t{});
  else
    call(uint8_t{});
}

template <bool SCATTER>
void copy_indexed(acre_queue *queue, void *y, const void *x, const int32_t *index,
                  int64_t rows, size_t row_bytes) {
  for_unit((uintptr_t)y | (uintptr_t)x | row_bytes, [&](auto zero) {
    using U = decltype(zero);
    int64_t units = (int64_t)(row_bytes / sizeof(U));
    ACRE_LAUNCH(queue, (indexed_kernel<U, SCATTER>), rows, threads_for(units * PACK), 0,
                (U *)y, (const U *)x, index, rows, units);
  });
}

/* ------------------------------------------------------------------ spans */

/* Of pinned memory a read takes microseconds: a thread has several under way. */
template <class U>
__global__ void spans_kernel(U *y, const acre_span *spans, int64_t count, int64_t units) {
  constexpr int EACH = 4;
  int64_t step = blockDim.x;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    acre_span span = spans[i];
    U *to = y + span.dst_row * units;
    const U *from = (const U *)span.source;
    int64_t n = span.rows * units;
    for (int64_t c = threadIdx.x; c < n; c += EACH * step) {
      U part[EACH] = {};
#pragma unroll
      for (int j = 0; j < EACH; j++)
        if (c + j * step < n) part[j] = from[c + j * step];
#pragma unroll
      for (int j = 0; j < EACH; j++)
        if (c + j * step < n) to[c + j * step] = part[j];
    }
  }
}

/* Spans on the device, none of them long. */
void copy_short(acre_queue *queue, void *dst, const acre_span *spans, int64_t count,
                uintptr_t bits, size_t row_bytes) {
  if (!count) return;
  acre_span *table = (acre_span *)workspace(queue, (size_t)count * sizeof *table);
  if (!table) return;
  send(queue, table, spans, (size_t)count * sizeof *table);
  for_unit(bits, [&](auto zero) {
    using U = decltype(zero);
    ACRE_LAUNCH(queue, spans_kernel<U>, count, THREADS, 0, (U *)dst,
                (const acre_span *)table, count, (int64_t)(row_bytes / sizeof(U)));
  });
}

/* ------------------------------------------------------------------ means */

template <class T>
__global__ void pool_kernel(T *y, const T *const *sources, int64_t count, int64_t l,
                            int64_t width) {
  for (int64_t j = blockIdx.x; j < count; j += gridDim.x) {
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      float sum = 0.0f;
      for (int64_t i = 0; i < l; i++) sum += widen(sources[j * l + i][c]);
      y[j * width + c] = narrow<T>(sum / (float)l);
    }
  }
}

/* `count` means: pointers to the rows, and behind them the rows that lie on the host. */
template <class T>
void pool_some(acre_queue *queue, T *dst, const void *const *sources, int64_t count,
               int64_t l, int64_t width) {
  size_t row = (size_t)width * sizeof(T), pointers = (size_t)(count * l) * sizeof(void *);
  const void **table =
      (const void **)workspace(queue, pointers + (size_t)(count * l) * row);
  if (!table) return;
  char *rows = (char *)table + pointers;
  {
    sender<const void *> to_table(queue, table);
    for (int64_t i = 0; i < count * l; i++) {
      bool there = device_reads(sources[i]);
      if (!there) send(queue, rows, sources[i], row);
      to_table.add(there ? sources[i] : rows);
      rows += there ? 0 : row;
    }
  }
  ACRE_LAUNCH(queue, pool_kernel<T>, count, threads_for(width), 0, dst,
              (const T *const *)table, count, l, width);
}

/* ------------------------------------------------------------------ float32 rows */

template <class T>
__global__ void round_kernel(T *y, int64_t y_stride, const float *x, int64_t x_stride,
                             int64_t rows, int64_t width) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x)
      y[i * y_stride + c] = narrow<T>(x[i * x_stride + c]);
}

__global__ void add_rows_kernel(float *y, int64_t y_stride, const float *x,
                                int64_t x_stride, int64_t rows, int64_t width) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x)
      y[i * y_stride + c] += x[i * x_stride + c];
}

/* Rows may meet: a thread has a column, and takes them in order. */
__global__ void add_indexed_kernel(float *y, int64_t y_stride, const float *x,
                                   int64_t x_stride, const int32_t *index, int64_t rows,
                                   int64_t width) {
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; c < width; c += step)
    for (int64_t i = 0; i < rows; i++) y[index[i] * y_stride + c] += x[i * x_stride + c];
}

}  // namespace
}  // namespace acre

/* ------------------------------------------------------------------ operations */

void acre_cuda_gather_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                           int64_t rows, size_t row_bytes) {
  acre::copy_indexed<false>(queue, y, x, index, rows, row_bytes);
}

void acre_cuda_scatter_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                            int64_t rows, size_t row_bytes) {
  acre::copy_indexed<true>(queue, y, x, index, rows, row_bytes);
}

void acre_cuda_copy_rows(acre_queue *queue, void *dst, const acre_span *spans,
                         int64_t count, size_t row_bytes) {
  constexpr int ROOM = 128; /* spans that wait to be copied together */
  acre_span some[ROOM];
  int64_t waiting = 0;
  uintptr_t bits = (uintptr_t)dst | row_bytes;
  for (int64_t i = 0; i < count; i++) {
    int64_t bytes = spans[i].rows * (int64_t)row_bytes;
    if (bytes <= 0) continue;
    if (bytes >= acre::LONG_SPAN || !acre::device_reads(spans[i].source)) {
      acre::copy(queue, (char *)dst + (size_t)spans[i].dst_row * row_bytes, spans[i].source,
                 (size_t)bytes);
      continue;
    }
    bits |= (uintptr_t)spans[i].source;
    some[waiting++] = spans[i];
    if (waiting < ROOM) continue;
    acre::copy_short(queue, dst, some, waiting, bits, row_bytes);
    waiting = 0;
  }
  acre::copy_short(queue, dst, some, waiting, bits, row_bytes);
}

void acre_cuda_pool(acre_queue *queue, void *dst, const void *const *sources, int64_t count,
                    int64_t l, int64_t width, acre_dtype dtype) {
  using namespace acre;
  int64_t size = (int64_t)acre_dtype_size(dtype);
  int64_t each = l * ((int64_t)sizeof(void *) + width * size);
  int64_t room = acre_max(1, (int64_t)workspace_room(queue) / each);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t j = 0; j < count; j += room)
      pool_some(queue, (T *)dst + j * width, sources + j * l, acre_min(room, count - j), l,
                width);
  });
}

void acre_cuda_clear(acre_queue *queue, void *dst, size_t bytes) {
  if (!bytes || queue->failure.failed) return;
  acre::on_device scope(queue->owner->ordinal);
  acre::check(&queue->failure, cudaMemsetAsync(dst, 0, bytes, queue->stream),
              ACRE_SITE("cudaMemsetAsync"));
}

void acre_cuda_round(acre_queue *queue, void *y, int64_t y_stride, const float *x,
                     int64_t x_stride, int64_t rows, int64_t width, acre_dtype dtype) {
  using namespace acre;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    ACRE_LAUNCH(queue, round_kernel<T>, rows, threads_for(width), 0, (T *)y, y_stride, x,
                x_stride, rows, width);
  });
}

void acre_cuda_add_rows(acre_queue *queue, float *y, int64_t y_stride, const float *x,
                        int64_t x_stride, const int32_t *index, int64_t rows,
                        int64_t width) {
  using namespace acre;
  if (!index)
    ACRE_LAUNCH(queue, add_rows_kernel, rows, threads_for(width), 0, y, y_stride, x,
                x_stride, rows, width);
  else if (rows > 0)
    ACRE_LAUNCH(queue, add_indexed_kernel, blocks_for(width, WARP), WARP, 0, y, y_stride, x,
                x_stride, index, rows, width);
}
