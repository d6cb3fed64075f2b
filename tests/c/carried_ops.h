/* The operations of carried.h on rows, attention and training, in the order of backend.h:
 * which arrays each reads and writes, and how many elements of them. */
#ifndef ACRE_TEST_CARRIED_OPS_H
#define ACRE_TEST_CARRIED_OPS_H

/* ---------------------------------------------------------------- rows */

static inline void carried_embed(acre_queue *q, float *x, const int32_t *ids,
                                 const void *table, const void *l1_row, int64_t rows,
                                 int64_t vocab, int64_t width, acre_dtype dtype) {
  trip t = trip_of(q, "embed");
  size_t size = acre_dtype_size(dtype);
  CARRIED(embed, both(&t, x, rows * width, 4), in(&t, ids, rows, 4),
          in(&t, table, vocab * width, size), in(&t, l1_row, width, size), rows, vocab,
          width, dtype);
}

static inline void carried_rmsnorm(acre_queue *q, void *y, const float *x,
                                   const float *gain, double eps, int64_t rows,
                                   int64_t width, acre_dtype dtype) {
  trip t = trip_of(q, "rmsnorm");
  CARRIED(rmsnorm, both(&t, y, rows * width, acre_dtype_size(dtype)),
          in(&t, x, rows * width, 4), in(&t, gain, width, 4), eps, rows, width, dtype);
}

static inline void carried_matmul(acre_queue *q, float *y, int64_t y_stride, const void *x,
                                  const acre_matrix *W, const float *bias, int64_t rows,
                                  bool accumulate) {
  trip t = trip_of(q, "matmul");
  const carried_matrix *m = (const carried_matrix *)W;
  CARRIED(matmul, both(&t, y, strided(rows, y_stride, m->N), 4), y_stride,
          in(&t, x, rows * m->K, acre_dtype_size(m->dtype)), m->device,
          in(&t, bias, m->N, 4), rows, accumulate);
}

static inline void carried_swiglu(acre_queue *q, void *y, const void *x,
                                  const acre_matrix *gate, const acre_matrix *up,
                                  int64_t rows) {
  trip t = trip_of(q, "swiglu");
  const carried_matrix *m = (const carried_matrix *)gate;
  size_t size = acre_dtype_size(m->dtype);
  CARRIED(swiglu, both(&t, y, rows * m->N, size), in(&t, x, rows * m->K, size), m->device,
          matrix_there(up), rows);
}

static inline void carried_cross_entropy(acre_queue *q, float *out, const float *logits,
                                         const int32_t *target, int64_t rows,
                                         int64_t vocab) {
  trip t = trip_of(q, "cross_entropy");
  CARRIED(cross_entropy, both(&t, out, rows, 4), in(&t, logits, rows * vocab, 4),
          in(&t, target, rows, 4), rows, vocab);
}

static inline void carried_gather_rows(acre_queue *q, void *y, const void *x,
                                       const int32_t *index, int64_t rows,
                                       size_t row_bytes) {
  trip t = trip_of(q, "gather_rows");
  CARRIED(gather_rows, both(&t, y, rows, row_bytes),
          in(&t, x, reached(index, rows), row_bytes), in(&t, index, rows, 4), rows,
          row_bytes);
}

static inline void carried_scatter_rows(acre_queue *q, void *y, const void *x,
                                        const int32_t *index, int64_t rows,
                                        size_t row_bytes) {
  trip t = trip_of(q, "scatter_rows");
  CARRIED(scatter_rows, both(&t, y, reached(index, rows), row_bytes),
          in(&t, x, rows, row_bytes), in(&t, index, rows, 4), rows, row_bytes);
}

/* ---------------------------------------------------------------- rotation, timeline */

static inline void carried_rope(acre_queue *q, float *x, int64_t x_stride, const float *cos,
                                const float *sin, int64_t position, int64_t rows,
                                int64_t heads, int64_t head_dim) {
  trip t = trip_of(q, "rope");
  int64_t angles = (position + rows) * (head_dim / 2);
  CARRIED(rope, both(&t, x, strided(rows, x_stride, heads * head_dim), 4), x_stride,
          in(&t, cos, angles, 4), in(&t, sin, angles, 4), position, rows, heads, head_dim);
}

static inline void carried_store_kv(acre_queue *q, void *raw, void *rotated, void *values,
                                    const float *k, const float *v, int64_t kv_stride,
                                    const float *cos, const float *sin, int64_t position,
                                    int64_t rows, const acre_heads *s) {
  trip t = trip_of(q, "store_kv");
  size_t size = acre_dtype_size(s->dtype);
  int64_t width = s->kv_heads * s->head_dim, n = strided(rows, kv_stride, width);
  int64_t angles = (position + rows) * (s->head_dim / 2);
  CARRIED(store_kv, both(&t, raw, rows * width, size),
          both(&t, rotated, rows * width, size), both(&t, values, rows * width, size),
          in(&t, k, n, 4), in(&t, v, n, 4), kv_stride, in(&t, cos, angles, 4),
          in(&t, sin, angles, 4), position, rows, s);
}

static inline void carried_rotate(acre_queue *q, void *rotated, const void *raw,
                                  const float *cos, const float *sin, int64_t position,
                                  int64_t rows, const acre_heads *s) {
  trip t = trip_of(q, "rotate");
  size_t size = acre_dtype_size(s->dtype);
  int64_t n = rows * s->kv_heads * s->head_dim;
  int64_t angles = (position + rows) * (s->head_dim / 2);
  CARRIED(rotate, both(&t, rotated, n, size), in(&t, raw, n, size), in(&t, cos, angles, 4),
          in(&t, sin, angles, 4), position, rows, s);
}

/* Many sources go as one array, dense; of a few each goes alone, as it lies, and every second
 * one stays on the host, which the contract allows. */
static inline void carried_copy_rows(acre_queue *q, void *dst, const acre_span *spans,
                                     int64_t count, size_t row_bytes) {
  trip t = trip_of(q, "copy_rows");
  int64_t rows = 0, end = 0;
  for (int64_t i = 0; i < count; i++) {
    rows += spans[i].rows;
    if (spans[i].rows) end = acre_max(end, spans[i].dst_row + spans[i].rows);
  }
  acre_span *there = carried_memory((size_t)count * sizeof *there);
  char *dense = carried_memory((size_t)rows * row_bytes), *next = dense;
  memcpy(there, spans, (size_t)count * sizeof *there);
  for (int64_t i = 0; i < count; i++) {
    memcpy(next, spans[i].source, (size_t)spans[i].rows * row_bytes);
    next += (size_t)spans[i].rows * row_bytes;
  }
  const char *from = count > CARRIED_SINGLY ? in(&t, dense, rows, row_bytes) : NULL;
  for (int64_t i = 0; i < count; i++) {
    if (from)
      there[i].source = from, from += (size_t)spans[i].rows * row_bytes;
    else if (i % 2 == 0)
      there[i].source = in(&t, spans[i].source, spans[i].rows, row_bytes);
  }
  CARRIED(copy_rows, both(&t, dst, end, row_bytes), there, count, row_bytes);
  free(there), free(dense);
}

static inline void carried_pool(acre_queue *q, void *dst, const void *const *sources,
                                int64_t count, int64_t l, int64_t width, acre_dtype dtype) {
  trip t = trip_of(q, "pool");
  size_t row = (size_t)width * acre_dtype_size(dtype);
  char *dense = carried_memory((size_t)(count * l) * row);
  const void **there = carried_memory((size_t)(count * l) * sizeof *there);
  for (int64_t i = 0; i < count * l; i++) memcpy(dense + (size_t)i * row, sources[i], row);
  const char *from = in(&t, dense, count * l, row);
  for (int64_t i = 0; i < count * l; i++)
    there[i] = i % 2 ? sources[i] : from + (size_t)i * row;
  CARRIED(pool, both(&t, dst, count, row), there, count, l, width, dtype);
  free(dense), free(there);
}

/* ---------------------------------------------------------------- attention */

static inline void carried_attend(acre_queue *q, void *out, int64_t out_stride, float *lse,
                                  const float *x, int64_t q_stride, const acre_keys *prefix,
                                  const acre_keys *own, int64_t seen, int64_t rows,
                                  bool split, const acre_heads *s) {
  trip t = trip_of(q, "attend");
  int64_t width = s->heads * s->head_dim;
  acre_keys before = {0}, after = keys_there(&t, own, s);
  if (prefix) before = keys_there(&t, prefix, s);
  CARRIED(attend,
          both(&t, out, strided(rows, out_stride, width), acre_dtype_size(s->dtype)),
          out_stride, both(&t, lse, rows * s->heads, 4),
          in(&t, x, strided(rows, q_stride, width), 4), q_stride, prefix ? &before : NULL,
          &after, seen, rows, split, s);
}

static inline void carried_score(acre_queue *q, float *scores, const float *x,
                                 int64_t q_stride, const void *keys, const uint8_t *use,
                                 int64_t tokens, int64_t m, const acre_heads *s) {
  trip t = trip_of(q, "score");
  CARRIED(score, both(&t, scores, m, 4),
          in(&t, x, strided(tokens, q_stride, s->heads * s->head_dim), 4), q_stride,
          in(&t, keys, m * s->kv_heads * s->head_dim, acre_dtype_size(s->dtype)), use,
          tokens, m, s);
}

/* ---------------------------------------------------------------- training */

static inline void carried_clear(acre_queue *q, void *dst, size_t bytes) {
  trip t = trip_of(q, "clear");
  CARRIED(clear, both(&t, dst, 1, bytes), bytes);
}

static inline void carried_round(acre_queue *q, void *y, int64_t y_stride, const float *x,
                                 int64_t x_stride, int64_t rows, int64_t width,
                                 acre_dtype dtype) {
  trip t = trip_of(q, "round");
  CARRIED(round, both(&t, y, strided(rows, y_stride, width), acre_dtype_size(dtype)),
          y_stride, in(&t, x, strided(rows, x_stride, width), 4), x_stride, rows, width,
          dtype);
}

static inline void carried_add_rows(acre_queue *q, float *y, int64_t y_stride,
                                    const float *x, int64_t x_stride, const int32_t *index,
                                    int64_t rows, int64_t width) {
  trip t = trip_of(q, "add_rows");
  int64_t end = index ? reached(index, rows) : rows;
  CARRIED(add_rows, both(&t, y, strided(end, y_stride, width), 4), y_stride,
          in(&t, x, strided(rows, x_stride, width), 4), x_stride, in(&t, index, rows, 4),
          rows, width);
}

static inline void carried_rmsnorm_back(acre_queue *q, float *dx, const float *dy,
                                        const float *x, const float *gain, double eps,
                                        int64_t rows, int64_t width) {
  trip t = trip_of(q, "rmsnorm_back");
  int64_t n = rows * width;
  CARRIED(rmsnorm_back, both(&t, dx, n, 4), in(&t, dy, n, 4), in(&t, x, n, 4),
          in(&t, gain, width, 4), eps, rows, width);
}

static inline void carried_swiglu_back(acre_queue *q, void *dgate, void *dup,
                                       const float *gate, const float *up, const float *dy,
                                       int64_t rows, int64_t width, acre_dtype dtype) {
  trip t = trip_of(q, "swiglu_back");
  size_t size = acre_dtype_size(dtype);
  int64_t n = rows * width;
  CARRIED(swiglu_back, both(&t, dgate, n, size), both(&t, dup, n, size), in(&t, gate, n, 4),
          in(&t, up, n, 4), in(&t, dy, n, 4), rows, width, dtype);
}

static inline void carried_cross_entropy_back(acre_queue *q, void *dlogits, float *out,
                                              const float *logits, const int32_t *target,
                                              const float *weight, int64_t rows,
                                              int64_t vocab, acre_dtype dtype) {
  trip t = trip_of(q, "cross_entropy_back");
  int64_t n = rows * vocab;
  CARRIED(cross_entropy_back, both(&t, dlogits, n, acre_dtype_size(dtype)),
          both(&t, out, rows, 4), in(&t, logits, n, 4), in(&t, target, rows, 4),
          in(&t, weight, rows, 4), rows, vocab, dtype);
}

static inline void carried_matmul_back(acre_queue *q, float *dW, const float *dy,
                                       int64_t dy_stride, const void *x, int64_t rows,
                                       int64_t N, int64_t K, acre_dtype dtype) {
  trip t = trip_of(q, "matmul_back");
  CARRIED(matmul_back, both(&t, dW, N * K, 4), in(&t, dy, strided(rows, dy_stride, N), 4),
          dy_stride, in(&t, x, rows * K, acre_dtype_size(dtype)), rows, N, K, dtype);
}

static inline void carried_attend_back(acre_queue *q, float *dqkv, float *dk, float *dv,
                                       float *scratch, const float *dout, const void *out,
                                       const float *lse, const void *x,
                                       const acre_keys *prefix, const acre_keys *own,
                                       int64_t rows, const acre_heads *s) {
  trip t = trip_of(q, "attend_back");
  size_t size = acre_dtype_size(s->dtype);
  int64_t n = rows * s->heads * s->head_dim, width = s->kv_heads * s->head_dim;
  int64_t of_prefix = (prefix ? prefix->count : 0) * width;
  acre_keys before = {0}, after = keys_there(&t, own, s);
  if (prefix) before = keys_there(&t, prefix, s);
  CARRIED(attend_back, both(&t, dqkv, n + 2 * rows * width, 4), both(&t, dk, of_prefix, 4),
          both(&t, dv, of_prefix, 4), both(&t, scratch, (ACRE_ATTEND_PARTS - 1) * n, 4),
          in(&t, dout, n, 4), in(&t, out, n, size), in(&t, lse, rows * s->heads, 4),
          in(&t, x, n, size), prefix ? &before : NULL, &after, rows, s);
}

static inline void carried_score_back(acre_queue *q, float *dq, int64_t dq_stride,
                                      float *dk, const float *pull, const void *x,
                                      const void *keys, const uint8_t *use, int64_t tokens,
                                      int64_t m, const acre_heads *s) {
  trip t = trip_of(q, "score_back");
  size_t size = acre_dtype_size(s->dtype);
  int64_t width = s->heads * s->head_dim, n = m * s->kv_heads * s->head_dim;
  CARRIED(score_back, both(&t, dq, strided(tokens, dq_stride, width), 4), dq_stride,
          both(&t, dk, n, 4), pull, in(&t, x, tokens * width, size), in(&t, keys, n, size),
          use, tokens, m, s);
}

static inline void carried_sum_squares(acre_queue *q, double *out, const float *x,
                                       int64_t n) {
  trip t = trip_of(q, "sum_squares");
  CARRIED(sum_squares, out, in(&t, x, n, 4), n);
}

static inline void carried_adamw(acre_queue *q, float *w, float *first, float *second,
                                 const float *gradient, int64_t n, float scale,
                                 const acre_adamw *by) {
  trip t = trip_of(q, "adamw");
  CARRIED(adamw, both(&t, w, n, 4), both(&t, first, n, 4), both(&t, second, n, 4),
          in(&t, gradient, n, 4), n, scale, by);
}

/* ---------------------------------------------------------------- choosing a token */

static inline void carried_argmax(acre_queue *q, int32_t *id, const float *logits,
                                  int64_t rows, int64_t vocab) {
  trip t = trip_of(q, "argmax");
  CARRIED(argmax, both(&t, id, rows, 4), in(&t, logits, rows * vocab, 4), rows, vocab);
}

static inline void carried_top(acre_queue *q, float *values, int32_t *ids, float *mass,
                               const float *logits, int64_t vocab, int64_t k, float scale) {
  trip t = trip_of(q, "top");
  CARRIED(top, both(&t, values, k, 4), both(&t, ids, k, 4), both(&t, mass, 1, 4),
          in(&t, logits, vocab, 4), vocab, k, scale);
}

static inline void carried_penalize(acre_queue *q, float *logits, const int32_t *ids,
                                    int64_t count, float penalty) {
  trip t = trip_of(q, "penalize");
  int64_t vocab = reached(ids, count); /* those beyond are neither read nor written */
  CARRIED(penalize, both(&t, logits, vocab, 4), in(&t, ids, count, 4), count, penalty);
}

/* ---------------------------------------------------------------- the table */

static inline acre_backend_ops carried_operations(void) {
  return (acre_backend_ops){
      .name = "carried",
      .alloc = carried_alloc,
      .available = carried_available,
      .destroy = carried_destroy,
      .queue_open = carried_queue_open,
      .queue_close = carried_queue_close,
      .sync = carried_sync,
      .upload = carried_upload,
      .download = carried_download,
      .matrix_create = carried_matrix_create,
      .matrix_release = carried_matrix_release,
      .matrix_fill = carried_matrix_fill,
      .embed = carried_embed,
      .rmsnorm = carried_rmsnorm,
      .matmul = carried_matmul,
      .swiglu = carried_swiglu,
      .cross_entropy = carried_cross_entropy,
      .gather_rows = carried_gather_rows,
      .scatter_rows = carried_scatter_rows,
      .rope = carried_rope,
      .store_kv = carried_store_kv,
      .rotate = carried_rotate,
      .copy_rows = carried_copy_rows,
      .pool = carried_pool,
      .attend = carried_attend,
      .score = carried_score,
      .matrix_get = carried_matrix_get,
      .matrix_set = carried_matrix_set,
      .matrix_transpose = carried_matrix_transpose,
      .clear = carried_clear,
      .round = carried_round,
      .add_rows = carried_add_rows,
      .rmsnorm_back = carried_rmsnorm_back,
      .swiglu_back = carried_swiglu_back,
      .cross_entropy_back = carried_cross_entropy_back,
      .matmul_back = carried_matmul_back,
      .attend_back = carried_attend_back,
      .score_back = carried_score_back,
      .sum_squares = carried_sum_squares,
      .adamw = carried_adamw,
      .argmax = carried_argmax,
      .top = carried_top,
      .penalize = carried_penalize,
  };
}

#endif
