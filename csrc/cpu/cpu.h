/* What the files of the CPU backend share: the backend, a queue and its scratch.
 *
 * Operations run at once on the caller and the pool, so a queue is only scratch memory.
 * Its size is constant: nothing is allocated after queue_open and no operation can
 * fail. */
#ifndef ACRE_CPU_H
#define ACRE_CPU_H

#include "../backend.h"
#include "../platform.h"
#include "../pool.h"
#include "kernels.h"

/* Lives until it is destroyed and its last buffer is gone: a buffer's bytes are taken
 * off the account when it is freed. */
typedef struct cpu_backend {
  acre_backend base;
  acre_kernels kernels;
  acre_pool *pool;
  _Atomic int64_t references;
} cpu_backend;

#define ACRE_WORKER_FLOATS (225 * 1024)  /* scratch of one worker */
#define ACRE_SHARED_FLOATS (1100 * 1024) /* scratch that all workers see */

struct acre_queue {
  cpu_backend *backend;
  const acre_kernels *kernels;
  acre_pool *pool;
  float *workers; /* [threads][ACRE_WORKER_FLOATS] */
  float *shared;  /* [ACRE_SHARED_FLOATS] */
};

static inline float *acre_cpu_scratch(const acre_queue *queue, int32_t worker) {
  return queue->workers + (int64_t)worker * ACRE_WORKER_FLOATS;
}

acre_status acre_cpu_alloc(acre_backend *backend, acre_buffer **out, size_t bytes,
                           acre_error *error);

/* weights.c */
acre_status acre_cpu_matrix_create(acre_backend *backend, acre_matrix **out, int64_t N,
                                   int64_t K, acre_dtype dtype, acre_weights weights,
                                   acre_error *error);
void acre_cpu_matrix_release(acre_matrix *matrix);
void acre_cpu_matrix_fill(acre_matrix *matrix, int64_t row, const acre_array *host,
                          bool *finite);
void acre_cpu_matrix_get(acre_queue *queue, float *x, const acre_matrix *W, int64_t row,
                         int64_t rows);
void acre_cpu_matrix_set(acre_queue *queue, acre_matrix *W, int64_t row, const float *x,
                         int64_t rows);
acre_status acre_cpu_matrix_transpose(acre_queue *queue, acre_matrix **out,
                                      const acre_matrix *W, acre_error *error);

/* matmul.c */
void acre_cpu_matmul(acre_queue *queue, float *y, int64_t y_stride, const void *x,
                     const acre_matrix *W, const float *bias, int64_t rows,
                     bool accumulate);
void acre_cpu_swiglu(acre_queue *queue, void *y, const void *x, const acre_matrix *gate,
                     const acre_matrix *up, int64_t rows);
void acre_cpu_matmul_back(acre_queue *queue, float *dW, const float *dy, int64_t dy_stride,
                          const void *x, int64_t rows, int64_t N, int64_t K,
                          acre_dtype dtype);

/* learn.c */
void acre_cpu_clear(acre_queue *queue, void *dst, size_t bytes);
void acre_cpu_round(acre_queue *queue, void *y, int64_t y_stride, const float *x,
                    int64_t x_stride, int64_t rows, int64_t width, acre_dtype dtype);
void acre_cpu_add_rows(acre_queue *queue, float *y, int64_t y_stride, const float *x,
                       int64_t x_stride, const int32_t *index, int64_t rows, int64_t width);
void acre_cpu_rmsnorm_back(acre_queue *queue, float *dx, const float *dy, const float *x,
                           const float *gain, double eps, int64_t rows, int64_t width);
void acre_cpu_swiglu_back(acre_queue *queue, void *dgate, void *dup, const float *gate,
                          const float *up, const float *dy, int64_t rows, int64_t width,
                          acre_dtype dtype);
void acre_cpu_cross_entropy(acre_queue *queue, float *out, const float *logits,
                            const int32_t *target, int64_t rows, int64_t vocab);
void acre_cpu_cross_entropy_back(acre_queue *queue, void *dlogits, float *out,
                                 const float *logits, const int32_t *target,
                                 const float *weight, int64_t rows, int64_t vocab,
                                 acre_dtype dtype);
void acre_cpu_sum_squares(acre_queue *queue, double *out, const float *x, int64_t n);
void acre_cpu_adamw(acre_queue *queue, float *w, float *first, float *second,
                    const float *gradient, int64_t n, float scale, const acre_adamw *adamw);

/* attention.c */
void acre_cpu_attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                     const float *q, int64_t q_stride, const acre_keys *prefix,
                     const acre_keys *own, int64_t seen, int64_t rows, bool split,
                     const acre_heads *heads);
/* attend_back.c */
void acre_cpu_attend_back(acre_queue *queue, float *dqkv, float *dk, float *dv,
                          float *scratch, const float *dout, const void *out,
                          const float *lse, const void *q, const acre_keys *prefix,
                          const acre_keys *own, int64_t rows, const acre_heads *heads);
/* score.c */
void acre_cpu_score(acre_queue *queue, float *scores, const float *q, int64_t q_stride,
                    const void *keys, const uint8_t *use, int64_t t, int64_t m,
                    const acre_heads *heads);

/* choose.c */
void acre_cpu_argmax(acre_queue *queue, int32_t *id, const float *logits, int64_t rows,
                     int64_t vocab);
void acre_cpu_top(acre_queue *queue, float *values, int32_t *ids, float *mass,
                  const float *logits, int64_t vocab, int64_t k, float scale);
void acre_cpu_penalize(acre_queue *queue, float *logits, const int32_t *ids, int64_t count,
                       float penalty);

/* score_back.c */
void acre_cpu_score_back(acre_queue *queue, float *dq, int64_t dq_stride, float *dk,
                         const float *pull, const void *q, const void *keys,
                         const uint8_t *use, int64_t t, int64_t m, const acre_heads *heads);

#endif
