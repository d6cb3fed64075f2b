/* Steps that the device takes by itself are the steps of one by one, to the bit: the
 * operations that move on, on every table that has a loop, and a session's greedy answer on
 * the CUDA backend as the host can run it, whatever is asked in between. With ACRE_TEST_PLUGIN
 * in the environment, the answers alone, on the device of that plug-in. */
#include "backends.h"
#include "device.h"
#include "tiny.h"

/* ---------------------------------------------------------------- a model of one layer */

/* The row of the embedding is query, key and value; the output's product with `head` is the
 * logits. */
typedef struct layer {
  acre_heads heads;
  int64_t vocab, width, prefix_count, begin, most;
  void *table, *prefix_keys, *prefix_values;
  float *bias, *cos, *sin, *head;
} layer;

typedef struct run {
  const layer *m;
  const acre_backend_ops *ops;
  acre_queue *queue;
  acre_matrix *head;
  int32_t *id;
  float *x, *logits;
  void *raw, *rotated, *values, *out;
  int64_t step; /* the operations are those of this one */
} run;

static void take_step(void *context) {
  const run *r = context;
  const layer *m = r->m;
  const acre_heads *h = &m->heads;
  int64_t d = h->head_dim, kv = h->kv_heads * d, seen = m->begin + r->step;
  int64_t position = m->prefix_count + seen;
  size_t at = (size_t)(seen * kv) * acre_dtype_size(h->dtype);
  float *k = r->x + h->heads * d;
  r->ops->embed(r->queue, r->x, r->id, m->table, NULL, 1, m->vocab, m->width, h->dtype);
  r->ops->rope(r->queue, r->x, m->width, m->cos, m->sin, position, 1, h->heads, d);
  r->ops->store_kv(r->queue, r->raw ? (char *)r->raw + at : NULL, (char *)r->rotated + at,
                   (char *)r->values + at, k, k + kv, m->width, m->cos, m->sin, position, 1,
                   h);
  acre_keys own = {r->rotated, r->values, NULL, seen + 1};
  acre_keys prefix = {m->prefix_keys, m->prefix_values, m->bias, m->prefix_count};
  r->ops->attend(r->queue, r->out, h->heads * d, NULL, r->x, m->width,
                 m->prefix_count ? &prefix : NULL, &own, seen, 1, true, h);
  r->ops->matmul(r->queue, r->logits, m->vocab, r->out, r->head, NULL, 1, false);
  r->ops->argmax(r->queue, r->id, r->logits, 1, m->vocab);
}

static layer layer_of(acre_dtype dtype, int64_t d, int64_t prefix_count, int64_t most) {
  layer m = {.heads = {4, 2, d, dtype}, .vocab = 97, .width = 8 * d, .begin = 5};
  m.prefix_count = prefix_count, m.most = most;
  m.table = random_typed(m.vocab * m.width, dtype);
  m.prefix_keys = random_typed(prefix_count * 2 * d + 1, dtype);
  m.prefix_values = random_typed(prefix_count * 2 * d + 1, dtype);
  m.bias = random_floats(prefix_count + 1);
  int64_t angles = (prefix_count + m.begin + most) * d / 2;
  m.cos = random_floats(angles), m.sin = random_floats(angles);
  m.head = random_floats(m.vocab * 4 * d);
  return m;
}

static void drop_layer(layer *m) {
  guarded_free(m->table), guarded_free(m->prefix_keys), guarded_free(m->prefix_values);
  guarded_free(m->bias), guarded_free(m->cos), guarded_free(m->sin), guarded_free(m->head);
}

static run begin_run(const layer *m, int i, bool raw) {
  run r = {.m = m, .ops = backends[i]->ops, .queue = queues[i]};
  int64_t d = m->heads.head_dim;
  size_t size = acre_dtype_size(m->heads.dtype);
  size_t bytes = (size_t)((m->begin + m->most) * 2 * d) * size;
  acre_array head = {m->head, ACRE_F32, 2, {m->vocab, 4 * d}, {4 * d, 1}, false};
  bool finite = true;
  CHECK(r.ops->matrix_create(backends[i], &r.head, m->vocab, 4 * d, m->heads.dtype,
                             ACRE_WEIGHTS_SAME, NULL) == ACRE_OK);
  r.ops->matrix_fill(r.head, 0, &head, &finite);
  r.id = guarded_alloc(sizeof *r.id);
  *r.id = 11;
  r.x = nans(m->width), r.logits = nans(m->vocab);
  r.raw = raw ? guarded_alloc(bytes) : NULL;
  r.rotated = guarded_alloc(bytes), r.values = guarded_alloc(bytes);
  uint64_t own = 5; /* entries from before, the same for every run */
  for (int64_t c = 0; c < m->begin * 2 * d; c++) {
    float key = random_float(&own), value = random_float(&own);
    uint16_t low = acre_to_bf16(key), high = acre_to_bf16(value);
    memcpy((char *)r.rotated + (size_t)c * size, size == 4 ? (void *)&key : &low, size);
    memcpy((char *)r.values + (size_t)c * size, size == 4 ? (void *)&value : &high, size);
  }
  r.out = guarded_alloc((size_t)(4 * d) * size);
  return r;
}

static void end_run(run *r) {
  r->ops->matrix_release(r->head);
  guarded_free(r->id), guarded_free(r->x), guarded_free(r->logits), guarded_free(r->raw);
  guarded_free(r->rotated), guarded_free(r->values), guarded_free(r->out);
}

static void test_layer(int i, acre_dtype dtype, int64_t d, int64_t prefix, bool raw) {
  enum { MOST = 70 };
  layer m = layer_of(dtype, d, prefix, MOST);
  int32_t expected[MOST], got[MOST];
  size_t bytes = (size_t)((m.begin + MOST) * 2 * d) * acre_dtype_size(dtype);
  run alone = begin_run(&m, i, raw), looped = begin_run(&m, i, raw);
  for (alone.step = 0; alone.step < MOST; alone.step++) {
    take_step(&alone);
    alone.ops->download(alone.queue, &expected[alone.step], alone.id, sizeof *expected);
  }
  acre_loop *loop;
  acre_error error = {0};
  CHECK(looped.ops->loop_record(looped.queue, &loop, take_step, &looped, looped.id, MOST,
                                &error) == ACRE_OK);
  CHECK(*looped.id == 11 && isnan(looped.logits[0]));   /* recorded, not run */
  static const int64_t counts[] = {1, 4, 0, 3, 40, 22}; /* what goes ahead of reading */
  int64_t run = 0, read = 0;
  for (int64_t c = 0; c < ACRE_COUNT(counts); c++) {
    looped.ops->loop_run(loop, counts[c]);
    run += counts[c];
    if (c % 2 == 0) continue;
    CHECK(looped.ops->loop_read(loop, got + read, read, run - read, &error) == ACRE_OK);
    read = run;
  }
  looped.ops->loop_release(loop);
  CHECK(read == MOST && same(got, expected, sizeof got));
  int different = 0;
  for (int c = 1; c < MOST; c++) different += got[c] != got[c - 1];
  CHECK(different > 5);
  CHECK(same(looped.rotated, alone.rotated, (int64_t)bytes));
  CHECK(same(looped.values, alone.values, (int64_t)bytes));
  if (raw) {
    size_t begin = (size_t)(m.begin * 2 * d) * acre_dtype_size(dtype);
    CHECK(same((char *)looped.raw + begin, (char *)alone.raw + begin,
               (int64_t)(bytes - begin)));
  }
  CHECK(same(looped.logits, alone.logits, m.vocab * 4));
  end_run(&alone), end_run(&looped);
  drop_layer(&m);
}

static void test_layers(void) {
  int loops = 0;
  for (int i = 0; i < backend_count; i++) {
    if (!backends[i]->ops->loop_record) continue;
    loops++;
    test_layer(i, ACRE_F32, 8, 0, false), test_layer(i, ACRE_F32, 6, 45, true);
    test_layer(i, ACRE_BF16, 24, 33, false), test_layer(i, ACRE_BF16, 64, 0, true);
    test_layer(i, ACRE_BF16, 64, 70, false);
  }
  CHECK(loops > 0);
}

/* A call of the runtime fails, while a step is recorded or while it runs; whether none did. */
static bool goes_through(const layer *m, bool recording, int64_t call) {
  acre_cuda_options options = {sizeof options, ACRE_TEST_CUDA, 12288, 1024};
  acre_backend *backend;
  acre_error error = {0};
  CHECK(acre_cuda_backend_open(&backend, 0, &options, NULL) == ACRE_OK);
  backends[backend_count] = backend;
  CHECK(backend->ops->queue_open(backend, &queues[backend_count], NULL) == ACRE_OK);
  run r = begin_run(m, backend_count, false);
  acre_loop *loop = NULL;
  int32_t ids[6];
  if (recording) acre_host_fail(2, call); /* out of memory */
  acre_status status = r.ops->loop_record(r.queue, &loop, take_step, &r, r.id, 6, &error);
  acre_host_fail(0, 0);
  bool whole = status == ACRE_OK;
  CHECK(whole == (loop != NULL) && (whole || error.message[0]));
  if (whole) {
    if (!recording) acre_host_fail(2, call);
    r.ops->loop_run(loop, 6);
    status = r.ops->loop_read(loop, ids, 0, 6, &error);
    acre_host_fail(0, 0);
    CHECK(status == ACRE_OK || !recording); /* what was recorded runs */
    whole = status == ACRE_OK;
    CHECK(whole || error.message[0]);
  } else { /* nothing has run, and the queue goes on by itself */
    CHECK(*r.id == 11 && isnan(r.logits[0]));
    take_step(&r);
    CHECK(r.ops->sync(r.queue, &error) == ACRE_OK && !isnan(r.logits[0]));
  }
  r.ops->loop_release(loop);
  end_run(&r);
  backend->ops->queue_close(queues[backend_count]);
  backend->ops->destroy(backend);
  return whole;
}

static void test_failures(void) {
  layer m = layer_of(ACRE_F32, 8, 0, 6);
  int64_t live = acre_alloc_live();
  for (int recording = 0; recording < 2; recording++) {
    int64_t call = 1;
    while (call < 200 && !goes_through(&m, recording, call)) call++;
    CHECK(call > 5 && call < 200);
    CHECK(acre_alloc_live() == live);
  }
  drop_layer(&m);
}

/* ---------------------------------------------------------------- a session's answer */

enum { CONTEXT = 120, QUESTION = 7, TOKENS = 30 };

static acre_session *begun(acre_model *model, acre_cache *cache, bool refill) {
  int32_t question[QUESTION], groups[] = {1, 4, 9};
  acre_session *s = NULL;
  acre_error error = {0};
  tiny_ids(question, QUESTION, 3);
  CHECK(acre_session_open(&s, model, cache, QUESTION + TOKENS, &error) == ACRE_OK);
  if (refill) CHECK(acre_session_refill(s, groups, 3, false, &error) == ACRE_OK);
  CHECK(acre_session_prefill(s, question, QUESTION, NULL, &error) == ACRE_OK);
  return s;
}

/* One by one: a batch of one goes the way of batches. */
static int32_t stepped(acre_session *s) {
  int32_t token = -1;
  CHECK(acre_sessions_next(&s, 1, &token, NULL, NULL) == ACRE_OK);
  return token;
}

static int32_t taken(acre_session *s) {
  int32_t token = -1;
  CHECK(acre_session_next(s, &token, NULL, NULL) == ACRE_OK);
  return token;
}

static void same_logits(acre_session *a, acre_session *b) {
  float x[TINY_VOCAB], y[TINY_VOCAB];
  CHECK(acre_session_logits(a, x, NULL) == ACRE_OK);
  CHECK(acre_session_logits(b, y, NULL) == ACRE_OK);
  CHECK(same(x, y, sizeof x));
  CHECK(acre_session_count(a) == acre_session_count(b));
}

static void test_answer(acre_engine *engine, acre_model *model, acre_cache *cache,
                        bool refill) {
  acre_session *by_step = begun(model, cache, refill), *s = begun(model, cache, refill);
  size_t before = acre_engine_bytes(engine);
  int32_t token;
  for (int i = 0; i < TOKENS + 1; i++) CHECK(taken(s) == stepped(by_step));
  CHECK(acre_engine_bytes(engine) > before); /* a loop has its memory */
  CHECK(acre_session_next(s, &token, NULL, NULL) == ACRE_TOO_LONG);
  acre_session_release(s), acre_session_release(by_step);
}

/* What is asked of a session whose device is ahead of it. */
static void test_between(acre_model *model, acre_cache *cache) {
  for (int kind = 0; kind < 5; kind++) {
    acre_session *by_step = begun(model, cache, true), *s = begun(model, cache, true);
    for (int i = 0; i < 9; i++) CHECK(taken(s) == stepped(by_step));
    if (kind == 0) same_logits(s, by_step);
    if (kind == 1) {
      acre_sampling warm = acre_sampling_default();
      const acre_sampling *samplings = &warm;
      int32_t a, b;
      warm.temperature = 1.5f, warm.repetition_penalty = 1.2f;
      CHECK(acre_session_next(s, &a, &warm, NULL) == ACRE_OK);
      CHECK(acre_sessions_next(&by_step, 1, &b, &samplings, NULL) == ACRE_OK);
      CHECK(a == b);
    }
    if (kind == 2) {
      float x[TINY_W_MAX], y[TINY_W_MAX];
      int32_t ids[5];
      tiny_ids(ids, 5, 8);
      CHECK(acre_session_score(s, x, ids, 5, 0, 5, NULL, NULL) == ACRE_OK);
      CHECK(acre_session_score(by_step, y, ids, 5, 0, 5, NULL, NULL) == ACRE_OK);
      CHECK(same(x, y, acre_cache_plan(cache)->m * 4));
    }
    if (kind == 3) CHECK(stepped(s) == stepped(by_step));
    if (kind == 4) { /* anew: a second loop */
      int32_t ids[3];
      tiny_ids(ids, 3, 9);
      CHECK(acre_session_refill(s, NULL, 0, false, NULL) == ACRE_OK);
      CHECK(acre_session_refill(by_step, NULL, 0, false, NULL) == ACRE_OK);
      CHECK(acre_session_prefill(s, ids, 3, NULL, NULL) == ACRE_OK);
      CHECK(acre_session_prefill(by_step, ids, 3, NULL, NULL) == ACRE_OK);
    }
    for (int i = 0; i < 8; i++) CHECK(taken(s) == stepped(by_step));
    same_logits(s, by_step);
    acre_session_release(s), acre_session_release(by_step);
  }
}

static void test_sessions(void) {
  acre_error error = {0};
  acre_engine *engine;
  CHECK(open_engine(&engine, "cuda", plugin_file(), &error) == ACRE_OK);
  if (!engine) fprintf(stderr, "  %s\n", error.message);
  size_t empty = engine ? acre_engine_bytes(engine) : 0;
  for (int i = 0; engine && i < 2; i++) {
    acre_model *model = tiny_model(engine, i ? ACRE_BF16 : ACRE_F32, true, &error);
    acre_build_options build = tiny_options((acre_proxy)i);
    int32_t ids[CONTEXT];
    tiny_ids(ids, CONTEXT, 21);
    acre_cache *cache = tiny_build(model, &build, NULL, 0, ids, CONTEXT, &error);
    CHECK(cache != NULL);
    test_answer(engine, model, NULL, false);
    test_answer(engine, model, cache, true), test_answer(engine, model, cache, false);
    test_between(model, cache);
    acre_cache_release(cache), acre_model_release(model);
    CHECK(acre_engine_bytes(engine) == empty);
  }
  acre_engine_release(engine);
}

int main(int argc, char **argv) {
  if (!plugin_under_test()) {
    if (!open_backends(argc, argv, 41)) return 1;
    test_layers();
    test_failures();
    close_backends();
  }
  test_sessions(); /* a plug-in has a count of its allocations of its own */
  return check_report();
}
