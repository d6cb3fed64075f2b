/* A model on the CUDA backend as the host can run it, loaded as a plug-in: reading, asking and
 * learning give what they give on the CPU, but for rounding; and what is refused. With
 * ACRE_TEST_PLUGIN in the environment, on the device of that plug-in. */
#include "device.h"
#include "plugin.h"
#include "tiny.h"

#include <math.h>

/* ---------------------------------------------------------------- refusals */

static void refused(const char *device, const char *plugin, acre_status status,
                    const char *words) {
  acre_error error = {0};
  acre_engine *engine;
  CHECK(open_engine(&engine, device, plugin, &error) == status && !engine);
  CHECK(strstr(error.message, words) != NULL);
  if (!strstr(error.message, words)) fprintf(stderr, "  %s\n", error.message);
}

static void test_refusals(void) {
  const char *plugin = plugin_file();
  refused("tpu", plugin, ACRE_BAD_VALUE, "got 'tpu', expected 'cpu', 'cuda' or 'cuda:N'");
  refused("cuda:", plugin, ACRE_BAD_VALUE, "cuda:N");
  refused("cuda:1x", plugin, ACRE_BAD_VALUE, "cuda:N");
  refused("cuda:-1", plugin, ACRE_BAD_VALUE, "cuda:N");
  refused("cuda:99999999999", plugin, ACRE_BAD_VALUE, "cuda:N");
  refused("cuda:999", plugin, ACRE_BAD_VALUE, "this machine has ");
  refused("cuda", NULL, ACRE_UNSUPPORTED, "nvcc");
  refused("cuda", "no/such/file.so", ACRE_UNSUPPORTED, "no/such/file.so");
  refused("cuda", ACRE_TEST_CUDA "/libcublasLt.so.13", ACRE_UNSUPPORTED,
          "of version unknown");
}

/* ---------------------------------------------------------------- one model, two devices */

enum { CONTEXT = 120, QUESTION = 7, TOKENS = 6 };

typedef struct answer {
  int32_t tokens[TOKENS];
  float logits[TINY_VOCAB];
} answer;

/* The cache on the other device, as a file would carry it there. */
static acre_cache *carried(const acre_cache *cache, acre_model *model, acre_dtype dtype,
                           acre_error *error) {
  acre_cache_parts parts = {.struct_size = sizeof parts};
  const acre_plan *plan = acre_cache_plan(cache);
  int64_t rows[3] = {plan->m, plan->l2_tokens, plan->recent};
  size_t row = 16 * acre_dtype_size(dtype);
  parts.options = tiny_options(acre_cache_proxy(cache));
  parts.n = plan->n, parts.ids = acre_cache_ids(cache);
  for (int part = 0; part < 6; part++) {
    size_t size = (size_t)(rows[part / 2] * TINY_LAYERS) * row;
    char *bytes = malloc(size + 1);
    int64_t pages = part / 2 == 1 ? acre_cache_pages(cache) : 1;
    for (int64_t at = 0; at < TINY_LAYERS * pages; at++) {
      acre_array view;
      acre_buffer *owner;
      int64_t first, layer = at / pages;
      CHECK(acre_cache_view(cache, (acre_part)part, layer, at % pages, &view, &first,
                            &owner, error) == ACRE_OK);
      memcpy(bytes + (size_t)(layer * rows[part / 2] + first) * row, view.data,
             (size_t)view.shape[0] * row);
      acre_buffer_release(owner);
    }
    acre_buffer_wrap(&parts.blocks[part], bytes, size + 1, free, bytes, NULL);
  }
  acre_cache *out = NULL;
  CHECK(acre_cache_restore(&out, model, &parts, error) == ACRE_OK);
  for (int part = 0; part < 6; part++) acre_buffer_release(parts.blocks[part]);
  return out;
}

/* Read with one model and asked with another, the same on another device or itself. */
static void ask(answer *out, acre_model *model, acre_model *asked, acre_proxy proxy) {
  acre_build_options build = tiny_options(proxy);
  int32_t ids[CONTEXT], question[QUESTION];
  acre_error error = {0};
  tiny_ids(ids, CONTEXT, 21), tiny_ids(question, QUESTION, 3);
  acre_cache *cache = tiny_build(model, &build, NULL, 0, ids, CONTEXT, &error);
  CHECK(cache != NULL);
  if (cache && asked != model) {
    acre_cache *here = carried(cache, asked, acre_model_get_config(model)->dtype, &error);
    acre_cache_release(cache);
    cache = here;
  }
  if (cache)
    CHECK(tiny_ask(asked, cache, question, QUESTION, 24, out->tokens, TOKENS, out->logits,
                   &error) == ACRE_OK);
  if (error.message[0]) fprintf(stderr, "  %s\n", error.message);
  acre_cache_release(cache);
}

static acre_example example_of(int32_t *ids, acre_question *question, int32_t *asked,
                               uint8_t *evidence, const int64_t *intervals) {
  acre_example e = acre_example_default();
  tiny_ids(ids, 70, 5), tiny_ids(asked, 9, 6);
  memset(evidence, 0, 70);
  evidence[20] = 1;
  *question = (acre_question){asked, 9, NULL, evidence, 2, 6};
  e.ids = ids, e.n = 70;
  e.window = 24, e.stride = 16, e.carry = 5;
  e.intervals = intervals, e.windows = 4;
  e.questions = question, e.question_count = 1, e.evidence_weight = 3.0;
  return e;
}

/* Two steps of training; *loss of each example, and the parameters behind them. */
static float *learn(acre_model *model, double loss[2], int64_t *size) {
  static const int64_t intervals[4] = {4, 2, 8, 3};
  int32_t ids[70], asked[9];
  uint8_t evidence[70];
  acre_question question;
  acre_example example = example_of(ids, &question, asked, evidence, intervals);
  acre_adamw adamw = acre_adamw_default();
  acre_error error = {0};
  acre_trainer *trainer = NULL;
  acre_status status = acre_trainer_open(&trainer, model, &error);
  for (int step = 0; status == ACRE_OK && step < 2; step++) {
    int64_t done = 0, total = 1;
    double norm;
    acre_example_result result = {0};
    status = acre_trainer_begin(trainer, &example, true, &error);
    while (status == ACRE_OK && done < total)
      status = acre_trainer_step(trainer, &done, &total, &error);
    if (status == ACRE_OK) status = acre_trainer_result(&result, trainer, &error);
    adamw.step = step + 1, adamw.lr = 0.01;
    if (status == ACRE_OK)
      status = acre_trainer_update(trainer, &adamw, 70, 1.0, &norm, &error);
    loss[step] = result.loss;
  }
  *size = trainer ? acre_trainer_size(trainer) : 0;
  float *parameters = calloc((size_t)*size + 1, sizeof *parameters);
  if (status == ACRE_OK)
    status = acre_trainer_read(parameters, trainer, ACRE_PARAMETERS, &error);
  CHECK(status == ACRE_OK);
  if (status != ACRE_OK) fprintf(stderr, "  %s\n", error.message);
  acre_trainer_release(trainer);
  return parameters;
}

static double most_apart(const float *a, const float *b, int64_t n) {
  double most = 0.0;
  for (int64_t i = 0; i < n; i++) {
    double apart = fabs((double)a[i] - b[i]);
    most = apart > most || isnan(apart) ? apart : most;
  }
  return most;
}

static void same_answers(const answer *a, const answer *b, acre_dtype dtype) {
  bool same = memcmp(a->tokens, b->tokens, sizeof a->tokens) == 0;
  if (dtype == ACRE_F32) CHECK(same);
  if (same)
    CHECK(most_apart(a->logits, b->logits, TINY_VOCAB) <=
          (dtype == ACRE_F32 ? 1e-4 : 0.15));
}

/* float32 answers are the same and logits near; bf16 rounds differently now and then. A
 * gradient near 0 may turn, and with it a whole step of the two. */
static void test_dtype(acre_engine *engines[2], acre_dtype dtype, acre_proxy proxy) {
  acre_error error = {0};
  acre_model *models[2];
  answer first, other;
  float *parameters[2];
  double loss[2][2], bound = dtype == ACRE_F32 ? 1e-5 : 0.015;
  int64_t size[2];
  for (int i = 0; i < 2; i++) {
    models[i] = tiny_model(engines[i], dtype, proxy == ACRE_PROXY_TRAINED, &error);
    CHECK(models[i] != NULL);
    parameters[i] = learn(models[i], loss[i], &size[i]);
  }
  ask(&first, models[0], models[0], proxy);
  for (int way = 1; way < 4; way++) { /* where it is read, and where asked */
    ask(&other, models[way / 2], models[way % 2], proxy);
    same_answers(&first, &other, dtype);
  }
  for (int step = 0; step < 2; step++)
    CHECK(fabs(loss[0][step] - loss[1][step]) <= bound * loss[0][step]);
  CHECK(size[0] == size[1] && most_apart(parameters[0], parameters[1], size[0]) <= 0.045);
  for (int i = 0; i < 2; i++) acre_model_release(models[i]), free(parameters[i]);
}

int main(void) {
  acre_error error = {0};
  acre_engine *cpu, *cuda;
#ifndef __SANITIZE_ADDRESS__ /* which sees more of memory that it gave itself */
  setenv("ACRE_HOST_APART", "1", 1);
#endif
  test_refusals();
  CHECK(open_engine(&cpu, "cpu", NULL, &error) == ACRE_OK);
  CHECK(open_engine(&cuda, "cuda:0", plugin_file(), &error) == ACRE_OK);
  if (!cuda) fprintf(stderr, "  %s\n", error.message);
  if (cpu && cuda) {
    CHECK(getenv("ACRE_TEST_PLUGIN") || strcmp(acre_engine_isa(cuda), "sm_80") == 0);
    CHECK(strcmp(acre_engine_device(cuda), "cuda:0") == 0);
    CHECK(strcmp(acre_engine_device(cpu), "cpu") == 0);
    acre_engine *engines[2] = {cpu, cuda};
    for (int i = 0; i < 4; i++)
      test_dtype(engines, i / 2 ? ACRE_BF16 : ACRE_F32, (acre_proxy)(i % 2));
    CHECK(acre_engine_peak_bytes(cuda) > 0);
  }
  acre_engine_release(cpu), acre_engine_release(cuda);
  return check_report();
}
