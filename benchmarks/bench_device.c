/* How fast a plug-in's operations are on its device, beside what that device can do in the
 * same run: a large product by cuBLASLt and a large copy.
 *
 * The cases are those of tests/c/cases.h, at the sizes of docs/CUDA.md. Each is checked
 * before anything is timed (a wrong kernel ends the program), then its arrays stay on the
 * device. A round times every case once, as many calls as fill a few milliseconds and one
 * wait; a case's time is the median over the rounds, its share the median of the shares of
 * the rate that the same round measured. One line of JSON per case.
 *
 * bench_device PLUGIN LIBRARIES [seconds per case, 0.02] [rounds, 7] ["small"]
 *
 * "small" is for devices that are none (cuda/host): it runs everything and says nothing. */
#include "backend.h"
#include "carried.h"
#include "cases.h"

enum { CASES_MOST = 24, ROUNDS_MOST = 31 };

typedef enum yardstick { BY_NONE, BY_GEMM, BY_COPY } yardstick;

typedef struct measured {
  const char *name;
  yardstick by;
  op_case c;
} measured;

#define WINDOW(d, h, g, r, n) \
  {.kind = OP_ATTEND, .rows = r, .N = n, .heads = h, .kv_heads = g, .head_dim = d}

static const measured wanted[] = {
    {"gemm", BY_NONE, {.kind = OP_MATMUL, .rows = 8192, .K = 8192, .N = 8192}},
    {"window d=128, 16K on itself", BY_GEMM, WINDOW(128, 32, 8, 16384, 0)},
    {"window d=64, 16K on itself", BY_GEMM, WINDOW(64, 32, 8, 16384, 0)},
    {"window d=128, 2K behind 14K", BY_GEMM, WINDOW(128, 28, 4, 2048, 14336)},
    {"window d=64, 2K behind 14K", BY_GEMM, WINDOW(64, 32, 8, 2048, 14336)},
    {"decode attention d=128, 128K keys", BY_COPY, WINDOW(128, 28, 4, 1, 131071)},
    {"decode attention d=64, 128K keys", BY_COPY, WINDOW(64, 32, 8, 1, 131071)},
    {"decode gemv 3584->18944",
     BY_COPY,
     {.kind = OP_MATMUL, .rows = 1, .K = 3584, .N = 18944}},
    {"decode gemv 18944->3584",
     BY_COPY,
     {.kind = OP_MATMUL, .rows = 1, .K = 18944, .N = 3584}},
    {"decode gemv 3584->152064",
     BY_COPY,
     {.kind = OP_MATMUL, .rows = 1, .K = 3584, .N = 152064}},
    {"decode swiglu 3584->18944",
     BY_COPY,
     {.kind = OP_SWIGLU, .rows = 1, .K = 3584, .N = 18944}},
    {"gradient of attention d=128, 1K behind 15K",
     BY_GEMM,
     {.kind = OP_ATTEND_BACK,
      .rows = 1024,
      .N = 15360,
      .heads = 28,
      .kv_heads = 4,
      .head_dim = 128}},
};

static acre_backend *backend, *carrying;
static acre_queue *queue, *carrying_queue;

static void must(acre_status status, const acre_error *error, const char *what) {
  if (status == ACRE_OK) return;
  fprintf(stderr, "%s: %s\n", what, error->message);
  exit(1);
}

static void finish(const char *what) {
  acre_error error = {0};
  must(backend->ops->sync(queue, &error), &error, what);
}

/* ---------------------------------------------------------------- what stays there */

typedef struct timed_case {
  const char *name;
  yardstick by;
  op_work there; /* its arrays on the device */
  acre_matrix *weights[2];
  acre_buffer *kept[8];
  int kept_count;
  acre_span span; /* of the copy, which is no op_case */
  void *copied;
  double work, seconds[ROUNDS_MOST]; /* operations or bytes of a call */
  bool flops;
  int64_t calls;
} timed_case;

static timed_case cases[CASES_MOST];
static int case_count;

static void *room(timed_case *t, size_t bytes) {
  acre_error error = {0};
  acre_buffer **buffer = &t->kept[t->kept_count++];
  must(backend->ops->alloc(backend, buffer, bytes ? bytes : 1, &error), &error, t->name);
  return acre_buffer_data(*buffer);
}

static void *moved(timed_case *t, const void *from, int64_t count, size_t size) {
  if (!from) return NULL;
  void *to = room(t, (size_t)count * size);
  backend->ops->upload(queue, to, from, (size_t)count * size);
  return to;
}

static acre_matrix *matrix_of(acre_matrix *W) {
  return W ? ((carried_matrix *)W)->device : NULL;
}

/* Everything that case_run reads or writes; sizes as case_open has them. */
static void settle(timed_case *t, const op_work *from) {
  const op_case *c = &from->c;
  size_t size = acre_dtype_size(c->dtype);
  bool product = c->kind == OP_MATMUL || c->kind == OP_SWIGLU;
  int64_t n = c->rows * c->heads * c->head_dim, keys = (c->N + c->rows) * case_width(c);
  int64_t out = product ? c->rows * c->N : n;
  if (c->kind == OP_ATTEND_BACK) out = ACRE_ATTEND_PARTS * n + 2 * keys;
  op_work *to = &t->there;
  *to = *from;
  to->backend = backend, to->queue = queue;
  to->W = matrix_of(from->W), to->up = matrix_of(from->up);
  to->typed_x = moved(t, from->typed_x, product ? c->rows * c->K : n, size);
  to->x = product ? NULL : moved(t, from->x, n, 4);
  to->keys = moved(t, from->keys, keys, size);
  to->values = moved(t, from->values, keys, size);
  to->dout = moved(t, from->dout, n, 4);
  to->lse = moved(t, from->lse, c->rows * c->heads, 4);
  to->attended = moved(t, from->attended, n, size);
  to->out = room(t, (size_t)out * 4);
  finish(t->name);
}

static op_case shrunk(op_case c) {
  c.rows = acre_min(c.rows, 40), c.N = acre_min(c.N, 150), c.K = acre_min(c.K, 100);
  return c;
}

static void open_case(const measured *m, bool small) {
  timed_case *t = &cases[case_count++];
  op_case c = small ? shrunk(m->c) : m->c;
  c.dtype = ACRE_BF16;
  t->name = m->name, t->by = m->by;
  op_work host = case_open(&c, carrying, carrying_queue);
  if (!case_check(&host)) carried_fail(m->name, "wrong, so not timed");
  t->flops = m->by != BY_COPY;
  t->work = t->flops ? case_flops(&c) : case_bytes(&c);
  settle(t, &host);
  t->weights[0] = host.W, t->weights[1] = host.up;
  host.W = host.up = NULL;
  case_close(&host);
}

/* Both read and written bytes count. */
static void open_copy(bool small) {
  timed_case *t = &cases[case_count++];
  int64_t rows = small ? 64 : (int64_t)1 << 18;
  t->name = "copy", t->work = 2.0 * 4096 * (double)rows;
  float *x = case_floats(&t->there, 4096 / 4 * rows, 1);
  t->span = (acre_span){moved(t, x, rows, 4096), 0, rows};
  t->copied = room(t, (size_t)rows * 4096);
  backend->ops->copy_rows(queue, t->copied, &t->span, 1, 4096);
  float *y = case_memory((size_t)rows * 4096);
  backend->ops->download(queue, y, t->copied, (size_t)rows * 4096);
  if (memcmp(x, y, (size_t)rows * 4096) != 0) carried_fail("copy", "wrong, so not timed");
  acre_free(x), acre_free(y);
}

static void close_case(timed_case *t) {
  for (int i = 0; i < 2; i++)
    if (t->weights[i]) carrying->ops->matrix_release(t->weights[i]);
  for (int i = 0; i < t->kept_count; i++) acre_buffer_release(t->kept[i]);
}

/* ---------------------------------------------------------------- times */

static double seconds_of(timed_case *t, int64_t calls) {
  double start = acre_clock();
  for (int64_t i = 0; i < calls; i++) {
    if (t->copied)
      backend->ops->copy_rows(queue, t->copied, &t->span, 1, 4096);
    else
      case_run(&t->there);
  }
  finish(t->name);
  return (acre_clock() - start) / (double)calls;
}

static void measure(int rounds, double seconds) {
  for (int i = 0; i < case_count; i++) {
    seconds_of(&cases[i], 2); /* choices and first launches */
    double each = seconds_of(&cases[i], 1);
    cases[i].calls = acre_max(1, (int64_t)(seconds / each));
  }
  for (int round = 0; round < rounds; round++)
    for (int i = 0; i < case_count; i++)
      cases[i].seconds[round] = seconds_of(&cases[i], cases[i].calls);
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(const double *x, int n) {
  double sorted[ROUNDS_MOST];
  memcpy(sorted, x, (size_t)n * sizeof *x);
  qsort(sorted, (size_t)n, sizeof *sorted, ascending);
  return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

/* Of what a round's yardstick did per second, by that round. */
static double share(const timed_case *t, int rounds) {
  const timed_case *by = &cases[t->by == BY_COPY ? 0 : 1];
  double shares[ROUNDS_MOST];
  for (int r = 0; r < rounds; r++)
    shares[r] = t->work / t->seconds[r] / (by->work / by->seconds[r]);
  return median(shares, rounds);
}

static void report(const timed_case *t, int rounds) {
  double seconds = median(t->seconds, rounds), scale = t->flops ? 1e-12 : 1e-9;
  double least = t->seconds[0], most = t->seconds[0];
  for (int r = 1; r < rounds; r++) {
    least = fmin(least, t->seconds[r]), most = fmax(most, t->seconds[r]);
  }
  printf("{\"case\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"ms\": %.6g", t->name,
         t->work / seconds * scale, t->flops ? "TFLOP/s" : "GB/s", seconds * 1e3);
  printf(", \"least_ms\": %.6g, \"most_ms\": %.6g, \"rounds\": %d", least * 1e3, most * 1e3,
         rounds);
  if (t->by != BY_NONE)
    printf(", \"of\": \"%s\", \"share\": %.4g", t->by == BY_COPY ? "copy" : "gemm",
           share(t, rounds));
  printf("}\n");
  fflush(stdout);
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "bench_device PLUGIN LIBRARIES [seconds] [rounds] [small]\n");
    return 2;
  }
  double seconds = argc > 3 ? strtod(argv[3], NULL) : 0.02;
  int rounds = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 7;
  bool small = argc > 5 && strcmp(argv[5], "small") == 0;
  rounds = (int)acre_max(1, acre_min(rounds, ROUNDS_MOST));
  acre_error error = {0};
  must(carried_open(&carrying, argv[1], argv[2], 0, 0, &error), &error, "device");
  backend = ((carried_backend *)carrying)->device;
  must(carrying->ops->queue_open(carrying, &carrying_queue, &error), &error, "queue");
  queue = ((carried_queue *)carrying_queue)->device;
  open_copy(small);
  for (int64_t i = 0; i < ACRE_COUNT(wanted); i++) open_case(&wanted[i], small);
  measure(rounds, seconds);
  for (int i = 0; i < case_count; i++) report(&cases[i], rounds);
  for (int i = 0; i < case_count; i++) close_case(&cases[i]);
  carrying->ops->queue_close(carrying_queue);
  carrying->ops->destroy(carrying);
  return 0;
}
