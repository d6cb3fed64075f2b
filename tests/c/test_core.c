/* The stages above the seam, on a tiny model: windows as steps, extending, refusals, and
 * what is left behind when any one allocation fails. */
#include "tiny.h"

#include "nested.h"
#include "platform.h"

#include <math.h>

static void test_nested(void) {
  acre_nested nested = {.interval = 3, .window = 8, .stride = 5, .l1_tokens = true};
  CHECK(acre_nested_windows(&nested, 7) == 0);
  CHECK(acre_nested_windows(&nested, 8) == 1);
  CHECK(acre_nested_windows(&nested, 12) == 1);
  CHECK(acre_nested_windows(&nested, 13) == 2);
  CHECK(acre_nested_closed(&nested, 17) == 13);
  CHECK(acre_nested_window_end(&nested, 0) == 8);
  CHECK(acre_nested_window_end(&nested, 8) == 13);
  CHECK(acre_nested_length(&nested, 0, 8) == 10);
  CHECK(acre_nested_length(&nested, 8, 13) == 7); /* L1 after tokens 8 and 11 */
  int32_t ids[5] = {1, 2, 3, 4, 5}, out[7];
  acre_nested_fill(&nested, out, ids, 8, 13, 99);
  int32_t expected[7] = {1, 99, 2, 3, 4, 99, 5};
  CHECK(memcmp(out, expected, sizeof out) == 0);
}

static void test_plan(acre_model *model) {
  acre_error error;
  acre_plan plan;
  acre_build_options options = tiny_options(ACRE_PROXY_TRAINED);
  CHECK(acre_plan_build(&plan, model, &options, 70, &error) == ACRE_OK);
  CHECK(plan.windows == 3 && plan.l2_tokens == 64 && plan.m == 16);
  CHECK(plan.recent == 6 + 1);
  options.interval = 0; /* auto: 8 is the least; a longer text needs more */
  CHECK(acre_plan_build(&plan, model, &options, 1000, &error) == ACRE_OK);
  CHECK(plan.interval == 8);
  CHECK(acre_plan_build(&plan, model, &options, 8000, &error) == ACRE_OK);
  CHECK(plan.interval == 32);
  options.interval = 4;
  CHECK(acre_plan_build(&plan, model, &options, 8000, &error) == ACRE_TOO_LONG);
  CHECK(strstr(error.message, "interval=32 would fit") != NULL);
  options.window = 0;
  CHECK(acre_plan_build(&plan, model, &options, 10, &error) == ACRE_BAD_VALUE);
}

/* Every view of two caches holds the same bits. */
static bool same_cache(const acre_cache *a, const acre_cache *b) {
  const acre_plan *plan = acre_cache_plan(a);
  if (memcmp(plan, acre_cache_plan(b), sizeof *plan) != 0) return false;
  bool same = true;
  for (int part = 0; part < 6; ++part) {
    int64_t pages = part / 2 == 1 ? acre_cache_pages(a) : 1;
    for (int64_t at = 0; at < TINY_LAYERS * pages; ++at) {
      acre_array x, y;
      acre_buffer *p, *q;
      int64_t first;
      int64_t layer = at / pages, page = at % pages;
      if (acre_cache_view(a, (acre_part)part, layer, page, &x, &first, &p, NULL))
        return false;
      if (acre_cache_view(b, (acre_part)part, layer, page, &y, &first, &q, NULL)) {
        acre_buffer_release(p);
        return false;
      }
      size_t bytes = (size_t)(x.shape[0] * 16) * acre_dtype_size(x.dtype);
      same &= x.shape[0] == y.shape[0] && memcmp(x.data, y.data, bytes) == 0;
      acre_buffer_release(p);
      acre_buffer_release(q);
    }
  }
  return same;
}

static void test_extend(acre_model *model, acre_proxy proxy, int64_t carry,
                        int64_t interval) {
  enum { N = 150 };
  int32_t ids[N];
  acre_error error = {0};
  tiny_ids(ids, N, 3);
  acre_build_options options = tiny_options(proxy);
  options.carry = carry;
  options.interval = interval;
  acre_cache *whole = tiny_build(model, &options, NULL, 0, ids, N, &error);
  CHECK(whole != NULL);
  for (int64_t cut = 30; cut < N; cut += 17) {
    acre_cache *part = tiny_build(model, &options, NULL, 0, ids, cut, &error);
    acre_cache *both = tiny_build(model, NULL, part, cut, ids + cut, N - cut, &error);
    CHECK(both && same_cache(whole, both));
    /* The text before is as it was. */
    acre_cache *again = tiny_build(model, &options, NULL, 0, ids, cut, &error);
    CHECK(part && again && same_cache(part, again));
    acre_cache_release(part);
    acre_cache_release(both);
    acre_cache_release(again);
  }
  acre_cache_release(whole);
}

/* A question is answered alike however often and in whatever order it is asked. */
static void test_ask_many(acre_model *model, acre_proxy proxy) {
  int32_t ids[100], questions[2][9], first[2][5], second[2][5];
  acre_error error = {0};
  tiny_ids(ids, 100, 5);
  tiny_ids(questions[0], 9, 6);
  tiny_ids(questions[1], 9, 8);
  acre_build_options options = tiny_options(proxy);
  acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, 100, &error);
  CHECK(cache != NULL);
  for (int i = 0; i < 2; ++i) {
    CHECK(tiny_ask(model, cache, questions[i], 9, 32, first[i], 5, NULL, &error) == 0);
  }
  for (int i = 1; i >= 0; --i) {
    CHECK(tiny_ask(model, cache, questions[i], 9, 32, second[i], 5, NULL, &error) == 0);
  }
  CHECK(memcmp(first, second, sizeof first) == 0);
  acre_cache_release(cache);
}

/* Whatever allocation fails, the call says so, nothing leaks, and the next try works. */
static void test_allocation_failures(acre_proxy proxy) {
  int32_t ids[70], question[5], answer[3];
  tiny_ids(ids, 70, 9);
  tiny_ids(question, 5, 10);
  acre_build_options options = tiny_options(proxy);
  bool finished = false;
  for (int64_t n = 1; !finished && n < 5000; ++n) {
    int64_t live = acre_alloc_live();
    acre_error error = {0};
    acre_engine *engine = NULL;
    acre_model *model = NULL;
    acre_cache *cache = NULL;
    acre_engine_options engine_options = acre_engine_options_default();
    engine_options.threads = 1;
    acre_alloc_fail_at(n);
    acre_status status = acre_engine_open(&engine, &engine_options, &error);
    if (status == ACRE_OK) model = tiny_model(engine, ACRE_F32, true, &error);
    if (model) cache = tiny_build(model, &options, NULL, 0, ids, 70, &error);
    if (cache) {
      finished = tiny_ask(model, cache, question, 5, 16, answer, 3, NULL, &error) == 0;
    }
    acre_alloc_fail_at(0);
    if (!finished) CHECK(error.status == ACRE_NO_MEMORY);
    acre_cache_release(cache);
    acre_model_release(model);
    acre_engine_release(engine);
    CHECK(acre_alloc_live() == live);
  }
  CHECK(finished);
}

/* Decoding works where every allocation fails: it makes none. */
static void test_decoding_allocates_nothing(acre_model *model) {
  int32_t ids[70], groups[2] = {1, 3}, token;
  acre_error error = {0};
  tiny_ids(ids, 70, 12);
  acre_build_options options = tiny_options(ACRE_PROXY_POOLED);
  acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, 70, &error);
  acre_session *session;
  CHECK(acre_session_open(&session, model, cache, 20, &error) == ACRE_OK);
  CHECK(acre_session_refill(session, groups, 2, false, &error) == ACRE_OK);
  CHECK(acre_session_prefill(session, ids, 5, NULL, &error) == ACRE_OK);
  acre_alloc_fail_at(1);
  for (int i = 0; i < 8; ++i)
    CHECK(acre_session_next(session, &token, NULL, &error) == ACRE_OK);
  acre_alloc_fail_at(0);
  acre_session_release(session);
  acre_cache_release(cache);
}

static void test_refusals(acre_model *model) {
  int32_t ids[50], bad[1] = {TINY_VOCAB}, answer[2];
  acre_error error = {0};
  tiny_ids(ids, 50, 11);
  acre_build_options options = tiny_options(ACRE_PROXY_POOLED);
  acre_builder *builder = NULL;
  CHECK(acre_builder_open(&builder, model, &options, NULL, 0, bad, 1, &error) ==
        ACRE_BAD_VALUE);
  CHECK(acre_builder_open(&builder, model, &options, NULL, 0, ids, 0, &error) ==
        ACRE_BAD_VALUE);
  CHECK(builder == NULL);
  acre_cache *cache = tiny_build(model, &options, NULL, 0, ids, 50, &error);
  acre_session *session = NULL;
  CHECK(acre_session_open(&session, model, cache, TINY_W_MAX, &error) == ACRE_TOO_LONG);
  CHECK(tiny_ask(model, cache, ids, 3, 2, answer, 1, NULL, &error) == ACRE_BAD_VALUE);
  CHECK(acre_session_open(&session, model, cache, 8, &error) == ACRE_OK);
  CHECK(acre_session_next(session, answer, NULL, &error) == ACRE_BAD_STATE);
  CHECK(acre_session_prefill(session, ids, 9, NULL, &error) == ACRE_TOO_LONG);
  int32_t groups[2] = {3, 1};
  CHECK(acre_session_refill(session, groups, 2, false, &error) == ACRE_BAD_VALUE);
  acre_sampling sampling = acre_sampling_default();
  sampling.top_p = 0;
  CHECK(acre_session_prefill(session, ids, 4, NULL, &error) == ACRE_OK);
  CHECK(acre_session_next(session, answer, &sampling, &error) == ACRE_BAD_VALUE);
  CHECK(acre_session_next(session, answer, NULL, &error) == ACRE_OK);
  acre_session_release(session);
  acre_cache_release(cache);
}

static void test_select_groups(void) {
  uint64_t seed = 1;
  acre_error error = {0};
  for (int64_t m = 1; m < 60; m++) {
    for (int64_t k = 0; k <= m; k++) {
      float scores[60];
      int32_t groups[61];
      for (int64_t i = 0; i < m; i++) {
        scores[i] = (float)(random_bits(&seed) % 9);
        if (scores[i] == 8.0f) scores[i] = NAN;
        if (scores[i] == 7.0f) scores[i] = -INFINITY;
      }
      memset(groups, 0xff, sizeof groups);
      CHECK(acre_select_groups(groups, scores, m, k, &error) == ACRE_OK);
      bool right = groups[k] == -1;
      for (int64_t i = 0; i < m; i++) { /* chosen: fewer than k are better */
        int64_t better = 0, chosen = 0;
        float s = isnan(scores[i]) ? -INFINITY : scores[i];
        for (int64_t j = 0; j < m; j++) {
          float o = isnan(scores[j]) ? -INFINITY : scores[j];
          bool nan_i = isnan(scores[i]), nan_j = isnan(scores[j]);
          better += o > s || (o == s && (nan_i != nan_j ? nan_i : j < i));
        }
        for (int64_t j = 0; j < k; j++) chosen += groups[j] == i;
        right &= chosen == (better < k);
      }
      for (int64_t j = 1; j < k; j++) right &= groups[j - 1] < groups[j];
      CHECK(right);
    }
  }
  CHECK(acre_select_groups(NULL, NULL, 6, 7, &error) == ACRE_BAD_VALUE);
}

int main(void) {
  acre_error error = {0};
  acre_engine *engine = NULL;
  test_nested();
  test_select_groups();
  CHECK(acre_engine_open(&engine, NULL, &error) == ACRE_OK);
  for (int dtype = ACRE_F32; dtype <= ACRE_BF16; ++dtype) {
    for (int trained = 0; trained < 2; ++trained) {
      acre_model *model = tiny_model(engine, (acre_dtype)dtype, trained, &error);
      if (!model) fprintf(stderr, "%s\n", error.message);
      CHECK(model != NULL);
      test_plan(model);
      test_refusals(model);
      test_decoding_allocates_nothing(model);
      for (int proxy = 0; proxy < 2; ++proxy) {
        test_ask_many(model, (acre_proxy)proxy);
        test_extend(model, (acre_proxy)proxy, 0, 4);
        test_extend(model, (acre_proxy)proxy, 7, 4);
        test_extend(model, (acre_proxy)proxy, 16, 5); /* groups straddle windows */
      }
      acre_model_release(model);
    }
  }
  acre_engine_release(engine);
  test_allocation_failures(ACRE_PROXY_POOLED);
  test_allocation_failures(ACRE_PROXY_TRAINED);
  return check_report();
}
