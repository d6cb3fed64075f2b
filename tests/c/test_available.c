/* What is refused up front is refused by what the device has left, whatever the host has: a
 * text to be read and an example to learn from, with the bytes; nothing is kept, and what
 * needs less goes on. On the CPU's table, and on the CUDA table as the host runs it. */
#include "engine.h"
#include "host.h"
#include "platform.h"
#include "plugin.h"
#include "tiny.h"

enum { TOKENS = 200 };

static size_t left; /* what the device says */

static size_t available(acre_backend *backend) {
  (void)backend;
  return left;
}

/* How the last bytes of a sentence read, "... 123 are available". */
static bool tells(const acre_error *error, size_t bytes) {
  char words[64];
  snprintf(words, sizeof words, ", %zu are available", bytes);
  return error->status == ACRE_NO_MEMORY && strstr(error->message, words) != NULL;
}

static acre_cache *build(acre_model *model, acre_error *error) {
  acre_build_options options = tiny_options(ACRE_PROXY_POOLED);
  int32_t ids[TOKENS];
  tiny_ids(ids, TOKENS, 3);
  return tiny_build(model, &options, NULL, 0, ids, TOKENS, error);
}

static acre_status begin(acre_trainer *trainer, acre_error *error) {
  static const int64_t intervals[] = {4, 4, 4, 4};
  int32_t ids[70], asked[9];
  acre_question question = {.ids = asked, .t = 9};
  acre_example e = acre_example_default();
  tiny_ids(ids, 70, 5), tiny_ids(asked, 9, 6);
  e.ids = ids, e.n = 70;
  e.window = 24, e.stride = 16, e.carry = 5;
  e.intervals = intervals, e.windows = 4;
  e.questions = &question, e.question_count = 1;
  return acre_trainer_begin(trainer, &e, true, error);
}

/* `bytes` says where the device's word lies, and 0 there that it does not tell. */
static void test_refusals(acre_engine *engine, size_t *bytes) {
  acre_error error = {0};
  acre_model *model = tiny_model(engine, ACRE_F32, false, &error);
  acre_trainer *trainer = NULL;
  CHECK(model && acre_trainer_open(&trainer, model, &error) == ACRE_OK);
  size_t held = acre_engine_bytes(engine);

  *bytes = 1000;
  CHECK(acre_memory_available() > 1000000);
  CHECK(build(model, &error) == NULL && tells(&error, 1000));
  CHECK(begin(trainer, &error) == ACRE_NO_MEMORY && tells(&error, 1000));
  CHECK(acre_engine_bytes(engine) == held);

  static const size_t enough[] = {0, 1 << 30};
  for (int i = 0; i < 2; i++) {
    *bytes = enough[i];
    acre_cache *cache = build(model, &error);
    CHECK(cache != NULL);
    CHECK(begin(trainer, &error) == ACRE_OK);
    acre_cache_release(cache);
  }
  acre_trainer_release(trainer);
  acre_model_release(model);
}

int main(void) {
  acre_error error = {0};
  acre_engine *engine;
  acre_engine_options options = acre_engine_options_default();
  options.threads = 1;
  CHECK(acre_engine_open(&engine, &options, &error) == ACRE_OK);
  acre_backend *cpu = engine->backend;
  const acre_backend_ops *ops = cpu->ops;
  CHECK(ops->available(cpu) > 0);
  acre_backend_ops poor = *ops;
  poor.available = available;
  cpu->ops = &poor;
  test_refusals(engine, &left);
  cpu->ops = ops;

  acre_cuda_options none = {sizeof none, ACRE_TEST_CUDA, 0, 0};
  CHECK(acre_cuda_backend_open(&engine->backend, 0, &none, &error) == ACRE_OK);
  test_refusals(engine, &acre_host_is.available);
  acre_host_is.available = 0;
  cpu->ops->destroy(cpu);
  acre_engine_release(engine);
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
