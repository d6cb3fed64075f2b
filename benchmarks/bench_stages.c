/* Where the time of each stage goes, operation by operation, beside the two limits.
 *
 * Takes a shape (SmolLM2-135M or Qwen2.5-0.5B, random weights: speed does not depend on
 * them) and runs build, score, refill, prefill and decode. Its one idea: the seam is a
 * table, so a table that times every operation and counts its multiply-adds and bytes
 * can stand in front of the backend's. Per stage and operation it prints calls, time,
 * share, rate, and what share of the time the limit would take: the larger of
 * multiply-adds over the peak and of bytes that must come from memory over the read rate
 * (both measured in the same run). What no operation accounts for is a row of its own,
 * so that the rows of a stage sum to it.
 *
 * bench_stages [shape] [tokens] [pooled|trained] [bf16|f32|q8] [threads] */
#include "acre.h"
#include "cpu/cpu.h"
#include "cpu/matmul.h"
#include "engine.h"
#include "peaks.h"

#include <stdio.h>
#include <stdlib.h>

/* ---------------------------------------------------------------- counting */

typedef enum op {
  EMBED,
  RMSNORM,
  QKV_OUT_DOWN,
  HEAD,
  SWIGLU,
  ROPE,
  STORE_KV,
  ROTATE,
  COPY,
  POOL,
  ATTEND,
  SCORE,
  OTHER,
  OPS
} op;

static const char *const op_names[OPS] = {"embed",
                                          "rmsnorm",
                                          "matmul",
                                          "matmul (head)",
                                          "swiglu (gate, up)",
                                          "rope",
                                          "store",
                                          "rotate",
                                          "copy",
                                          "pool",
                                          "attend",
                                          "score",
                                          "gather, scatter, up/download"};

typedef struct tally {
  int64_t calls;
  double seconds, flops, bytes;
} tally;

static tally tallies[OPS];
static const acre_backend_ops *real;
static double op_start;

static void begin(void) { op_start = acre_clock(); }

static void end(op kind, double flops, double bytes) {
  tally *t = &tallies[kind];
  t->seconds += acre_clock() - op_start;
  t->calls++, t->flops += flops, t->bytes += bytes;
}

/* ---------------------------------------------------------------- the table in front */

static void embed(acre_queue *queue, float *x, const int32_t *ids, const void *table,
                  const void *l1_row, int64_t rows, int64_t vocab, int64_t width,
                  acre_dtype dtype) {
  begin();
  real->embed(queue, x, ids, table, l1_row, rows, vocab, width, dtype);
  end(EMBED, 0, 0);
}

static void rmsnorm(acre_queue *queue, void *y, const float *x, const float *gain,
                    double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  begin();
  real->rmsnorm(queue, y, x, gain, eps, rows, width, dtype);
  end(RMSNORM, 0, 0);
}

static double weight_bytes(const acre_matrix *W) {
  return (double)acre_buffer_size(W->buffer);
}

static void matmul(acre_queue *queue, float *y, int64_t y_stride, const void *x,
                   const acre_matrix *W, const float *bias, int64_t rows, bool accumulate) {
  begin();
  real->matmul(queue, y, y_stride, x, W, bias, rows, accumulate);
  op kind =
      W->N > 32000 ? HEAD : QKV_OUT_DOWN; /* no layer is so wide, no vocabulary less */
  end(kind, 2.0 * (double)(rows * W->N * W->K), weight_bytes(W));
}

static void swiglu(acre_queue *queue, void *y, const void *x, const acre_matrix *gate,
                   const acre_matrix *up, int64_t rows) {
  begin();
  real->swiglu(queue, y, x, gate, up, rows);
  end(SWIGLU, 4.0 * (double)(rows * gate->N * gate->K),
      weight_bytes(gate) + weight_bytes(up));
}

static void gather_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                        int64_t rows, size_t row_bytes) {
  begin();
  real->gather_rows(queue, y, x, index, rows, row_bytes);
  end(OTHER, 0, 0);
}

static void scatter_rows(acre_queue *queue, void *y, const void *x, const int32_t *index,
                         int64_t rows, size_t row_bytes) {
  begin();
  real->scatter_rows(queue, y, x, index, rows, row_bytes);
  end(OTHER, 0, 0);
}

static void upload(acre_queue *queue, void *dst, const void *host, size_t bytes) {
  begin();
  real->upload(queue, dst, host, bytes);
  end(OTHER, 0, 0);
}

static void download(acre_queue *queue, void *host, const void *src, size_t bytes) {
  begin();
  real->download(queue, host, src, bytes);
  end(OTHER, 0, 0);
}

static void rope(acre_queue *queue, float *x, int64_t x_stride, const float *cos,
                 const float *sin, int64_t position, int64_t rows, int64_t heads,
                 int64_t head_dim) {
  begin();
  real->rope(queue, x, x_stride, cos, sin, position, rows, heads, head_dim);
  end(ROPE, 0, 0);
}

static void store_kv(acre_queue *queue, void *raw, void *rotated, void *values,
                     const float *k, const float *v, int64_t kv_stride, const float *cos,
                     const float *sin, int64_t position, int64_t rows,
                     const acre_heads *heads) {
  begin();
  real->store_kv(queue, raw, rotated, values, k, v, kv_stride, cos, sin, position, rows,
                 heads);
  end(STORE_KV, 0, 0);
}

static double row_bytes_of(const acre_heads *heads) {
  return (double)(heads->kv_heads * heads->head_dim) *
         (double)acre_dtype_size(heads->dtype);
}

static void rotate(acre_queue *queue, void *rotated, const void *raw, const float *cos,
                   const float *sin, int64_t position, int64_t rows,
                   const acre_heads *heads) {
  begin();
  real->rotate(queue, rotated, raw, cos, sin, position, rows, heads);
  end(ROTATE, 0, 2.0 * (double)rows * row_bytes_of(heads));
}

static void copy_rows(acre_queue *queue, void *dst, const acre_span *spans, int64_t count,
                      size_t row_bytes) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; i++) rows += spans[i].rows;
  begin();
  real->copy_rows(queue, dst, spans, count, row_bytes);
  end(COPY, 0, 2.0 * (double)rows * (double)row_bytes);
}

static void pool(acre_queue *queue, void *dst, const void *const *sources, int64_t count,
                 int64_t l, int64_t width, acre_dtype dtype) {
  begin();
  real->pool(queue, dst, sources, count, l, width, dtype);
  end(POOL, 0, (double)(count * (l + 1) * width) * (double)acre_dtype_size(dtype));
}

static void attend(acre_queue *queue, void *out, int64_t out_stride, float *lse,
                   const float *q, int64_t q_stride, const acre_keys *prefix,
                   const acre_keys *own, int64_t seen, int64_t rows, bool split,
                   const acre_heads *heads) {
  begin();
  real->attend(queue, out, out_stride, lse, q, q_stride, prefix, own, seen, rows, split,
               heads);
  double keys = (prefix ? (double)prefix->count : 0) + (double)seen;
  double pairs = (double)rows * (keys + (double)(rows + 1) / 2);
  end(ATTEND, 4.0 * pairs * (double)(heads->heads * heads->head_dim),
      2.0 * (keys + (double)rows) * row_bytes_of(heads));
}

static void score(acre_queue *queue, float *scores, const float *q, int64_t q_stride,
                  const void *keys, const uint8_t *use, int64_t t, int64_t m,
                  const acre_heads *heads) {
  begin();
  real->score(queue, scores, q, q_stride, keys, use, t, m, heads);
  int64_t used = 0;
  for (int64_t i = 0; i < heads->heads; i++) used += use[i] != 0;
  end(SCORE, 4.0 * (double)(t * m * used * heads->head_dim),
      (double)m * row_bytes_of(heads)); /* twice q k: in two passes */
}

static void watch(acre_engine *engine) {
  static acre_backend_ops watched;
  real = engine->backend->ops;
  watched = *real;
  watched.embed = embed, watched.rmsnorm = rmsnorm, watched.matmul = matmul;
  watched.swiglu = swiglu, watched.rope = rope, watched.store_kv = store_kv;
  watched.gather_rows = gather_rows, watched.scatter_rows = scatter_rows;
  watched.upload = upload, watched.download = download;
  watched.rotate = rotate, watched.copy_rows = copy_rows, watched.pool = pool;
  watched.attend = attend, watched.score = score;
  engine->backend->ops = &watched;
}

/* ---------------------------------------------------------------- report */

static struct {
  double flops, bytes; /* per second */
} limits;
static double stage_start;

static void stage_begin(void) {
  memset(tallies, 0, sizeof tallies);
  stage_start = acre_clock();
}

/* Seconds that the limit would take. */
static double least(const tally *t) {
  return fmax(t->flops / limits.flops, t->bytes / limits.bytes);
}

static void report_row(const char *name, const tally *t, double total) {
  printf("  %-30s %8lld %10.2f ms %5.1f%%", name, (long long)t->calls, t->seconds * 1e3,
         100 * t->seconds / total);
  if (t->flops > 0) printf(" %8.1f GFLOP/s", 1e-9 * t->flops / t->seconds);
  if (t->flops == 0 && t->bytes > 0) printf(" %8.1f GB/s   ", 1e-9 * t->bytes / t->seconds);
  if (least(t) > 0)
    printf("  limit %8.2f ms = %3.0f%%", least(t) * 1e3, 100 * least(t) / t->seconds);
  printf("\n");
}

/* `units` of work were done, e.g. tokens. */
static void stage_end(const char *name, double units, const char *unit) {
  double total = acre_clock() - stage_start, known = 0, floor = 0;
  for (int i = 0; i < OPS; i++) known += tallies[i].seconds, floor += least(&tallies[i]);
  printf("%s: %.2f ms, %.1f %s/s; limits sum to %.2f ms = %.0f%%\n", name, total * 1e3,
         units / total, unit, floor * 1e3, 100 * floor / total);
  for (int i = 0; i < OPS; i++)
    if (tallies[i].calls) report_row(op_names[i], &tallies[i], total);
  tally rest = {.seconds = total - known};
  report_row("between operations", &rest, total);
}

/* ---------------------------------------------------------------- model */

typedef struct shape {
  const char *name;
  int64_t vocab, hidden, layers, heads, kv_heads, head_dim, ffn, w_max;
  bool bias;
} shape;

static const shape shapes[] = {
    {"smollm2-135m", 49152, 576, 30, 9, 3, 64, 1536, 8192, false},
    {"qwen2.5-0.5b", 151936, 896, 24, 14, 2, 64, 4864, 32768, true},
};

static void must(acre_status status, const acre_error *error) {
  if (status == ACRE_OK) return;
  fprintf(stderr, "bench_stages: %s\n", error->message);
  exit(1);
}

static uint64_t state = 1;

static float next_float(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(state >> 32) * 0x1p-31f;
}

static void bind(acre_model *model, const char *name, int64_t rows, int64_t columns) {
  int64_t count = (rows ? rows : 1) * columns;
  float *data = malloc((size_t)count * sizeof *data);
  if (!data) exit(1);
  bool norm = strstr(name, "norm") != NULL;
  for (int64_t i = 0; i < count; i++) data[i] = norm ? 1.0f : 0.03f * next_float();
  acre_array array = {.data = data, .ndim = rows ? 2 : 1};
  array.shape[0] = rows ? rows : columns, array.shape[1] = columns;
  array.strides[0] = rows ? columns : 1, array.strides[1] = 1;
  acre_error error;
  must(acre_model_bind(model, name, &array, &error), &error);
  free(data);
}

static void bind_layer(acre_model *model, const shape *s, int layer, bool trained) {
  int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
  const struct {
    const char *name;
    int64_t rows, columns;
    bool there;
  } tensors[] = {{"input_layernorm.weight", 0, s->hidden, true},
                 {"post_attention_layernorm.weight", 0, s->hidden, true},
                 {"self_attn.q_proj.weight", q, s->hidden, true},
                 {"self_attn.k_proj.weight", kv, s->hidden, true},
                 {"self_attn.v_proj.weight", kv, s->hidden, true},
                 {"self_attn.o_proj.weight", s->hidden, q, true},
                 {"mlp.gate_proj.weight", s->ffn, s->hidden, true},
                 {"mlp.up_proj.weight", s->ffn, s->hidden, true},
                 {"mlp.down_proj.weight", s->hidden, s->ffn, true},
                 {"self_attn.q_proj.bias", 0, q, s->bias},
                 {"self_attn.k_proj.bias", 0, kv, s->bias},
                 {"self_attn.v_proj.bias", 0, kv, s->bias},
                 {"self_attn.acre_q_proj.weight", q, s->hidden, trained},
                 {"self_attn.acre_k_proj.weight", kv, s->hidden, trained},
                 {"self_attn.acre_v_proj.weight", kv, s->hidden, trained},
                 {"self_attn.acre_q_proj.bias", 0, q, trained && s->bias},
                 {"self_attn.acre_k_proj.bias", 0, kv, trained && s->bias},
                 {"self_attn.acre_v_proj.bias", 0, kv, trained && s->bias}};
  for (int64_t i = 0; i < ACRE_COUNT(tensors); i++) {
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.%s", layer, tensors[i].name);
    if (tensors[i].there) bind(model, name, tensors[i].rows, tensors[i].columns);
  }
}

static acre_model *make_model(acre_engine *engine, const shape *s, acre_dtype dtype,
                              acre_weights weights, bool trained) {
  acre_model_config c = acre_model_config_default();
  c.vocab_size = s->vocab, c.hidden = s->hidden, c.layers = s->layers;
  c.heads = s->heads, c.kv_heads = s->kv_heads, c.head_dim = s->head_dim;
  c.ffn = s->ffn, c.w_max = s->w_max, c.tied_head = true, c.dtype = dtype;
  c.weights = weights;
  acre_error error;
  acre_model *model;
  must(acre_model_create(&model, engine, &c, &error), &error);
  bind(model, "model.embed_tokens.weight", s->vocab, s->hidden);
  bind(model, "model.norm.weight", 0, s->hidden);
  if (trained) bind(model, "model.acre_embed_tokens.weight", 1, s->hidden);
  for (int layer = 0; layer < s->layers; layer++) bind_layer(model, s, layer, trained);
  must(acre_model_ready(model, &error), &error);
  return model;
}

/* ---------------------------------------------------------------- stages */

static int32_t *random_ids(int64_t n, int64_t vocab) {
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  if (!ids) exit(1);
  for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)((next_float() + 1) / 2 * (float)vocab);
  return ids;
}

static acre_cache *build(acre_model *model, const int32_t *ids, int64_t n,
                         acre_proxy proxy) {
  acre_build_options options = acre_build_options_default();
  options.proxy = proxy, options.interval = 16, options.weight = 1;
  acre_error error;
  acre_builder *builder;
  acre_cache *cache;
  stage_begin();
  must(acre_builder_open(&builder, model, &options, NULL, 0, ids, n, &error), &error);
  for (int64_t done = 0, total = 1; done < total;)
    must(acre_builder_step(builder, &done, &total, &error), &error);
  must(acre_builder_freeze(builder, &cache, &error), &error);
  stage_end("build", (double)n, "tok");
  acre_builder_release(builder);
  return cache;
}

static void answer(acre_session *session, int64_t tokens) {
  acre_error error;
  int32_t token;
  must(acre_session_next(session, &token, NULL, &error), &error);
  stage_begin();
  for (int64_t i = 0; i < tokens; i++)
    must(acre_session_next(session, &token, NULL, &error), &error);
  stage_end("decode", (double)tokens, "tok");
}

static void ask(acre_model *model, acre_cache *cache, const int32_t *ids, int64_t t,
                int64_t eta) {
  acre_error error;
  acre_session *session;
  int64_t m = acre_cache_plan(cache)->m, k;
  float *scores = malloc((size_t)m * sizeof *scores);
  int32_t *groups = malloc((size_t)m * sizeof *groups);
  if (!scores || !groups) exit(1);
  printf("\nquestion of %lld tokens, m=%lld, r=%lld, eta=%lld\n", (long long)t,
         (long long)m, (long long)acre_cache_plan(cache)->recent, (long long)eta);
  for (int again = 0; again < 2; again++) { /* the second one is what is shown */
    if (again == 0) printf("first time:\n");
    must(acre_session_open(&session, model, cache, t + 80, &error), &error);
    stage_begin();
    must(acre_session_score(session, scores, ids, t, 0, t, NULL, &error), &error);
    stage_end("score", (double)t, "tok");
    must(acre_refill_count(&k, cache, eta, &error), &error);
    stage_begin();
    must(acre_select_groups(groups, scores, m, k, &error), &error);
    stage_end("select", (double)m, "group");
    stage_begin();
    must(acre_session_refill(session, groups, k, false, &error), &error);
    stage_end("refill", (double)(k * 16), "tok");
    stage_begin();
    must(acre_session_prefill(session, ids, t, NULL, &error), &error);
    stage_end("question", (double)t, "tok");
    if (again) answer(session, 64);
    acre_session_release(session);
    if (again == 0) printf("again:\n");
  }
  free(scores), free(groups);
}

static void plain(acre_model *model, const int32_t *ids, int64_t n) {
  acre_error error;
  acre_session *session;
  printf("\nno cache, %lld tokens\n", (long long)n);
  must(acre_session_open(&session, model, NULL, n + 80, &error), &error);
  stage_begin();
  must(acre_session_prefill(session, ids, n, NULL, &error), &error);
  stage_end("prefill", (double)n, "tok");
  answer(session, 64);
  acre_session_release(session);
}

int main(int argc, char **argv) {
  const shape *s = &shapes[0];
  for (int64_t i = 0; argc > 1 && i < ACRE_COUNT(shapes); i++)
    if (strcmp(argv[1], shapes[i].name) == 0) s = &shapes[i];
  int64_t n = argc > 2 ? strtoll(argv[2], NULL, 10) : 32768;
  bool trained = argc > 3 && strcmp(argv[3], "trained") == 0;
  const char *numbers = argc > 4 ? argv[4] : "bf16";
  acre_dtype dtype = strcmp(numbers, "f32") == 0 ? ACRE_F32 : ACRE_BF16;
  acre_weights weights = strcmp(numbers, "q8") == 0 ? ACRE_WEIGHTS_Q8 : ACRE_WEIGHTS_SAME;
  acre_engine_options options = acre_engine_options_default();
  options.threads = argc > 5 ? atoi(argv[5]) : 0;
  acre_error error;
  acre_engine *engine;
  must(acre_engine_open(&engine, &options, &error), &error);
  acre_pool *pool = ((cpu_backend *)engine->backend)->pool;
  limits.flops = measure_flops(pool, acre_engine_isa(engine), dtype);
  limits.bytes = measure_read(pool);
  printf("%s, %s, %s, %d threads, %s: peak %.0f GFLOP/s, read %.1f GB/s\n", s->name,
         numbers, trained ? "trained" : "pooled", acre_engine_threads(engine),
         acre_engine_isa(engine), limits.flops * 1e-9, limits.bytes * 1e-9);
  acre_model *model = make_model(engine, s, dtype, weights, trained);
  watch(engine);
  int32_t *ids = random_ids(acre_max(n, 2048), s->vocab);
  plain(model, ids, 512);
  plain(model, ids, 2048);
  printf("\n");
  acre_cache *cache =
      build(model, ids, n, trained ? ACRE_PROXY_TRAINED : ACRE_PROXY_POOLED);
  ask(model, cache, ids, 24, 4096);
  acre_cache_release(cache);
  acre_model_release(model);
  acre_engine_release(engine);
  free(ids);
  return 0;
}
