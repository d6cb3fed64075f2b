/* What the files of the CUDA backend share: the backend, a queue and its scratch, launches.
 *
 * A queue is a stream with a fixed workspace, so nothing is allocated after queue_open and
 * no operation can fail but on the device. The first failure of a queue stays in it, with
 * what was called and where; from then on its operations do nothing, and `sync` reports it.
 * Other queues go on, as far as the device lets them. */
#ifndef ACRE_CUDA_INTERNAL_H
#define ACRE_CUDA_INTERNAL_H

#include "backend.h"
#include "platform.h"
#include "plugin.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

struct acre_gemm_library; /* gemm.h */
struct acre_gemm;
struct acre_nccl; /* nccl.cu */

namespace acre {

/* ------------------------------------------------------------------ failures */

/* Where in our sources something was asked of the device. */
struct site {
  const char *call, *file;
  int line;
};

struct failure {
  bool failed, told;
  char message[400];
};

#define ACRE_SITE(call) (acre::site{call, __FILE__, __LINE__})

/* Keeps the failure if it is the first; true where there was none. */
bool check(failure *kept, cudaError_t error, const site &at);

/* A refusal with the error's name; out of memory is ACRE_NO_MEMORY. */
acre_status refuse(acre_error *error, cudaError_t from, const site &at);

/* ------------------------------------------------------------------ backend, queue */

struct limits {
  int major, minor; /* compute capability */
  int processors;
  size_t shared; /* bytes that a block may have */
};

constexpr size_t MOVER_BYTES = 4096; /* scratch of a mover: spans */
constexpr int STAGES = 4;            /* parts of the staging memory, taken in turn */

struct staging {
  char *memory; /* pinned, [STAGES][bytes] */
  size_t bytes, used;
  int current;
  cudaEvent_t free[STAGES]; /* what was copied from this part has arrived */
};

struct backend {
  acre_backend base;
  int ordinal;
  limits chip;
  int64_t references;
  size_t workspace_bytes, staging_bytes;
  acre_gemm_library *gemm;
  char *libraries; /* where to look for what is loaded later; or NULL */
  acre_nccl *nccl; /* NULL until peers are asked for */
  void
      *tensor_maps; /* the driver's cuTensorMapEncodeTiled, where kernels use it; or NULL */
  acre_mutex *loading; /* of `loader` */
  acre_queue *loader;  /* for what comes without a queue: zeroing, weights */
  char isa[32];
  acre_backend_ops ops; /* chosen for this chip */
};

/* The device of the calling thread is ours while this lives. */
class on_device {
 public:
  explicit on_device(int ordinal) : before_(ordinal) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ == ordinal) return;
    cudaSetDevice(ordinal);
    changed_ = true;
  }
  ~on_device() {
    if (changed_) cudaSetDevice(before_);
  }
  on_device(const on_device &) = delete;

 private:
  int before_;
  bool changed_ = false;
};

}  // namespace acre

struct acre_queue {
  acre::backend *owner;
  cudaStream_t stream;
  cudaEvent_t reached; /* where another queue goes on behind this one */
  acre::failure failure;
  acre_buffer *workspace;
  acre::staging staging;
  acre_gemm *gemm; /* NULL: a mover */
  /* While a loop is recorded: device memory that counts its steps, and the most of them. */
  const int32_t *steps;
  int64_t steps_most;
};

/* Numbers of T; number (n, k) lies n * row_step + k * column_step after the first. */
struct acre_matrix {
  acre::backend *owner;
  acre_buffer *buffer;
  int64_t N, K, row_step, column_step;
  acre_dtype dtype;
  acre_weights weights;
};

namespace acre {

/* The queue's scratch, the same at every call: operations follow one another. NULL, and a
 * failure, where it is too small. */
void *workspace(acre_queue *queue, size_t bytes);
size_t workspace_room(const acre_queue *queue);

/* Host memory to device memory, in the queue's order; the host's may change at once. */
void send(acre_queue *queue, void *to, const void *host, size_t bytes);
/* Small values that are sent one after the other, many at a time. */
template <class V>
class sender {
 public:
  sender(acre_queue *queue, V *to) : queue_(queue), to_(to) {}
  ~sender() { flush(); }
  sender(const sender &) = delete;
  void add(V value) {
    if (count_ == ROOM) flush();
    waiting_[count_++] = value;
  }

 private:
  static constexpr int ROOM = 256;
  void flush() {
    send(queue_, to_, waiting_, (size_t)count_ * sizeof(V));
    to_ += count_, count_ = 0;
  }
  acre_queue *queue_;
  V *to_, waiting_[ROOM];
  int count_ = 0;
};

/* Any memory of device or host to what the device may write, in the queue's order. */
void copy(acre_queue *queue, void *to, const void *from, size_t bytes);
/* Whether kernels may read it: device memory, and pinned memory of the host. */
bool device_reads(const void *memory);

/* As the operation; q8: of bf16, as the numbers that q8 keeps. */
void store_array(backend *owner, void *dst, acre_dtype dtype, bool q8,
                 const acre_array *array, bool *finite);

void nccl_close(acre_nccl *nccl);

/* The first failure of the queue, or of what comes without one. */
acre_status report(acre_queue *queue, acre_error *error);

/* A backend lives until it is destroyed and its last buffer is gone. */
void leave(backend *owner);

acre_status alloc(acre_backend *base, acre_buffer **out, size_t bytes, acre_error *error);
acre_status alloc_host(acre_backend *base, acre_buffer **out, size_t bytes,
                       acre_error *error);
size_t available(acre_backend *base);
acre_status queue_open(acre_backend *base, acre_queue **out, acre_error *error);
acre_status mover_open(acre_backend *base, acre_queue **out, acre_error *error);
acre_status queue_open_with(backend *owner, size_t workspace_bytes, bool products,
                            acre_queue **out, acre_error *error);
void queue_close(acre_queue *queue);
void follow(acre_queue *later, acre_queue *earlier);
/* As the operation; waits. */
void download(acre_queue *queue, void *host, const void *src, size_t bytes);

/* ------------------------------------------------------------------ launches */

constexpr int64_t BLOCKS_MOST = INT32_MAX;   /* of a grid's first dimension */
constexpr size_t SHARED_MOST = 99 * 1024;    /* of a block, on every chip from 8.0 on */
constexpr size_t SHARED_UNASKED = 48 * 1024; /* more must be asked for */

inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return acre_min(acre_ceil_div(items, per_block), BLOCKS_MOST);
}

/* Threads for a row of so many numbers, PACK each: whole warps. */
inline int threads_for(int64_t width) {
  return (int)acre_min(256, acre_round_up(acre_max(acre_ceil_div(width, 8), 1), 32));
}

template <class... P, class... A>
void launch(acre_queue *queue, const site &at, void (*kernel)(P...), int64_t blocks,
            int threads, size_t shared, A... arguments) {
  if (blocks <= 0 || queue->failure.failed) return;
  on_device scope(queue->owner->ordinal);
  dim3 grid((unsigned)acre_min(blocks, BLOCKS_MOST)), block((unsigned)threads);
#ifdef __CUDACC__
  if (shared > SHARED_UNASKED &&
      !check(&queue->failure,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)shared),
             at))
    return;
  kernel<<<grid, block, shared, queue->stream>>>(static_cast<P>(arguments)...);
  check(&queue->failure, cudaGetLastError(), at);
#else
  check(&queue->failure,
        acre_host_launch_on(queue->stream, at.call, kernel, grid, block, shared,
                            arguments...),
        at);
#endif
}

/* A kernel with its template arguments in parentheses; no blocks: nothing happens. */
#define ACRE_LAUNCH(queue, kernel, blocks, threads, shared, ...) \
  acre::launch(queue, ACRE_SITE(#kernel), kernel, blocks, threads, shared, __VA_ARGS__)

/* Calls with a zero of T. */
template <class F>
void for_dtype(acre_dtype dtype, F call) {
  if (dtype == ACRE_F32)
    call(0.0f);
  else
    call(__nv_bfloat16{});
}

/* Whether rows `step` bytes apart from here on start at multiples of sixteen bytes. */
inline bool aligned(const void *memory, int64_t step) {
  return ((uintptr_t)memory | (uintptr_t)step) % 16 == 0;
}

}  // namespace acre

/* ------------------------------------------------------------------ operations */

/* As backend.h has them. */
/* matrix.cu */
acre_status acre_cuda_matrix_create(acre_backend *, acre_matrix **out, int64_t N, int64_t K,
                                    acre_dtype dtype, acre_weights weights, acre_error *);
void acre_cuda_matrix_release(acre_matrix *);
void acre_cuda_matrix_fill(acre_matrix *, int64_t row, const acre_array *host,
                           bool *finite);
void acre_cuda_matrix_get(acre_queue *, float *x, const acre_matrix *W, int64_t row,
                          int64_t rows);
void acre_cuda_matrix_set(acre_queue *, acre_matrix *W, int64_t row, const float *x,
                          int64_t rows);
acre_status acre_cuda_matrix_transpose(acre_queue *, acre_matrix **out,
                                       const acre_matrix *W, acre_error *);
/* gemm.cu */
void acre_cuda_matmul(acre_queue *, float *y, int64_t y_stride, const void *x,
                      const acre_matrix *W, const float *bias, int64_t rows,
                      bool accumulate);
void acre_cuda_swiglu(acre_queue *, void *y, const void *x, const acre_matrix *gate,
                      const acre_matrix *up, int64_t rows);
void acre_cuda_matmul_back(acre_queue *, float *dW, const float *dy, int64_t dy_stride,
                           const void *x, int64_t rows, int64_t N, int64_t K, acre_dtype);
/* embed.cu, norm.cu, activation.cu, loss.cu */
void acre_cuda_embed(acre_queue *, float *x, const int32_t *ids, const void *table,
                     const void *l1_row, int64_t rows, int64_t vocab, int64_t width,
                     acre_dtype);
void acre_cuda_rmsnorm(acre_queue *, void *y, const float *x, const float *gain, double eps,
                       int64_t rows, int64_t width, acre_dtype);
void acre_cuda_rmsnorm_back(acre_queue *, float *dx, const float *dy, const float *x,
                            const float *gain, double eps, int64_t rows, int64_t width);
void acre_cuda_gated(acre_queue *, void *y, const float *gate, const float *up, int64_t n,
                     acre_dtype);
void acre_cuda_swiglu_back(acre_queue *, void *dgate, void *dup, const float *gate,
                           const float *up, const float *dy, int64_t rows, int64_t width,
                           acre_dtype);
void acre_cuda_cross_entropy(acre_queue *, float *out, const float *logits,
                             const int32_t *target, int64_t rows, int64_t vocab);
void acre_cuda_cross_entropy_back(acre_queue *, void *dlogits, float *out,
                                  const float *logits, const int32_t *target,
                                  const float *weight, int64_t rows, int64_t vocab,
                                  acre_dtype);
/* rows.cu, array.cu */
void acre_cuda_gather_rows(acre_queue *, void *y, const void *x, const int32_t *index,
                           int64_t rows, size_t row_bytes);
void acre_cuda_scatter_rows(acre_queue *, void *y, const void *x, const int32_t *index,
                            int64_t rows, size_t row_bytes);
void acre_cuda_copy_rows(acre_queue *, void *dst, const acre_span *spans, int64_t count,
                         size_t row_bytes);
void acre_cuda_pool(acre_queue *, void *dst, const void *const *sources, int64_t count,
                    int64_t l, int64_t width, acre_dtype);
void acre_cuda_clear(acre_queue *, void *dst, size_t bytes);
void acre_cuda_round(acre_queue *, void *y, int64_t y_stride, const float *x,
                     int64_t x_stride, int64_t rows, int64_t width, acre_dtype);
void acre_cuda_add_rows(acre_queue *, float *y, int64_t y_stride, const float *x,
                        int64_t x_stride, const int32_t *index, int64_t rows,
                        int64_t width);
void *acre_cuda_stream(acre_backend *);
acre_status acre_cuda_fetch(acre_backend *, void *host, const void *src, size_t bytes,
                            acre_error *);
void acre_cuda_store_array(acre_backend *, void *dst, acre_dtype dtype,
                           const acre_array *array, bool *finite);
/* rope.cu */
void acre_cuda_rope(acre_queue *, float *x, int64_t x_stride, const float *cos,
                    const float *sin, int64_t position, int64_t rows, int64_t heads,
                    int64_t head_dim);
void acre_cuda_store_kv(acre_queue *, void *raw, void *rotated, void *values,
                        const float *k, const float *v, int64_t kv_stride, const float *cos,
                        const float *sin, int64_t position, int64_t rows,
                        const acre_heads *);
void acre_cuda_rotate(acre_queue *, void *rotated, const void *raw, const float *cos,
                      const float *sin, int64_t position, int64_t rows, const acre_heads *);
/* attention.cu, attention_back.cu, score.cu, score_back.cu */
void acre_cuda_attend(acre_queue *, void *out, int64_t out_stride, float *lse,
                      const float *q, int64_t q_stride, const acre_keys *prefix,
                      const acre_keys *own, int64_t seen, int64_t rows, bool split,
                      const acre_heads *);
void acre_cuda_attend_back(acre_queue *, float *dqkv, float *dk, float *dv, float *scratch,
                           const float *dout, const void *out, const float *lse,
                           const void *q, const acre_keys *prefix, const acre_keys *own,
                           int64_t rows, const acre_heads *);
void acre_cuda_score(acre_queue *, float *scores, const float *q, int64_t q_stride,
                     const void *keys, const uint8_t *use, int64_t t, int64_t m,
                     const acre_heads *);
void acre_cuda_score_back(acre_queue *queue, float *dq, int64_t dq_stride, float *dk,
                          const float *pull, const void *q, const void *keys,
                          const uint8_t *use, int64_t t, int64_t m,
                          const acre_heads *heads);
/* choose.cu */
void acre_cuda_argmax(acre_queue *, int32_t *id, const float *logits, int64_t rows,
                      int64_t vocab);
void acre_cuda_top(acre_queue *, float *values, int32_t *ids, float *mass,
                   const float *logits, int64_t vocab, int64_t k, float scale);
void acre_cuda_penalize(acre_queue *, float *logits, const int32_t *ids, int64_t count,
                        float penalty);
/* loop.cu */
acre_status acre_cuda_loop_record(acre_queue *, acre_loop **out, void (*step)(void *),
                                  void *context, const int32_t *id, int64_t most,
                                  acre_error *);
void acre_cuda_loop_run(acre_loop *, int64_t count);
acre_status acre_cuda_loop_read(acre_loop *, int32_t *ids, int64_t first, int64_t count,
                                acre_error *);
void acre_cuda_loop_release(acre_loop *);
/* optimiser.cu */
void acre_cuda_sum_squares(acre_queue *, double *out, const float *x, int64_t n);
void acre_cuda_adamw(acre_queue *, float *w, float *first, float *second,
                     const float *gradient, int64_t n, float scale, const acre_adamw *);
/* nccl.cu */
acre_status acre_cuda_peers_invite(acre_backend *, uint8_t id[ACRE_PEERS_ID], acre_error *);
acre_status acre_cuda_peers_open(acre_queue *, acre_peers **out, int64_t rank,
                                 int64_t world, const uint8_t id[ACRE_PEERS_ID],
                                 acre_error *);
void acre_cuda_peers_close(acre_peers *);
void acre_cuda_peers_sum(acre_peers *, float *x, int64_t n);
acre_status acre_cuda_peers_wait(acre_peers *, bool *done, double seconds, acre_error *);

#endif
