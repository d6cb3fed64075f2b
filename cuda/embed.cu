/* Rows of the embedding table as float32; an L1 token has the row behind the table. */
#include "device.h"
#include "internal.h"

namespace acre {
namespace {

template <class T, int N>
__global__ void embed_kernel(float *x, const int32_t *ids, const T *table, const T *l1_row,
                             int64_t rows, int64_t vocab, int64_t width) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    int64_t id = ids[i];
    const T *from = id == vocab ? l1_row : table + id * width;
    for (int64_t c = threadIdx.x * N; c < width; c += (int64_t)blockDim.x * N) {
      float numbers[N];
      load(numbers, from + c);
      store(x + i * width + c, numbers);
    }
  }
}

}  // namespace
}  // namespace acre

void acre_cuda_embed(acre_queue *queue, float *x, const int32_t *ids, const void *table,
                     const void *l1_row, int64_t rows, int64_t vocab, int64_t width,
                     acre_dtype dtype) {
  using namespace acre;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t step = width * (int64_t)sizeof(T);
    bool packs = width % PACK == 0 && aligned(table, step) && aligned(l1_row, 0) &&
                 aligned(x, width * (int64_t)sizeof(float));
    if (packs)
      ACRE_LAUNCH(queue, (embed_kernel<T, PACK>), rows, threads_for(width), 0, x, ids,
                  (const T *)table, (const T *)l1_row, rows, vocab, width);
    else
      ACRE_LAUNCH(queue, (embed_kernel<T, 1>), rows, threads_for(width), 0, x, ids,
                  (const T *)table, (const T *)l1_row, rows, vocab, width);
  });
}
