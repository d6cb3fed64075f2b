/* Where the L2 cache lies: on a device apart from the host (the CUDA backend as the host can
 * run it) a build and its answers have the same bits with L2 on either
 * side, whatever the order in which the queues come to run, device memory does not grow with
 * the pages, and what does not fit is refused by name. On the CPU there is one memory. */
#include "engine.h"
#include "host.h"
#include "platform.h"
#include "plugin.h"
#include "tiny.h"

enum { N = 150, QUESTION = 7, TOKENS = 4, SEEDS = 4 };

/* ---------------------------------------------------------------- what is compared */

/* All views of a cache, one behind the other. */
typedef struct content {
  char *bytes;
  size_t size;
} content;

static void append(content *c, const void *bytes, size_t size) {
  c->bytes = realloc(c->bytes, c->size + size + 1);
  memcpy(c->bytes + c->size, bytes, size);
  c->size += size;
}

static void append_views(content *c, const acre_cache *cache) {
  for (int part = 0; part < 6; part++) {
    int64_t pages = part / 2 == 1 ? acre_cache_pages(cache) : 1;
    for (int64_t at = 0; at < TINY_LAYERS * pages; at++) {
      acre_array view;
      acre_buffer *owner;
      int64_t first;
      acre_status status = acre_cache_view(cache, (acre_part)part, at / pages, at % pages,
                                           &view, &first, &owner, NULL);
      CHECK(status == ACRE_OK);
      if (status != ACRE_OK) continue;
      append(c, view.data, (size_t)(view.shape[0] * 16) * acre_dtype_size(view.dtype));
      acre_buffer_release(owner);
    }
  }
}

/* Logits and tokens of a question with these groups for every layer, or each its own. A first
 * choice is dropped before anybody asked for it. */
static void append_answer(content *c, acre_model *model, acre_cache *cache,
                          bool per_layer) {
  static const int32_t groups[2][3] = {{0, 3, 4}, {1, 2, 6}}, dropped[4] = {0, 1, 5, 6};
  int32_t question[QUESTION], token[TOKENS];
  float logits[TINY_VOCAB];
  acre_error error = {0};
  acre_session *session = NULL;
  tiny_ids(question, QUESTION, 3);
  acre_status status = acre_session_open(&session, model, cache, QUESTION + TOKENS, &error);
  if (status == ACRE_OK) status = acre_session_refill(session, dropped, 4, false, &error);
  if (status == ACRE_OK)
    status = acre_session_refill(session, groups[0], 3, per_layer, &error);
  if (status == ACRE_OK)
    status = acre_session_prefill(session, question, QUESTION, NULL, &error);
  for (int i = 0; status == ACRE_OK && i < TOKENS; i++)
    status = acre_session_next(session, &token[i], NULL, &error);
  if (status == ACRE_OK) status = acre_session_logits(session, logits, &error);
  CHECK(status == ACRE_OK);
  if (status != ACRE_OK) fprintf(stderr, "  %s\n", error.message);
  append(c, token, sizeof token);
  append(c, logits, sizeof logits);
  acre_session_release(session);
}

static content content_of(acre_model *model, acre_cache *cache) {
  content c = {0};
  if (!cache) return c;
  append_views(&c, cache);
  append_answer(&c, model, cache, false);
  append_answer(&c, model, cache, true);
  return c;
}

/* Frees both. */
static bool same(content a, content b) {
  bool same = a.size && a.size == b.size && memcmp(a.bytes, b.bytes, a.size) == 0;
  free(a.bytes), free(b.bytes);
  return same;
}

static content copy_of(content c) {
  content copy = {0};
  append(&copy, c.bytes, c.size);
  return copy;
}

/* ---------------------------------------------------------------- the same bits */

static acre_build_options options_of(acre_proxy proxy, acre_place l2, int64_t carry,
                                     int64_t interval) {
  acre_build_options options = tiny_options(proxy);
  options.l2 = l2, options.carry = carry, options.interval = interval;
  return options;
}

/* The text in one build, or in two. */
static acre_cache *build(acre_model *model, const acre_build_options *options,
                         int64_t cut) {
  int32_t ids[N];
  acre_error error = {0};
  tiny_ids(ids, N, 21);
  acre_cache *cache = tiny_build(model, options, NULL, 0, ids, cut ? cut : N, &error);
  if (cache && cut) {
    acre_cache *longer = tiny_build(model, NULL, cache, cut, ids + cut, N - cut, &error);
    acre_cache_release(cache);
    cache = longer;
  }
  CHECK(cache != NULL);
  if (!cache) fprintf(stderr, "  %s\n", error.message);
  return cache;
}

static void test_same_bits(acre_engine *engine, acre_model *model, acre_proxy proxy,
                           int64_t carry, int64_t interval) {
  acre_build_options device = options_of(proxy, ACRE_PLACE_DEVICE, carry, interval);
  acre_build_options host = options_of(proxy, ACRE_PLACE_HOST, carry, interval);
  acre_cache *cache = build(model, &device, 0);
  content wanted = content_of(model, cache);
  CHECK(acre_cache_plan(cache)->l2 == ACRE_PLACE_DEVICE);
  CHECK(acre_engine_host_bytes(engine) == 0);
  acre_cache_release(cache);
  for (uint64_t seed = 0; seed <= SEEDS; seed++) {
    acre_host_disorder(seed);
    cache = build(model, &host, seed % 2 ? 100 : 0); /* extending keeps the place */
    const acre_plan *plan = cache ? acre_cache_plan(cache) : NULL;
    CHECK(plan && plan->l2 == ACRE_PLACE_HOST && plan->host_bytes == plan->l2_bytes);
    CHECK(plan && acre_engine_host_bytes(engine) == plan->l2_bytes);
    CHECK(same(content_of(model, cache), copy_of(wanted)));
    acre_cache_release(cache);
    CHECK(acre_engine_host_bytes(engine) == 0);
  }
  acre_host_disorder(0);
  free(wanted.bytes);
}

/* ---------------------------------------------------------------- bytes */

/* Most device bytes that a build of n tokens holds beyond what is held already. */
static size_t peak(acre_engine *engine, acre_model *model, acre_place l2, int64_t n,
                   acre_plan *plan) {
  int32_t ids[480];
  acre_error error = {0};
  acre_build_options options = options_of(ACRE_PROXY_TRAINED, l2, 5, 4);
  tiny_ids(ids, n, 2);
  acre_engine_reset_peak(engine);
  size_t before = acre_engine_bytes(engine);
  acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, n, &error);
  CHECK(cache != NULL);
  if (cache) *plan = *acre_cache_plan(cache);
  acre_cache_release(cache);
  CHECK(acre_engine_bytes(engine) == before && acre_engine_host_bytes(engine) == 0);
  return acre_engine_peak_bytes(engine) - before;
}

/* On the host pages cost the device nothing: more text costs what its L1 entries cost. On the
 * device each token has its L2 entries there. Plans say at least what is held, and not much
 * more. */
static void test_flat(acre_engine *engine, acre_model *model) {
  size_t row = 16 * sizeof(float);
  for (acre_place l2 = ACRE_PLACE_DEVICE; l2 <= ACRE_PLACE_HOST; l2++) {
    acre_plan small, large;
    size_t first = peak(engine, model, l2, 160, &small);
    size_t last = peak(engine, model, l2, 480, &large);
    bool host = l2 == ACRE_PLACE_HOST;
    int64_t l1 = large.m - small.m, pages = large.l2_tokens - small.l2_tokens;
    CHECK(small.recent == large.recent && l1 == 80 && pages == 320);
    size_t entries = (size_t)((3 * l1 + (host ? 0 : 2 * pages)) * TINY_LAYERS) * row;
    size_t frozen = (size_t)(3 * l1) * row; /* a layer of it, while freezing */
    CHECK(last - first >= entries && last - first <= entries + frozen);
    CHECK(first <= small.peak_bytes && small.peak_bytes <= first + first / 8);
    CHECK(last <= large.peak_bytes && large.peak_bytes <= last + last / 8);
  }
}

/* ---------------------------------------------------------------- auto, refusals */

static acre_status try_build(acre_model *model, acre_place l2, acre_plan *plan,
                             acre_error *error) {
  int32_t ids[480];
  acre_build_options options = options_of(ACRE_PROXY_POOLED, l2, 0, 8);
  options.eta = 8, options.reserve = 16;
  *error = (acre_error){0};
  tiny_ids(ids, 480, 2);
  acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, 480, error);
  if (cache) *plan = *acre_cache_plan(cache);
  acre_cache_release(cache);
  return cache ? ACRE_OK : error->status;
}

static void test_auto(acre_engine *engine, acre_model *model) {
  acre_plan device, host, chosen;
  acre_error error;
  size_t held = acre_engine_bytes(engine);
  CHECK(try_build(model, ACRE_PLACE_DEVICE, &device, &error) == ACRE_OK);
  CHECK(try_build(model, ACRE_PLACE_HOST, &host, &error) == ACRE_OK);
  CHECK(host.peak_bytes < device.peak_bytes && device.host_bytes == 0);
  CHECK(try_build(model, ACRE_PLACE_AUTO, &chosen, &error) == ACRE_OK);
  CHECK(chosen.l2 == ACRE_PLACE_DEVICE);
  acre_host_limit(held + device.peak_bytes); /* it fits, but nothing would be left */
  CHECK(try_build(model, ACRE_PLACE_DEVICE, &chosen, &error) == ACRE_OK);
  CHECK(try_build(model, ACRE_PLACE_AUTO, &chosen, &error) == ACRE_OK);
  CHECK(chosen.l2 == ACRE_PLACE_HOST && chosen.peak_bytes == host.peak_bytes);
  acre_host_limit(held + device.peak_bytes - 1);
  CHECK(try_build(model, ACRE_PLACE_DEVICE, &chosen, &error) == ACRE_NO_MEMORY);
  CHECK(strstr(error.message, "of device memory") && strstr(error.message, "l2=\"host\""));
  acre_host_limit(held + host.peak_bytes);
  CHECK(try_build(model, ACRE_PLACE_AUTO, &chosen, &error) == ACRE_OK);
  acre_host_limit(held + host.peak_bytes - 1);
  CHECK(try_build(model, ACRE_PLACE_AUTO, &chosen, &error) == ACRE_NO_MEMORY);
  CHECK(strstr(error.message, "of device memory") && !strstr(error.message, "\"host\""));
  CHECK(try_build(model, (acre_place)7, &chosen, &error) == ACRE_BAD_VALUE);
  CHECK(strstr(error.message, "l2: got 7") != NULL);
  acre_host_limit(0);
  CHECK(acre_engine_bytes(engine) == held);
}

/* ---------------------------------------------------------------- from one to the other */

/* The cache of one model in blocks of the caller's, as a mapped file has them. */
static acre_cache *carried(const acre_cache *cache, acre_model *model) {
  acre_cache_parts parts = {.struct_size = sizeof parts};
  const acre_plan *plan = acre_cache_plan(cache);
  int64_t rows[3] = {plan->m, plan->l2_tokens, plan->recent};
  acre_error error = {0};
  parts.options =
      options_of(acre_cache_proxy(cache), ACRE_PLACE_AUTO, plan->carry, plan->interval);
  parts.n = plan->n, parts.ids = acre_cache_ids(cache);
  for (int part = 0; part < 6; part++) {
    size_t row = 16 * sizeof(float), size = (size_t)(rows[part / 2] * TINY_LAYERS) * row;
    char *bytes = malloc(size + 1);
    int64_t pages = part / 2 == 1 ? acre_cache_pages(cache) : 1;
    for (int64_t at = 0; at < TINY_LAYERS * pages; at++) {
      acre_array view;
      acre_buffer *owner;
      int64_t first, layer = at / pages;
      CHECK(acre_cache_view(cache, (acre_part)part, layer, at % pages, &view, &first,
                            &owner, &error) == ACRE_OK);
      memcpy(bytes + (size_t)(layer * rows[part / 2] + first) * row, view.data,
             (size_t)view.shape[0] * row);
      acre_buffer_release(owner);
    }
    acre_buffer_wrap(&parts.blocks[part], bytes, size + 1, free, bytes, NULL);
  }
  acre_cache *out = NULL;
  CHECK(acre_cache_restore(&out, model, &parts, &error) == ACRE_OK);
  for (int part = 0; part < 6; part++) acre_buffer_release(parts.blocks[part]);
  return out;
}

/* A cache that was stored answers, on the device it was built on and as if it were on the
 * other, and is read on, in any order of the queues. */
static void test_restored(acre_model *model, acre_model *cpu, acre_proxy proxy) {
  acre_build_options options = options_of(proxy, ACRE_PLACE_HOST, 7, 5);
  acre_cache *built = build(model, &options, 100), *part = build(model, &options, 0);
  content wanted = content_of(model, built);
  CHECK(same(content_of(model, part), copy_of(wanted)));
  for (uint64_t seed = 0; seed < SEEDS; seed++) {
    acre_host_disorder(seed);
    acre_cache *there = carried(built, cpu), *back = carried(there, model);
    CHECK(acre_cache_plan(there)->l2 == ACRE_PLACE_DEVICE);
    CHECK(acre_cache_plan(back)->l2 == ACRE_PLACE_HOST);
    CHECK(same(content_of(model, back), copy_of(wanted)));
    acre_cache_release(there), acre_cache_release(back);
  }
  acre_host_disorder(0);
  free(wanted.bytes);
  acre_cache_release(built), acre_cache_release(part);
}

/* Read on from a stored cache: its pages stay in their blocks, new ones are pinned. */
static void test_restored_longer(acre_engine *engine, acre_model *model) {
  int32_t ids[N];
  acre_error error = {0};
  acre_build_options options = options_of(ACRE_PROXY_POOLED, ACRE_PLACE_DEVICE, 7, 5);
  tiny_ids(ids, N, 21);
  acre_cache *whole = build(model, &options, 0);
  acre_cache *first = tiny_build(model, &options, NULL, 0, ids, 100, &error);
  acre_cache *stored = first ? carried(first, model) : NULL;
  for (uint64_t seed = 0; stored && seed < SEEDS; seed++) {
    acre_host_disorder(seed);
    acre_cache *longer = tiny_build(model, NULL, stored, 100, ids + 100, N - 100, &error);
    CHECK(longer && acre_cache_plan(longer)->l2 == ACRE_PLACE_HOST);
    CHECK(acre_engine_host_bytes(engine) > 0);
    content got = {0}, wanted = {0};
    append_answer(&got, model, longer, true), append_answer(&wanted, model, whole, true);
    CHECK(same(got, wanted));
    acre_cache_release(longer);
  }
  acre_host_disorder(0);
  acre_cache_release(whole), acre_cache_release(first), acre_cache_release(stored);
}

/* On the CPU all three are one memory. */
static void test_cpu(acre_engine *engine, acre_model *model) {
  content wanted = {0};
  for (acre_place l2 = ACRE_PLACE_AUTO; l2 <= ACRE_PLACE_HOST; l2++) {
    acre_build_options options = options_of(ACRE_PROXY_POOLED, l2, 7, 5);
    acre_cache *cache = build(model, &options, 0);
    content got = content_of(model, cache);
    const acre_plan *plan = acre_cache_plan(cache);
    CHECK(plan->l2 == ACRE_PLACE_DEVICE && plan->host_bytes == 0);
    CHECK(acre_engine_host_bytes(engine) == 0);
    if (l2 == ACRE_PLACE_AUTO) wanted = copy_of(got);
    CHECK(same(got, copy_of(wanted)));
    acre_cache_release(cache);
  }
  free(wanted.bytes);
}

/* An engine of this machine, or on the CUDA backend as the host runs it, whose staging memory
 * is so small that its parts are taken again and again. */
static acre_engine *open_engine(bool cuda, acre_error *error) {
  acre_engine_options options = acre_engine_options_default();
  acre_cuda_options none = {sizeof none, ACRE_TEST_CUDA, 1 << 16, 2048};
  acre_engine *engine = NULL;
  options.threads = 1;
  if (acre_engine_open(&engine, &options, error) != ACRE_OK || !cuda) return engine;
  acre_backend *cpu = engine->backend;
  if (acre_cuda_backend_open(&engine->backend, 0, &none, error) == ACRE_OK) {
    cpu->ops->destroy(cpu);
    return engine;
  }
  engine->backend = cpu;
  acre_engine_release(engine);
  return NULL;
}

/* Whichever allocation fails, of the host, pinned or of the device: the call says so, nothing
 * is left behind, and the next try works. */
static void test_allocation_failures(acre_engine *engine, acre_model *model) {
  int32_t ids[50], question[5], answer[2];
  acre_build_options options = options_of(ACRE_PROXY_TRAINED, ACRE_PLACE_HOST, 5, 4);
  bool finished = false;
  int64_t n = 1;
  tiny_ids(ids, 50, 9), tiny_ids(question, 5, 10);
  for (; !finished && n < 1000; n += 3) {
    int64_t live = acre_alloc_live();
    size_t held = acre_engine_bytes(engine);
    acre_error error = {0};
    acre_alloc_fail_at(n);
    acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, 50, &error);
    if (cache)
      finished = tiny_ask(model, cache, question, 5, 16, answer, 2, NULL, &error) == 0;
    acre_alloc_fail_at(0);
    CHECK(finished || error.status == ACRE_NO_MEMORY);
    acre_cache_release(cache);
    CHECK(acre_alloc_live() == live && acre_engine_bytes(engine) == held);
    CHECK(acre_engine_host_bytes(engine) == 0);
  }
  CHECK(finished && n > 60);
}

int main(void) {
  acre_error error = {0};
#ifndef __SANITIZE_ADDRESS__ /* which sees more of memory that it gave itself */
  setenv("ACRE_HOST_APART", "1", 1);
#endif
  acre_engine *cpu = open_engine(false, &error), *cuda = open_engine(true, &error);
  CHECK(cpu && cuda);
  if (!cpu || !cuda) return check_report();
  acre_model *here = tiny_model(cpu, ACRE_F32, true, &error);
  acre_model *there = tiny_model(cuda, ACRE_F32, true, &error);
  acre_model *half = tiny_model(cuda, ACRE_BF16, true, &error);
  CHECK(here && there && half);
  test_same_bits(cuda, there, ACRE_PROXY_POOLED, 0, 4);
  test_same_bits(cuda, there, ACRE_PROXY_TRAINED, 7, 5);
  test_same_bits(cuda, half, ACRE_PROXY_POOLED, 16, 20); /* groups straddle pages */
  test_same_bits(cuda, half, ACRE_PROXY_TRAINED, 0, 3);
  test_flat(cuda, there);
  test_auto(cuda, there);
  test_restored(there, here, ACRE_PROXY_POOLED);
  test_restored_longer(cuda, there);
  test_allocation_failures(cuda, there);
  test_cpu(cpu, here);
  acre_model_release(here), acre_model_release(there), acre_model_release(half);
  acre_engine_release(cpu), acre_engine_release(cuda);
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
