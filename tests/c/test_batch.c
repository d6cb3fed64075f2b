/* Sessions that decode together give the tokens and logits of one by one, to the bit, however
 * their timelines, samplings and ends differ; and what is refused leaves all where it was. */
#include "platform.h"
#include "tiny.h"

enum { SESSIONS = 6, CONTEXT = 120, MOST = 12 };

/* A question, and how it is answered. */
typedef struct question {
  bool cached, per_layer;
  int64_t k; /* groups refilled; < 0: none, and no refill */
  int64_t t, count;
  acre_sampling sampling;
} question;

static question question_at(int i) {
  static const question all[SESSIONS] = {
      {true, false, 3, 7, 9, {.temperature = 0, .top_p = 1, .repetition_penalty = 1}},
      {true, false, 0, 1, 12, {.temperature = 1, .top_p = 1, .repetition_penalty = 1}},
      {true, true, 5, 9, 4, {.temperature = 0, .top_p = 1, .repetition_penalty = 1.5f}},
      {false, false, -1, 5, 1, {.temperature = 0, .top_p = 1, .repetition_penalty = 1}},
      {true,
       false,
       -1,
       3,
       7,
       {.temperature = 2, .top_k = 9, .top_p = 0.8f, .repetition_penalty = 1.1f}},
      {false,
       false,
       -1,
       11,
       12,
       {.temperature = 1, .top_p = 0.5f, .repetition_penalty = 1}},
  };
  question q = all[i];
  q.sampling.struct_size = sizeof q.sampling;
  q.sampling.seed = (uint64_t)i;
  return q;
}

static acre_status begin(acre_session *s, const acre_cache *cache, int i) {
  question q = question_at(i);
  int32_t ids[MOST], groups[TINY_LAYERS * MOST];
  tiny_ids(ids, q.t, (uint64_t)(40 + i));
  for (int64_t layer = 0; layer < TINY_LAYERS; ++layer)
    for (int64_t j = 0; j < q.k; ++j)
      groups[layer * q.k + j] = (int32_t)(1 + layer + 2 * j + i % 3);
  acre_error error = {0};
  acre_status status = ACRE_OK;
  if (q.k >= 0 && cache) status = acre_session_refill(s, groups, q.k, q.per_layer, &error);
  if (status == ACRE_OK) status = acre_session_prefill(s, ids, q.t, NULL, &error);
  if (status != ACRE_OK) fprintf(stderr, "  %s\n", error.message);
  return status;
}

typedef struct answer {
  int32_t tokens[MOST];
  float logits[TINY_VOCAB];
} answer;

static void alone(answer *out, acre_model *model, acre_cache *cache, int i) {
  question q = question_at(i);
  acre_session *s = NULL;
  memset(out, 0, sizeof *out);
  CHECK(acre_session_open(&s, model, q.cached ? cache : NULL, q.t + q.count, NULL) ==
        ACRE_OK);
  CHECK(begin(s, q.cached ? cache : NULL, i) == ACRE_OK);
  for (int64_t n = 0; n < q.count; ++n)
    CHECK(acre_session_next(s, &out->tokens[n], &q.sampling, NULL) == ACRE_OK);
  CHECK(acre_session_logits(s, out->logits, NULL) == ACRE_OK);
  acre_session_release(s);
}

static void open_some(acre_session **out, acre_model *model, acre_cache *cache, int first,
                      int count) {
  acre_cache *caches[SESSIONS];
  int64_t capacities[SESSIONS];
  acre_error error = {0};
  for (int i = 0; i < count; ++i) {
    question q = question_at(first + i);
    caches[i] = q.cached ? cache : NULL;
    capacities[i] = q.t + q.count;
  }
  CHECK(acre_sessions_open(out, model, caches, capacities, count, &error) == ACRE_OK);
  if (error.message[0]) fprintf(stderr, "  %s\n", error.message);
}

/* The questions [first, first + count) together; those that have all their tokens leave. The
 * one before the last comes two steps late. */
static void together(answer *out, acre_model *model, acre_cache *cache, int first,
                     int count) {
  acre_session *all[SESSIONS];
  int64_t done[SESSIONS] = {0};
  memset(out, 0, (size_t)count * sizeof *out);
  open_some(all, model, cache, first, count);
  int late = count > 2 ? count - 2 : -1;
  for (int i = 0; i < count; ++i)
    if (i != late)
      CHECK(begin(all[i], question_at(first + i).cached ? cache : NULL, first + i) ==
            ACRE_OK);
  for (int step = 0; step < MOST + 2; ++step) {
    acre_session *active[SESSIONS];
    const acre_sampling *samplings[SESSIONS];
    question questions[SESSIONS];
    int32_t tokens[SESSIONS];
    int who[SESSIONS], rows = 0;
    if (step == 2 && late >= 0)
      CHECK(begin(all[late], question_at(first + late).cached ? cache : NULL,
                  first + late) == ACRE_OK);
    for (int i = count - 1; i >= 0; --i) { /* in another order than they were opened in */
      questions[i] = question_at(first + i);
      if (done[i] == questions[i].count || (i == late && step < 2)) continue;
      who[rows] = i, samplings[rows] = &questions[i].sampling, active[rows++] = all[i];
    }
    if (!rows) continue;
    CHECK(acre_sessions_next(active, rows, tokens, samplings, NULL) == ACRE_OK);
    for (int r = 0; r < rows; ++r) out[who[r]].tokens[done[who[r]]++] = tokens[r];
  }
  for (int i = 0; i < count; ++i) {
    CHECK(acre_session_logits(all[i], out[i].logits, NULL) == ACRE_OK);
    acre_session_release(all[i]);
  }
}

static void test_same_bits(acre_model *model, acre_cache *cache) {
  answer expected[SESSIONS], got[SESSIONS];
  for (int i = 0; i < SESSIONS; ++i) alone(&expected[i], model, cache, i);
  together(got, model, cache, 0, SESSIONS);
  CHECK(memcmp(got, expected, sizeof got) == 0);
  together(got, model, cache, 2, 2);
  CHECK(memcmp(got, expected + 2, 2 * sizeof *got) == 0);
  for (int i = 0; i < SESSIONS; i += 2) { /* one alone is a batch, too */
    together(got, model, cache, i, 1);
    CHECK(memcmp(got, expected + i, sizeof *got) == 0);
  }
}

/* ---------------------------------------------------------------- refusals */

static void refused(acre_session **sessions, int64_t count, acre_status status,
                    const char *words) {
  int32_t tokens[SESSIONS];
  acre_error error = {0};
  CHECK(acre_sessions_next(sessions, count, tokens, NULL, &error) == status);
  CHECK(strstr(error.message, words) != NULL);
  if (!strstr(error.message, words)) fprintf(stderr, "  %s\n", error.message);
}

static void test_refusals(acre_model *model, acre_cache *cache) {
  acre_session *s[SESSIONS], *other = NULL;
  open_some(s, model, cache, 0, 4); /* the fourth has room for one token */
  CHECK(acre_session_open(&other, model, cache, 8, NULL) == ACRE_OK);
  refused(s, 0, ACRE_BAD_VALUE, "got 0");
  CHECK(begin(s[0], cache, 0) == ACRE_OK && begin(s[3], NULL, 3) == ACRE_OK);
  refused(s, 2, ACRE_BAD_STATE, "sessions[1]: session: prefill comes first");
  acre_session *twice[3] = {s[0], s[3], s[0]}, *strange[2] = {s[0], other};
  refused(twice, 3, ACRE_BAD_VALUE, "sessions[2]: came before");
  refused(strange, 2, ACRE_BAD_VALUE, "sessions[1]: was not opened together");
  question q = question_at(3);
  acre_sampling hot = q.sampling;
  hot.temperature = -1;
  const acre_sampling *samplings[2] = {&q.sampling, &hot};
  acre_session *both[2] = {s[0], s[3]};
  int32_t tokens[2];
  acre_error error = {0};
  CHECK(acre_sessions_next(both, 2, tokens, samplings, &error) == ACRE_BAD_VALUE);
  CHECK(strncmp(error.message, "sessions[1]: temperature", 24) == 0);
  /* No refusal moved anything: these are the first tokens. */
  answer first, second;
  alone(&first, model, cache, 0), alone(&second, model, cache, 3);
  CHECK(acre_sessions_next(both, 2, tokens, NULL, NULL) == ACRE_OK);
  CHECK(tokens[0] == first.tokens[0] && tokens[1] == second.tokens[0]);
  CHECK(acre_sessions_next(both, 2, tokens, NULL, NULL) == ACRE_OK); /* fills the fourth */
  refused(both, 2, ACRE_TOO_LONG, "sessions[1]: ids: 1 tokens");
  CHECK(acre_sessions_next(both, 1, tokens, NULL, NULL) == ACRE_OK);
  CHECK(tokens[0] == first.tokens[2]);
  for (int i = 0; i < 4; ++i) acre_session_release(s[i]);
  acre_session_release(other);

  acre_cache *caches[2] = {cache, NULL};
  int64_t capacities[2] = {4, 0};
  CHECK(acre_sessions_open(s, model, caches, capacities, 2, &error) == ACRE_BAD_VALUE);
  CHECK(strncmp(error.message, "sessions[1]: capacity: got 0", 28) == 0 && !s[0] && !s[1]);
  CHECK(acre_sessions_open(s, model, NULL, capacities, 0, &error) == ACRE_BAD_VALUE);
}

/* Whichever allocation fails, nothing is kept. */
static void test_memory(acre_model *model, acre_cache *cache) {
  acre_cache *caches[3] = {cache, NULL, cache};
  int64_t capacities[3] = {9, 5, 7}, live = acre_alloc_live();
  acre_status status = ACRE_NO_MEMORY;
  int64_t n = 0;
  while (status == ACRE_NO_MEMORY && n < 1000) {
    acre_session *s[3] = {(acre_session *)1, (acre_session *)1, (acre_session *)1};
    acre_alloc_fail_at(++n);
    status = acre_sessions_open(s, model, caches, capacities, 3, NULL);
    acre_alloc_fail_at(0);
    if (status != ACRE_OK) CHECK(!s[0] && !s[1] && !s[2]);
    for (int i = 0; i < 3; ++i) acre_session_release(s[i]);
    CHECK(acre_alloc_live() == live);
  }
  CHECK(status == ACRE_OK && n > 20);
  CHECK(acre_sessions_fit(model, cache, 2, 8, 5) == 5);
  CHECK(acre_sessions_fit(model, cache, 0, (int64_t)1 << 55, 5) == 1);
  CHECK(acre_sessions_fit(model, NULL, 0, 8, 0) == 1);
}

int main(void) {
  acre_error error = {0};
  int32_t ids[CONTEXT];
  tiny_ids(ids, CONTEXT, 21);
  for (int i = 0; i < 4; ++i) {
    acre_engine *engine = NULL;
    acre_engine_options options = acre_engine_options_default();
    options.threads = i % 2 ? 3 : 1;
    CHECK(acre_engine_open(&engine, &options, &error) == ACRE_OK);
    acre_model *model = tiny_model(engine, i / 2 ? ACRE_BF16 : ACRE_F32, true, &error);
    acre_build_options build = tiny_options((acre_proxy)(i % 2));
    acre_cache *cache = tiny_build(model, &build, NULL, 0, ids, CONTEXT, &error);
    CHECK(cache != NULL);
    test_same_bits(model, cache);
    if (i == 0) test_refusals(model, cache), test_memory(model, cache);
    acre_cache_release(cache);
    acre_model_release(model);
    acre_engine_release(engine);
  }
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
