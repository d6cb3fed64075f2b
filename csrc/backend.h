/* THE SEAM between the stages and the devices.
 *
 * A backend gives memory and some forty stage-level operations; the stages above use
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
typedef struct acre_peers acre_peers;   /* devices of other processes */
typedef struct acre_loop acre_loop;     /* a step that the device repeats */

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

enum { ACRE_TOP_MOST = 1024 };  /* logits that `top` gives at most */
enum { ACRE_ATTEND_PARTS = 4 }; /* partial sums of attend_back's dq, on any device */

typedef struct acre_backend_ops {
  const char *name;

  /* ---- memory. alloc is zero-filled and 64-byte aligned; out of memory is ACRE_NO_MEMORY. */
  acre_status (*alloc)(acre_backend *, acre_buffer **out, size_t bytes, acre_error *);
  /* Bytes that alloc can still give, as far as the device tells; 0: it does not tell. */
  size_t (*available)(acre_backend *);
  /* Host memory that operations read and write as their own: pinned where the device lies
   * apart, and then on the account of the host. Not zeroed. Whoever releases it has waited
   * for the operations that use it. */
  acre_status (*alloc_host)(acre_backend *, acre_buffer **out, size_t bytes, acre_error *);
  void (*destroy)(acre_backend *);

  acre_status (*queue_open)(acre_backend *, acre_queue **out, acre_error *);
  /* A queue with little scratch, for what moves entries: upload, download, copy_rows, rotate. */
  acre_status (*mover_open)(acre_backend *, acre_queue **out, acre_error *);
  void (*queue_close)(acre_queue *);               /* waits */
  acre_status (*sync)(acre_queue *, acre_error *); /* waits; reports the first failure */
  /* What is enqueued on `later` from now on runs after all that lies on `earlier` by now; a
   * failure of `earlier` is one of `later`, too. Both belong to the caller. */
  void (*follow)(acre_queue *later, acre_queue *earlier);

  void (*upload)(acre_queue *, void *dst, const void *host, size_t bytes);
  void (*download)(acre_queue *, void *host, const void *src, size_t bytes); /* waits */

  /* ---- what others have on this device. They make it on their streams, which wait for
   * nobody here: `stream` is the handle of the one on which fetch and store_array read it, so
   * that they can have theirs go before it. On the CPU there is none: NULL. Both wait. */
  void *(*stream)(acre_backend *);
  acre_status (*fetch)(acre_backend *, void *host, const void *src, size_t bytes,
                       acre_error *);
  /* dst [rows, columns] of F32 or BF16, dense, from an array on the device of one dimension or
   * two, any strides and dtype; *finite as in matrix_fill. */
  void (*store_array)(acre_backend *, void *dst, acre_dtype dtype, const acre_array *array,
                      bool *finite);

  /* ---- weights. A matrix starts zeroed; fill converts and packs rows [row, row + count)
   * of N from a host array [count, K]. *finite = false where a NaN or infinity came (in T:
   * a float32 above the bf16 range rounds to infinity and counts). Rows already filled are
   * overwritten. The array may be on_device. */
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
   * the row's highest logit, 64 at a time in float32 and those sums in float64. target on
   * the device. */
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
   * overlaps a destination. Sources may be host or device memory or a mapped file; what
   * neither alloc nor alloc_host gave is read before the call returns. */
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
   * of the rounded ones. `own` may be any count beyond what is seen. A row's result does not
   * depend on the other rows; with `split` a single row may share its keys out to many workers
   * and sum in another order. lse [rows, h] float32, nullable: log2 of the sum of exp(logit). */
  void (*attend)(acre_queue *, void *out, int64_t out_stride, float *lse, const float *q,
                 int64_t q_stride, const acre_keys *prefix, const acre_keys *own,
                 int64_t seen, int64_t rows, bool split, const acre_heads *);

  /* scores[j] += sum over t query rows and the heads with use[head] != 0 of
   * softmax over j of (T(q).k_j / sqrt(d)), in float32. q [t, h, d] float32 (row stride q_stride), keys
   * [m, g, d] of T, use [h] on the host, scores [m] float32. */
  void (*score)(acre_queue *, float *scores, const float *q, int64_t q_stride,
                const void *keys, const uint8_t *use, int64_t t, int64_t m,
                const acre_heads *);

  /* ---- training (METHOD.md, section 6): `_back` is the gradient of the operation of that
   * name, in float32. d<name> stands for the loss's derivative by <name>. Roundings to T count
   * as the identity. What is added up is added in an order that threads do not change. */

  /* Rows [row, row + rows) of W as float32 [rows, K], and from there (rounded to T; not for
   * q8). */
  void (*matrix_get)(acre_queue *, float *x, const acre_matrix *W, int64_t row,
                     int64_t rows);
  void (*matrix_set)(acre_queue *, acre_matrix *W, int64_t row, const float *x,
                     int64_t rows);
  /* W^T [K, N], for products with the other side of W; of T even where W is kept as q8. Where
   * *out is not NULL it is what this call once gave for W and follows W's new numbers, which
   * cannot fail. */
  acre_status (*matrix_transpose)(acre_queue *, acre_matrix **out, const acre_matrix *W,
                                  acre_error *);

  void (*clear)(acre_queue *, void *dst, size_t bytes);

  /* y[i, :] = T(x[i, :]); rows of `width`, y_stride and x_stride elements apart. */
  void (*round)(acre_queue *, void *y, int64_t y_stride, const float *x, int64_t x_stride,
                int64_t rows, int64_t width, acre_dtype);

  /* y[index[i], :] += x[i, :] in the order of i, all float32; index on the device, may name a
   * row more than once; NULL: row i. */
  void (*add_rows)(acre_queue *, float *y, int64_t y_stride, const float *x,
                   int64_t x_stride, const int32_t *index, int64_t rows, int64_t width);

  /* dx += the gradient through y = x / sqrt(mean(x^2) + eps) * gain; all float32, dense. */
  void (*rmsnorm_back)(acre_queue *, float *dx, const float *dy, const float *x,
                       const float *gain, double eps, int64_t rows, int64_t width);

  /* Through y = silu(gate) * up, all [rows, width], dense: gate, up, dy float32; dgate and
   * dup of T. */
  void (*swiglu_back)(acre_queue *, void *dgate, void *dup, const float *gate,
                      const float *up, const float *dy, int64_t rows, int64_t width,
                      acre_dtype);

  /* dlogits[i, :] = T(weight[i] * (softmax(logits[i, :]) - onehot(target[i]))), and out[i] as
   * cross_entropy gives it (not weighted); both 0 where target[i] is -1. weight [rows] and
   * target on the device. */
  void (*cross_entropy_back)(acre_queue *, void *dlogits, float *out, const float *logits,
                             const int32_t *target, const float *weight, int64_t rows,
                             int64_t vocab, acre_dtype);

  /* dW[n, k] += sum over i of dy[i, n] * x[i, k], in the order of i (on the CPU one FMA after
   * another, from the old dW on): dW [N, K] float32 dense, dy float32 with row stride
   * dy_stride, x [rows, K] of T, dense. */
  void (*matmul_back)(acre_queue *, float *dW, const float *dy, int64_t dy_stride,
                      const void *x, int64_t rows, int64_t N, int64_t K, acre_dtype);

  /* Through attend with seen = 0 and own->count = rows: q [rows, h, d] of T as rotated, out
   * [rows, h, d] of T and lse as attend gave them, dout [rows, h, d] float32 (all dense).
   * Written: dqkv [rows, (h + 2g) d] float32, the gradients of row i's rotated query, of its
   * own rotated key and of its own value; dk, dv [prefix->count, g, d] float32. scratch:
   * float32 [ACRE_ATTEND_PARTS - 1, rows, h, d]. */
  void (*attend_back)(acre_queue *, float *dqkv, float *dk, float *dv, float *scratch,
                      const float *dout, const void *out, const float *lse, const void *q,
                      const acre_keys *prefix, const acre_keys *own, int64_t rows,
                      const acre_heads *);

  /* Through s = sum of pull[j] scores[j], scores as score gives them: adds ds/dq to dq
   * [t, h, d] (row stride dq_stride) and ds/dk to dk [m, g, d], both float32. q [t, h, d] of
   * T, dense; pull [m] on the host. */
  void (*score_back)(acre_queue *, float *dq, int64_t dq_stride, float *dk,
                     const float *pull, const void *q, const void *keys, const uint8_t *use,
                     int64_t t, int64_t m, const acre_heads *);

  /* The sum of x[i]^2, in float64, on the host; waits. */
  void (*sum_squares)(acre_queue *, double *out, const float *x, int64_t n);

  /* One step of AdamW on w [n], with its moments and g = scale * gradient:
   *   first = beta1 first + (1 - beta1) g, second = beta2 second + (1 - beta2) g^2,
   *   w = w - lr (first / (1 - beta1^step) / (sqrt(second / (1 - beta2^step)) + eps)
   *               + weight_decay w) */
  void (*adamw)(acre_queue *, float *w, float *first, float *second, const float *gradient,
                int64_t n, float scale, const acre_adamw *);

  /* ---- choosing a token. A NaN counts below -infinity; of equals the lower id is first. */

  /* id[i] = that of the highest of row i of logits [rows, vocab]. */
  void (*argmax)(acre_queue *, int32_t *id, const float *logits, int64_t rows,
                 int64_t vocab);

  /* The k highest logits of one row [vocab], the highest first: values [k] and ids [k], k <=
   * vocab, ACRE_TOP_MOST. *mass = sum of exp(scale * (logit - values[0])) over all logits
   * above -infinity, to within 2^-16 of it, where values[0] is finite. */
  void (*top)(acre_queue *, float *values, int32_t *ids, float *mass, const float *logits,
              int64_t vocab, int64_t k, float scale);

  /* Of a row's logits, those of `ids`, no two the same and on the device: divided by penalty
   * where above 0, else multiplied. */
  void (*penalize)(acre_queue *, float *logits, const int32_t *ids, int64_t count,
                   float penalty);

  /* ---- steps that the device takes without the host; all four NULL where it cannot.
   *
   * Records what `step(context)` enqueues on the queue, once, and runs none of it. At step i
   * of the loop, 0 <= i < most, rope and store_kv stand at `position` + i, store_kv writes i
   * rows further on, and attend (rows = 1, split) has `seen` + i and sees as many keys; all
   * else is the same, so what changes must go through memory. *id is kept behind each step.
   * The bits are those of the operations called one by one. Nothing is uploaded or waited for
   * within a step. Where it fails, nothing has run. */
  acre_status (*loop_record)(acre_queue *, acre_loop **out, void (*step)(void *),
                             void *context, const int32_t *id, int64_t most, acre_error *);
  /* Enqueues the next `count` steps. */
  void (*loop_run)(acre_loop *, int64_t count);
  /* ids [count] of steps [first, first + count), which were run; waits for no later ones than
   * those of the same loop_run. Reports the queue's first failure, as sync does. */
  acre_status (*loop_read)(acre_loop *, int32_t *ids, int64_t first, int64_t count,
                           acre_error *);
  void (*loop_release)(acre_loop *); /* waits for its steps; before the queue is closed */

  /* ---- sums over the devices of several processes: all five, or NULL. */

  /* An id for peers_open, made by one of them and carried to all. */
  acre_status (*peers_invite)(acre_backend *, uint8_t id[ACRE_PEERS_ID], acre_error *);
  /* Begins to meet the `world` ranks that got this id. The queue must outlive the peers. */
  acre_status (*peers_open)(acre_queue *, acre_peers **out, int64_t rank, int64_t world,
                            const uint8_t id[ACRE_PEERS_ID], acre_error *);
  void (*peers_close)(acre_peers *); /* gives up what is under way */
  /* Begins x[i] = the sum of x[i] over all ranks, behind what the queue has to do; the queue
   * gets nothing else until peers_wait is done. */
  void (*peers_sum)(acre_peers *, float *x, int64_t n);
  /* Waits for what open or sum began, `seconds` at most; *done: whether it is through. After a
   * refusal the peers are good for closing only, the queue for all that it was before. */
  acre_status (*peers_wait)(acre_peers *, bool *done, double seconds, acre_error *);
} acre_backend_ops;

struct acre_backend {
  const acre_backend_ops *ops;
  const char *isa; /* what the tables were filled with, for people */
  int32_t threads;
  int64_t rows_max;                /* rows per forward pass that keep the device busy */
  bool apart;                      /* buffers lie where the host cannot read them */
  size_t queue_bytes, mover_bytes; /* of device memory that a queue, a mover takes */
  acre_account account;            /* bytes held and their peak */
  acre_account host;               /* of alloc_host, where those are not on the other */
};

acre_status acre_cpu_backend_open(acre_backend **out, int32_t threads, const char *isa,
                                  acre_error *error);

#ifdef __cplusplus
}
#endif
#endif
