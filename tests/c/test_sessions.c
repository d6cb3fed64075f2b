/* Questions asked of one cache from several threads at once; run under ThreadSanitizer. */
#include "tiny.h"

#include <pthread.h>

enum { THREADS = 6, TOKENS = 6 };

typedef struct job {
  acre_model *model;
  acre_cache *cache;
  int32_t question[7];
  int32_t answer[TOKENS];
  acre_status status;
} job;

static void *ask(void *context) {
  job *j = context;
  for (int i = 0; i < 3; ++i) {
    j->status =
        tiny_ask(j->model, j->cache, j->question, 7, 24, j->answer, TOKENS, NULL, NULL);
  }
  return NULL;
}

static acre_cache *restored(acre_model *model, const acre_cache *cache) {
  /* Blocks as a file would hold them, so that the first use fills the resident entries. */
  acre_cache_parts parts = {.struct_size = sizeof parts};
  parts.options = tiny_options(acre_cache_proxy(cache));
  parts.n = acre_cache_plan(cache)->n;
  parts.ids = acre_cache_ids(cache);
  const acre_plan *plan = acre_cache_plan(cache);
  int64_t rows[3] = {plan->m, plan->l2_tokens, plan->recent};
  for (int part = 0; part < 6; ++part) {
    size_t row = 16 * sizeof(float), size = (size_t)(rows[part / 2] * TINY_LAYERS) * row;
    char *bytes = malloc(size + 1);
    int64_t pages = part / 2 == 1 ? acre_cache_pages(cache) : 1;
    for (int64_t at = 0; at < TINY_LAYERS * pages; ++at) {
      acre_array view;
      acre_buffer *owner;
      int64_t first, layer = at / pages;
      acre_cache_view(cache, (acre_part)part, layer, at % pages, &view, &first, &owner,
                      NULL);
      memcpy(bytes + (size_t)(layer * rows[part / 2] + first) * row, view.data,
             (size_t)view.shape[0] * row);
      acre_buffer_release(owner);
    }
    acre_buffer_wrap(&parts.blocks[part], bytes, size + 1, free, bytes, NULL);
  }
  acre_cache *out = NULL;
  acre_error error = {0};
  CHECK(acre_cache_restore(&out, model, &parts, &error) == ACRE_OK);
  for (int part = 0; part < 6; ++part) acre_buffer_release(parts.blocks[part]);
  return out;
}

static void run(acre_model *model, acre_cache *cache, int32_t answers[THREADS][TOKENS]) {
  job jobs[THREADS];
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    jobs[i] = (job){.model = model, .cache = cache};
    tiny_ids(jobs[i].question, 7, (uint64_t)i);
    pthread_create(&threads[i], NULL, ask, &jobs[i]);
  }
  for (int i = 0; i < THREADS; ++i) {
    pthread_join(threads[i], NULL);
    CHECK(jobs[i].status == ACRE_OK);
    memcpy(answers[i], jobs[i].answer, sizeof jobs[i].answer);
  }
}

int main(void) {
  acre_error error = {0};
  acre_engine *engine = NULL;
  acre_engine_options options = acre_engine_options_default();
  options.threads = 3;
  CHECK(acre_engine_open(&engine, &options, &error) == ACRE_OK);
  for (int proxy = 0; proxy < 2; ++proxy) {
    acre_model *model = tiny_model(engine, ACRE_F32, true, &error);
    acre_build_options build = tiny_options((acre_proxy)proxy);
    int32_t ids[120], answers[2][THREADS][TOKENS], alone[TOKENS], question[7];
    tiny_ids(ids, 120, 21);
    acre_cache *cache = tiny_build(model, &build, NULL, 0, ids, 120, &error);
    CHECK(cache != NULL);
    acre_cache *copy = restored(model, cache);
    run(model, cache, answers[0]);
    run(model, copy, answers[1]);
    CHECK(memcmp(answers[0], answers[1], sizeof answers[0]) == 0);
    for (int i = 0; i < THREADS; ++i) {
      tiny_ids(question, 7, (uint64_t)i);
      CHECK(tiny_ask(model, cache, question, 7, 24, alone, TOKENS, NULL, NULL) == ACRE_OK);
      CHECK(memcmp(alone, answers[0][i], sizeof alone) == 0);
    }
    acre_cache_release(copy);
    acre_cache_release(cache);
    acre_model_release(model);
  }
  acre_engine_release(engine);
  return check_report();
}
