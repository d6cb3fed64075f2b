/* THE SEAM between the stages and the devices.
 *
 * A backend gives memory and some twenty stage-level operations; the stages above use
 * nothing else, so that a second device is a second table and not a second method. The CPU
 * table (cpu/backend.c) is the oracle for every other.
 *
 * Memory named by a `void *` or `float *` below lies on the backend's device; spans, index
 * lists of spans, and scalars lie on the host and are consumed before the call returns.
 * Operations are enqueued in order on a queue and cannot fail by themselves; a device
 * failure is reported by the next `sync`. A queue belongs to one builder or session, so
 * operations of different queues may run at once; matrices and tables are read-only.
 *
 * "dtype" is the model's compute and cache type T: F32 or BF16. The residual stream and
 * what is added up are float32; what only goes into a matrix product is rounded to T by
 * the operation that makes it. Shapes are row-major; `rows` may be 0 everywhere (nothing
 * happens).
 */
#ifndef ACRE_BACKEND_H
#define ACRE_BACKEND_H

#include "acre.h"
#include "buffer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct acre_backend acre_backend;
typedef struct acre_queue acre_queue;   /* defined by each backend */
typedef struct acre_matrix acre_matrix; /* [N, K] weights in the backend's own layout */

/* Rows [0, rows) of `source` go to rows [dst_row, dst_row + rows) of the destination. */
typedef struct acre_span {
  const void *source;
  int64_t dst_row;
  int64_t rows;
} acre_span;

/* Keys and values that queries see: token-major [count, g, d] of T, and a logit bias per
 * key (nullable: none). */
typedef struct acre_keys {
  const void *rotated; /* keys after RoPE */
  const void *values;
  const float *bias; /* [count], added to the scaled logit */
  int64_t count;
} acre_keys;

/* Sizes shared by the attention operations. */
typedef struct acre_heads {
  int64_t heads;    /* h */
  int64_t kv_heads; /* g */
  int64_t head_dim; /* d */
  acre_dtype dtype; /* T */
} acre_heads;

typedef struct acre_backend_ops {
  const char *name;

  /* ---- memory. alloc is zero-filled and 64-byte aligned; out of memory is ACRE_NO_MEMORY. */
  acre_status (*alloc)(acre_backend *, acre_buffer **out, size_t bytes, acre_error *);
  void (*destroy)(acre_backend *);

  acre_status (*queue_open)(acre_backend *, acre_queue **out, acre_error *);
  void (*queue_close)(acre_queue *);
  acre_status (*sync)(acre_queue *, acre_error *); /* waits; reports the first failure */

  void (*upload)(acre_queue *, void *dst, const void *host, size_t bytes);
  void (*download)(acre_queue *, void *host, const void *src, size_t bytes); /* waits */

  /* ---- weights. A matrix starts zeroed; fill converts and packs rows [row, row + count)
   * of N from a host array [count, K]. *finite = false where a NaN or infinity came (in T:
   * a float32 above the bf16 range rounds to infinity and counts). Rows already filled are
   * overwritten. */
  acre_status (*matrix_create)(acre_backend *, acre_matrix **out, int64_t N, int64_t K,
                               acre_dtype dtype, acre_weights weights, acre_error *);
  void (*matrix_release)(acre_matrix *);
  void (*matrix_fill)(acre_matrix *, int64_t row, const acre_array *host, bool *finite);

  /* ---- rows of activations. */

  /* x[i, :] = table[ids[i], :] (table [vocab, width] of T), or l1_row [width] of T where
   * ids[i] == vocab. ids lie on the device. */
  void (*embed)(acre_queue *, float *x, const int32_t *ids, const void *table,
                const void *l1_row, int64_t rows, int64_t vocab, int64_t width, acre_dtype);

  /* y[i, :] = T(x[i, :] / sqrt(mean(x[i, :]^2) + eps) * gain). Mean accumulated in 16 f32
   * lanes. x float32, y of T. */
  void (*rmsnorm)(acre_queue *, void *y, const float *x, const float *gain, double eps,
                  int64_t rows, int64_t width, acre_dtype);

  /* y[i, j] (+)= sum over c of x[i, c] * W[j, c] + bias[j], accumulated in float32.
   * y [rows, N] float32 with row stride y_stride >= N; x [rows, K] dense, of T; bias [N]
   * nullable. With `accumulate`, y's old value is the addend. On the CPU the sum runs over
   * c in order (bf16: in pairs, the odd one of each first), one FMA at a time, after which
   * the bias (else the old value) is added: a row's result does not depend on the other
   * rows. */
  void (*matmul)(acre_queue *, float *y, int64_t y_stride, const void *x,
                 const acre_matrix *W, const float *bias, int64_t rows, bool accumulate);

  /* y[i, j] = T(silu(g) * u), g and u the products of x[i, :] with row j of `gate` and of
   * `up`, both [N, K]; summed as in matmul. y [rows, N] and x [rows, K] dense, of T. */
  void (*swiglu)(acre_queue *, void *y, const void *x, const acre_matrix *gate,
                 const acre_matrix *up, int64_t rows);

  /* out[i] = log(sum over c of exp(logits[i, c])) - logits[i, target[i]], or 0 where target[i]
   * is -1. logits [rows, vocab] float32; the sum is of float32 exponentials of differences to
   * the row's highest logit, added up in double. target on the device. */
  void (*cross_entropy)(acre_queue *, float *out, const float *logits,
                        const int32_t *target, int64_t rows, int64_t vocab);

  /* y[i] = x[index[i]], and y[index[i]] = x[i]: rows of row_bytes bytes, dense; index on
   * the device. */
  void (*gather_rows)(acre_queue *, void *y, const void *x, const int32_t *index,
                      int64_t rows, size_t row_bytes);
  void (*scatter_rows)(acre_queue *, void *y, const void *x, const int32_t *index,
                       int64_t rows, size_t row_bytes);

  /* ---- rotation and the timeline. cos, sin: [w_max, d/2] float32. Half-split pairs:
   * (a, b) = (x[i], x[i + d/2]) -> (a cos - b sin, b cos + a sin). */

  /* In place on queries x [rows, h, d], row stride x_stride, row i at position + i. */
  void (*rope)(acre_queue *, float *x, int64_t x_stride, const float *cos, const float *sin,
               int64_t position, int64_t rows, int64_t heads, int64_t head_dim);

  /* Appends rows of keys and values to a timeline: raw (nullable), rotated, values point at
   * the first row to write, [rows, g, d] of T; k and v [rows, g, d] float32 with row stride
   * kv_stride. Rotation acts on the float32 key rounded to T, so that rotating a stored raw
   * key gives the same bits. */
  void (*store_kv)(acre_queue *, void *raw, void *rotated, void *values, const float *k,
                   const float *v, int64_t kv_stride, const float *cos, const float *sin,
                   int64_t position, int64_t rows, const acre_heads *);

  /* rotated[i] = RoPE(raw[i], position + i), both [rows, g, d] of T; may be in place. */
  void (*rotate)(acre_queue *, void *rotated, const void *raw, const float *cos,
                 const float *sin, int64_t position, int64_t rows, const acre_heads *);

  /* Copies spans of rows of row_bytes bytes. Destination rows are distinct, and no source
   * overlaps a destination. Sources may be host or device memory or a mapped file. */
  void (*copy_rows)(acre_queue *, void *dst, const acre_span *spans, int64_t count,
                    size_t row_bytes);

  /* dst[j] = mean over the l rows of `rows`, all [.., width] of T, mean in float32, in row
   * order. sources: host array of count * l row pointers (host or device memory). */
  void (*pool)(acre_queue *, void *dst, const void *const *sources, int64_t count,
               int64_t l, int64_t width, acre_dtype);

  /* ---- attention. q [rows, h, d] float32, already rotated; out [rows, h, d] of T; row
   * strides in elements. Query row i sees all of `prefix` (nullable) and keys [0, seen + i]
   * of `own`, where own->count >= seen + rows. Head c uses KV head c / (h/g). Logits
   * T(q).k / sqrt(d) + bias; softmax over everything seen, whose weights are exp(logit)
   * times a power of two that the row chooses, in float32, then rounded to T; their sum is
   * of the rounded ones. `own` may be any count beyond what is seen. A row's result does not depend on the other rows; with `split` a
   * single row may share its keys out to many workers and sum in another order. */
  void (*attend)(acre_queue *, void *out, int64_t out_stride, const float *q,
                 int64_t q_stride, const acre_keys *prefix, const acre_keys *own,
                 int64_t seen, int64_t rows, bool split, const acre_heads *);

  /* scores[j] += sum over t query rows and the heads with use[head] != 0 of
   * softmax over j of (T(q).k_j / sqrt(d)), in float32. q [t, h, d] float32 (row stride q_stride), keys
   * [m, g, d] of T, use [h] on the host, scores [m] float32. */
  void (*score)(acre_queue *, float *scores, const float *q, int64_t q_stride,
                const void *keys, const uint8_t *use, int64_t t, int64_t m,
                const acre_heads *);
} acre_backend_ops;

struct acre_backend {
  const acre_backend_ops *ops;
  const char *isa; /* what the tables were filled with, for people */
  int32_t threads;
  int64_t rows_max;     /* rows per forward pass that keep the device busy */
  acre_account account; /* bytes held and their peak */
};

acre_status acre_cpu_backend_open(acre_backend **out, int32_t threads, const char *isa,
                                  acre_error *error);

#ifdef __cplusplus
}
#endif
#endif
