/* The CPU's table of operations: the oracle for every other device.
 *
 * Matrices, attention and learning have files of their own; here are memory, the queue,
 * and the operations on rows, shared out as rows.h says. */
#include "cpu.h"
#include "matmul.h"
#include "rows.h"
#include "tensor.h"

#define ROWS_MAX 512         /* rows of a forward pass: weights are widened once for them */
#define COPY_GRAIN (1 << 20) /* bytes of a copy that are worth a task */

/* ---------------------------------------------------------------- memory */

static void backend_leave(cpu_backend *cpu) {
  if (atomic_fetch_sub_explicit(&cpu->references, 1, memory_order_acq_rel) == 1)
    acre_free(cpu);
}

typedef struct allocation {
  cpu_backend *cpu;
  void *data;
  size_t size;
} allocation;

static void free_allocation(void *context) {
  allocation *made = context;
  cpu_backend *cpu = made->cpu;
  acre_account_remove(&cpu->base.account, made->size);
  acre_free(made->data);
  acre_free(made);
  backend_leave(cpu);
}

acre_status acre_cpu_alloc(acre_backend *backend, acre_buffer **out, size_t bytes,
                           acre_error *error) {
  *out = NULL;
  cpu_backend *cpu = (cpu_backend *)backend;
  allocation *made = acre_alloc_zero(sizeof *made);
  void *data = made ? acre_alloc_zero(bytes) : NULL;
  if (!data || acre_buffer_wrap(out, data, bytes, free_allocation, made, NULL) != ACRE_OK) {
    acre_free(data);
    acre_free(made);
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory: %zu bytes were wanted", bytes);
  }
  *made = (allocation){cpu, data, bytes};
  atomic_fetch_add_explicit(&cpu->references, 1, memory_order_relaxed);
  acre_account_add(&cpu->base.account, bytes);
  return ACRE_OK;
}

static size_t available(acre_backend *backend) {
  (void)backend;
  return acre_memory_available();
}

/* ---------------------------------------------------------------- queue */

static void queue_close(acre_queue *queue) {
  if (!queue) return;
  acre_free(queue->workers);
  acre_free(queue->shared);
  acre_free(queue);
}

/* Scratch is not on the account: it is no buffer, and pages never used take no
 * memory. */
static acre_status queue_open(acre_backend *backend, acre_queue **out, acre_error *error) {
  *out = NULL;
  cpu_backend *cpu = (cpu_backend *)backend;
  acre_queue *queue = acre_alloc_zero(sizeof *queue);
  if (!queue) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a queue");
  size_t floats = (size_t)cpu->base.threads * ACRE_WORKER_FLOATS;
  queue->backend = cpu;
  queue->kernels = &cpu->kernels;
  queue->pool = cpu->pool;
  queue->workers = acre_alloc_zero(floats * sizeof(float));
  queue->shared = acre_alloc_zero(ACRE_SHARED_FLOATS * sizeof(float));
  if (!queue->workers || !queue->shared) {
    queue_close(queue);
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a queue's scratch");
  }
  *out = queue;
  return ACRE_OK;
}

static acre_status queue_sync(acre_queue *queue, acre_error *error) {
  (void)queue, (void)error;
  return ACRE_OK;
}

/* Everything has happened when its call returns. */
static void follow(acre_queue *later, acre_queue *earlier) { (void)later, (void)earlier; }

/* ---------------------------------------------------------------- bytes */

static void copy_part(const rows_job *job, int64_t first, int64_t count) {
  memcpy((char *)job->y + first, (const char *)job->x + first, (size_t)count);
}

static void copy_bytes(acre_queue *queue, void *dst, const void *src, size_t bytes) {
  if (!bytes) return;
  rows_job job = {
      .task = copy_part, .rows = (int64_t)bytes, .step = COPY_GRAIN, .y = dst, .x = src};
  acre_cpu_run_steps(queue, &job);
}

static void upload(acre_queue *queue, void *dst, const void *host, size_t bytes) {
  copy_bytes(queue, dst, host, bytes);
}

static void download(acre_queue *queue, void *host, const void *src, size_t bytes) {
  copy_bytes(queue, host, src, bytes);
}

/* Of what lies on the device everything lies on the host. */
static void *stream(acre_backend *backend) {
  (void)backend;
  return NULL;
}

static acre_status fetch(acre_backend *backend, void *host, const void *src, size_t bytes,
                         acre_error *error) {
  (void)backend, (void)error;
  if (bytes) memcpy(host, src, bytes);
  return ACRE_OK;
}

static void store_array(acre_backend *backend, void *dst, acre_dtype dtype,
                        const acre_array *array, bool *finite) {
  (void)backend;
  int64_t rows = array->ndim == 1 ? 1 : array->shape[0];
  int64_t columns = array->shape[array->ndim - 1];
  float *row = acre_alloc((size_t)columns * sizeof *row);
  if (!row) {
    *finite = false;
    return;
  }
  for (int64_t i = 0; i < rows; i++) {
    acre_array_row(row, array, i);
    char *to = (char *)dst + (size_t)(i * columns) * acre_dtype_size(dtype);
    *finite &= acre_store_row(to, dtype, row, columns);
  }
  acre_free(row);
}

static void copy_some_spans(const rows_job *job, int64_t first, int64_t count) {
  const acre_span *spans = job->x;
  for (int64_t i = first; i < first + count; i++) {
    size_t bytes = (size_t)spans[i].rows * job->bytes;
    if (bytes && bytes < COPY_GRAIN)
      memcpy((char *)job->y + (size_t)spans[i].dst_row * job->bytes, spans[i].source,
             bytes);
  }
}

static void copy_rows(acre_queue *queue, void *dst, const acre_span *spans, int64_t count,
                      size_t row_bytes) {
  for (int64_t i = 0; i < count; i++) {
    size_t bytes = (size_t)spans[i].rows * row_bytes;
    if (bytes >= COPY_GRAIN) /* long spans are cut, short ones taken together below */
      copy_bytes(queue, (char *)dst + (size_t)spans[i].dst_row * row_bytes, spans[i].source,
                 bytes);
  }
  rows_job job = {
      .task = copy_some_spans, .rows = count, .y = dst, .x = spans, .bytes = row_bytes};
  acre_cpu_run_rows(queue, &job, count ? spans[0].rows * (int64_t)row_bytes / 4 : 0);
}

/* -------------------------------------------------------------- rows of activations */

static void embed_some(const rows_job *job, int64_t first, int64_t count) {
  int64_t width = job->width;
  size_t row_bytes = (size_t)width * acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++) {
    int64_t id = job->index[i];
    const char *row =
        id == job->vocab ? job->other : (const char *)job->table + (size_t)id * row_bytes;
    job->T->widen((float *)job->y + i * width, row, width);
  }
}

static void embed(acre_queue *queue, float *x, const int32_t *ids, const void *table,
                  const void *l1_row, int64_t rows, int64_t vocab, int64_t width,
                  acre_dtype dtype) {
  rows_job job = {.task = embed_some,
                  .rows = rows,
                  .y = x,
                  .index = ids,
                  .table = table,
                  .other = l1_row,
                  .vocab = vocab,
                  .width = width,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, width);
}

static void rmsnorm_some(const rows_job *job, int64_t first, int64_t count) {
  int64_t width = job->width;
  size_t row_bytes = (size_t)width * acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++)
    job->T->rmsnorm((char *)job->y + (size_t)i * row_bytes,
                    (const float *)job->x + i * width, job->gain, job->eps, width);
}

static void rmsnorm(acre_queue *queue, void *y, const float *x, const float *gain,
                    double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  rows_job job = {.task = rmsnorm_some,
                  .rows = rows,
                  .y = y,
                  .x = x,
                  .gain = gain,
                  .eps = eps,
                  .width = width,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, width);
}

static void gather_some(const rows_job *job, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; i++)
    memcpy((char *)job->y + (size_t)i * job->bytes,
           (const char *)job->x + (size_t)job->index[i] * job->bytes, job->bytes);
}

static void scatter_some(const rows_job *job, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; i++)
    memcpy((char *)job->y + (size_t)job->index[i] * job->bytes,
           (const char *)job->x + (size_t)i * job->bytes, job->bytes);
}

static void gather_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                        int64_t rows, size_t row_bytes) {
  rows_job job = {.task = gather_some,
                  .rows = rows,
                  .y = y,
                  .x = x,
                  .index = index,
                  .bytes = row_bytes};
  acre_cpu_run_rows(queue, &job, (int64_t)row_bytes / 4);
}

static void scatter_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                         int64_t rows, size_t row_bytes) {
  rows_job job = {.task = scatter_some,
                  .rows = rows,
                  .y = y,
                  .x = x,
                  .index = index,
                  .bytes = row_bytes};
  acre_cpu_run_rows(queue, &job, (int64_t)row_bytes / 4);
}

/* --------------------------------------------------------------- rotation, timeline */

static void rope_some(const rows_job *job, int64_t first, int64_t count) {
  int64_t half = job->head_dim / 2;
  for (int64_t i = first; i < first + count; i++) {
    float *x_i = (float *)job->y + i * job->x_stride;
    int64_t angle = (job->position + i) * half;
    for (int64_t c = 0; c < job->heads; c++)
      job->kernels->rope(x_i + c * job->head_dim, x_i + c * job->head_dim, job->cos + angle,
                         job->sin + angle, half);
  }
}

static void rope(acre_queue *queue, float *x, int64_t x_stride, const float *cos,
                 const float *sin, int64_t position, int64_t rows, int64_t heads,
                 int64_t head_dim) {
  rows_job job = {.task = rope_some,
                  .rows = rows,
                  .y = x,
                  .x_stride = x_stride,
                  .cos = cos,
                  .sin = sin,
                  .position = position,
                  .heads = heads,
                  .head_dim = head_dim};
  acre_cpu_run_rows(queue, &job, heads * head_dim);
}

static void store_kv_some(const rows_job *job, int64_t first, int64_t count) {
  const acre_typed *T = job->T;
  int64_t d = job->head_dim, width = job->heads * d;
  size_t size = acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++) {
    int64_t angle = (job->position + i) * (d / 2);
    const float *k_i = (const float *)job->x + i * job->x_stride;
    for (int64_t c = 0; c < job->heads; c++) {
      float key[ACRE_HEAD_DIM_MAX];
      size_t at = (size_t)(i * width + c * d) * size;
      char *raw = job->raw ? (char *)job->raw + at : (char *)job->y + at;
      T->store(raw, k_i + c * d, d);
      T->widen(key, raw, d);
      job->kernels->rope(key, key, job->cos + angle, job->sin + angle, d / 2);
      T->store((char *)job->y + at, key, d);
    }
    T->store((char *)job->values + (size_t)(i * width) * size,
             (const float *)job->other + i * job->x_stride, width);
  }
}

static void store_kv(acre_queue *queue, void *raw, void *rotated, void *values,
                     const float *k, const float *v, int64_t kv_stride, const float *cos,
                     const float *sin, int64_t position, int64_t rows,
                     const acre_heads *heads) {
  rows_job job = {.task = store_kv_some,
                  .rows = rows,
                  .raw = raw,
                  .y = rotated,
                  .values = values,
                  .x = k,
                  .other = v,
                  .x_stride = kv_stride,
                  .cos = cos,
                  .sin = sin,
                  .position = position,
                  .heads = heads->kv_heads,
                  .head_dim = heads->head_dim,
                  .dtype = heads->dtype};
  acre_cpu_run_rows(queue, &job, 2 * heads->kv_heads * heads->head_dim);
}

static void rotate_some(const rows_job *job, int64_t first, int64_t count) {
  int64_t d = job->head_dim;
  size_t row_bytes = (size_t)d * acre_dtype_size(job->dtype);
  for (int64_t i = first; i < first + count; i++) {
    int64_t angle = (job->position + i) * (d / 2);
    for (int64_t c = 0; c < job->heads; c++) {
      float key[ACRE_HEAD_DIM_MAX];
      size_t at = (size_t)(i * job->heads + c) * row_bytes;
      job->T->widen(key, (const char *)job->x + at, d);
      job->kernels->rope(key, key, job->cos + angle, job->sin + angle, d / 2);
      job->T->store((char *)job->y + at, key, d);
    }
  }
}

static void rotate(acre_queue *queue, void *rotated, const void *raw, const float *cos,
                   const float *sin, int64_t position, int64_t rows,
                   const acre_heads *heads) {
  rows_job job = {.task = rotate_some,
                  .rows = rows,
                  .y = rotated,
                  .x = raw,
                  .cos = cos,
                  .sin = sin,
                  .position = position,
                  .heads = heads->kv_heads,
                  .head_dim = heads->head_dim,
                  .dtype = heads->dtype};
  acre_cpu_run_rows(queue, &job, heads->kv_heads * heads->head_dim);
}

/* ---------------------------------------------------------------- pooling */

#define POOL_CHUNK 256

/* x_stride holds l. */
static void pool_some(const rows_job *job, int64_t first, int64_t count) {
  const void *const *sources = job->x;
  int64_t l = job->x_stride;
  size_t size = acre_dtype_size(job->dtype);
  for (int64_t j = first; j < first + count; j++) {
    for (int64_t c = 0; c < job->width; c += POOL_CHUNK) {
      float sum[POOL_CHUNK] = {0}, row[POOL_CHUNK];
      int64_t n = acre_min(POOL_CHUNK, job->width - c);
      for (int64_t i = 0; i < l; i++) {
        job->T->widen(row, (const char *)sources[j * l + i] + (size_t)c * size, n);
        job->kernels->add(sum, sum, row, n);
      }
      for (int64_t x = 0; x < n; x++) sum[x] /= (float)l;
      job->T->store((char *)job->y + (size_t)(j * job->width + c) * size, sum, n);
    }
  }
}

static void pool_rows(acre_queue *queue, void *dst, const void *const *sources,
                      int64_t count, int64_t l, int64_t width, acre_dtype dtype) {
  rows_job job = {.task = pool_some,
                  .rows = count,
                  .y = dst,
                  .x = sources,
                  .x_stride = l,
                  .width = width,
                  .dtype = dtype};
  acre_cpu_run_rows(queue, &job, l * width);
}

/* ---------------------------------------------------------------- table */

static void destroy(acre_backend *backend) {
  if (!backend) return;
  cpu_backend *cpu = (cpu_backend *)backend;
  acre_pool_close(cpu->pool);
  cpu->pool = NULL;
  backend_leave(cpu);
}

static const acre_backend_ops cpu_ops = {
    .name = "cpu",
    .alloc = acre_cpu_alloc,
    .alloc_host = acre_cpu_alloc,
    .available = available,
    .destroy = destroy,
    .queue_open = queue_open,
    .mover_open = queue_open,
    .queue_close = queue_close,
    .sync = queue_sync,
    .follow = follow,
    .upload = upload,
    .download = download,
    .stream = stream,
    .fetch = fetch,
    .store_array = store_array,
    .matrix_create = acre_cpu_matrix_create,
    .matrix_release = acre_cpu_matrix_release,
    .matrix_fill = acre_cpu_matrix_fill,
    .embed = embed,
    .rmsnorm = rmsnorm,
    .matmul = acre_cpu_matmul,
    .cross_entropy = acre_cpu_cross_entropy,
    .gather_rows = gather_rows,
    .scatter_rows = scatter_rows,
    .swiglu = acre_cpu_swiglu,
    .rope = rope,
    .store_kv = store_kv,
    .rotate = rotate,
    .copy_rows = copy_rows,
    .pool = pool_rows,
    .attend = acre_cpu_attend,
    .score = acre_cpu_score,
    .argmax = acre_cpu_argmax,
    .top = acre_cpu_top,
    .penalize = acre_cpu_penalize,
    .attend_back = acre_cpu_attend_back,
    .matrix_get = acre_cpu_matrix_get,
    .matrix_set = acre_cpu_matrix_set,
    .matrix_transpose = acre_cpu_matrix_transpose,
    .clear = acre_cpu_clear,
    .round = acre_cpu_round,
    .add_rows = acre_cpu_add_rows,
    .rmsnorm_back = acre_cpu_rmsnorm_back,
    .swiglu_back = acre_cpu_swiglu_back,
    .cross_entropy_back = acre_cpu_cross_entropy_back,
    .matmul_back = acre_cpu_matmul_back,
    .score_back = acre_cpu_score_back,
    .sum_squares = acre_cpu_sum_squares,
    .adamw = acre_cpu_adamw,
};

/* The features that a name allows, or a refusal. */
static acre_status choose_features(uint32_t *features, const char *isa, acre_error *error) {
  static const struct {
    const char *name;
    uint32_t allowed;
  } rungs[] = {{"scalar", 0},
               {"avx2", ACRE_CPU_AVX2},
               {"avx512", ACRE_CPU_AVX2 | ACRE_CPU_AVX512},
               {"avx512_bf16", ACRE_CPU_AVX2 | ACRE_CPU_AVX512 | ACRE_CPU_BF16}};
  *features = acre_cpu_features();
  if (!isa) return ACRE_OK;
  for (int64_t i = 0; i < ACRE_COUNT(rungs); i++) {
    if (strcmp(isa, rungs[i].name) != 0) continue;
    if ((*features & rungs[i].allowed) != rungs[i].allowed)
      return acre_fail(error, ACRE_UNSUPPORTED, "isa is \"%s\", which this processor lacks",
                       isa);
    *features = rungs[i].allowed;
    return ACRE_OK;
  }
  return acre_fail(error, ACRE_BAD_VALUE,
                   "isa is \"%.40s\", expected \"scalar\", \"avx2\", \"avx512\" or "
                   "\"avx512_bf16\"",
                   isa);
}

acre_status acre_cpu_backend_open(acre_backend **out, int32_t threads, const char *isa,
                                  acre_error *error) {
  *out = NULL;
  uint32_t features;
  ACRE_TRY(choose_features(&features, isa, error));
  if (threads < 0 || threads > 1024)
    return acre_fail(error, ACRE_BAD_VALUE, "threads is %d, expected 0 to 1024", threads);
  if (threads == 0) threads = acre_cpu_count();
  cpu_backend *cpu = acre_alloc_zero(sizeof *cpu);
  if (!cpu) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a backend");
  cpu->kernels = acre_cpu_kernels(features);
  cpu->base.ops = &cpu_ops;
  cpu->base.isa = cpu->kernels.isa;
  cpu->base.threads = threads;
  cpu->base.rows_max = ROWS_MAX;
  atomic_init(&cpu->references, 1);
  acre_status status = acre_pool_open(&cpu->pool, threads, error);
  if (status != ACRE_OK) {
    acre_free(cpu);
    return status;
  }
  *out = &cpu->base;
  return ACRE_OK;
}
