/* The trainer in C: states, memory that runs out at every allocation, and that it learns. What
 * its gradients are is tests/test_gradients.py's. */
#include "platform.h"
#include "tiny.h"

#include <math.h>

enum { TOKENS = 70, ASKED = 9, WINDOWS = 4, QUESTIONS = 2 };

/* One example of every feature. */
typedef struct lesson {
  int32_t ids[TOKENS], asked[QUESTIONS][ASKED];
  uint8_t evidence[TOKENS];
  int64_t intervals[WINDOWS];
  acre_question questions[QUESTIONS];
  acre_example example;
} lesson;

static void make_lesson(lesson *l) {
  tiny_ids(l->ids, TOKENS, 5);
  memset(l->evidence, 0, sizeof l->evidence);
  l->evidence[20] = 1;
  const int64_t intervals[WINDOWS] = {4, 2, 8, 3};
  memcpy(l->intervals, intervals, sizeof intervals);
  l->example = acre_example_default();
  l->example.ids = l->ids, l->example.n = TOKENS;
  l->example.window = 24, l->example.stride = 16, l->example.carry = 5;
  l->example.intervals = l->intervals, l->example.windows = WINDOWS;
  for (int i = 0; i < QUESTIONS; ++i) {
    tiny_ids(l->asked[i], ASKED, 6 + (uint64_t)i);
    l->questions[i] = (acre_question){.ids = l->asked[i], .t = ASKED - i};
  }
  l->questions[0].evidence = l->evidence;
  l->questions[0].first = 2, l->questions[0].last = 6;
  l->example.questions = l->questions, l->example.question_count = QUESTIONS;
  l->example.evidence_weight = 3.0;
}

/* Forward and backward; on success the result is in *out. */
static acre_status learn(acre_trainer *trainer, const acre_example *example,
                         acre_example_result *out, acre_error *error) {
  int64_t done = 0, total = 1;
  acre_status status = acre_trainer_begin(trainer, example, true, error);
  while (status == ACRE_OK && done < total) {
    status = acre_trainer_step(trainer, &done, &total, error);
  }
  return status == ACRE_OK ? acre_trainer_result(out, trainer, error) : status;
}

static acre_status update(acre_trainer *trainer, int64_t step, acre_error *error) {
  acre_adamw adamw = acre_adamw_default();
  double norm;
  adamw.step = step, adamw.lr = 0.01;
  return acre_trainer_update(trainer, &adamw, 70, 1.0, &norm, error);
}

static acre_model *open_model(acre_engine **engine, bool trained, acre_error *error) {
  acre_engine_options options = acre_engine_options_default();
  options.threads = 1;
  if (acre_engine_open(engine, &options, error) != ACRE_OK) return NULL;
  return tiny_model(*engine, ACRE_F32, trained, error);
}

/* Every allocation fails once: an error each time, nothing kept, and the trainer works on. */
static void test_memory_that_runs_out(bool trained) {
  bool finished = false;
  lesson l;
  make_lesson(&l);
  for (int64_t n = 1; !finished && n < 5000; ++n) {
    int64_t live = acre_alloc_live();
    acre_error error = {0};
    acre_engine *engine = NULL;
    acre_trainer *trainer = NULL;
    acre_example_result result;
    acre_model *model = NULL;
    acre_status status = ACRE_NO_MEMORY;
    acre_alloc_fail_at(n);
    model = open_model(&engine, trained, &error);
    if (model) status = acre_trainer_open(&trainer, model, &error);
    if (status == ACRE_OK) status = learn(trainer, &l.example, &result, &error);
    if (status == ACRE_OK) status = update(trainer, 1, &error);
    acre_alloc_fail_at(0);
    finished = status == ACRE_OK;
    CHECK(finished || error.status == ACRE_NO_MEMORY);
    if (trainer) CHECK(learn(trainer, &l.example, &result, &error) == ACRE_OK);
    acre_model_release(model);
    acre_trainer_release(trainer); /* it holds what it needs */
    acre_engine_release(engine);
    CHECK(acre_alloc_live() == live);
  }
  CHECK(finished);
}

static void test_states(acre_model *model) {
  lesson l;
  acre_error error = {0};
  acre_trainer *trainer;
  acre_example_result result;
  acre_trainer_entry entry;
  int64_t done, total;
  make_lesson(&l);
  CHECK(acre_trainer_open(&trainer, model, &error) == ACRE_OK);
  CHECK(acre_trainer_step(trainer, &done, &total, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_result(&result, trainer, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_begin(trainer, &l.example, true, &error) == ACRE_OK);
  CHECK(acre_trainer_step(trainer, &done, &total, &error) == ACRE_OK);
  CHECK(done == 1 && total == 2 * (WINDOWS + QUESTIONS));
  CHECK(acre_trainer_result(&result, trainer, &error) == ACRE_BAD_STATE);
  CHECK(learn(trainer, &l.example, &result, &error) == ACRE_OK); /* begun anew */
  CHECK(acre_trainer_step(trainer, &done, &total, &error) == ACRE_OK && done == total);
  CHECK(acre_trainer_entry_at(&entry, trainer, acre_trainer_entries(trainer), &error) ==
        ACRE_BAD_VALUE);
  l.example.windows = 3;
  CHECK(acre_trainer_begin(trainer, &l.example, true, &error) == ACRE_BAD_VALUE);
  CHECK(acre_trainer_step(trainer, &done, &total, &error) == ACRE_BAD_STATE);
  acre_trainer_release(trainer);
}

/* The same example again and again: its loss falls, its evidence gains. */
static void test_learning(acre_model *model) {
  lesson l;
  acre_error error = {0};
  acre_trainer *trainer;
  acre_example_result first, last;
  make_lesson(&l);
  CHECK(acre_trainer_open(&trainer, model, &error) == ACRE_OK);
  CHECK(learn(trainer, &l.example, &first, &error) == ACRE_OK);
  for (int64_t step = 1; step <= 30; ++step) {
    CHECK(update(trainer, step, &error) == ACRE_OK);
    CHECK(learn(trainer, &l.example, &last, &error) == ACRE_OK);
  }
  CHECK(last.loss < 0.8 * first.loss);
  CHECK(last.evidence > 1.5 * first.evidence && last.evidence <= 1.0);
  CHECK(last.rows == first.rows && last.weight == first.weight);
  acre_trainer_release(trainer);
}

/* Any flag that is not zero counts, on the way there and back. */
static void test_flags_of_heads(acre_model *model) {
  lesson l;
  acre_error error = {0};
  acre_trainer *trainer;
  acre_example_result ones, others;
  uint8_t heads[TINY_LAYERS * 4] = {0};
  make_lesson(&l);
  l.example.heads = heads;
  CHECK(acre_trainer_open(&trainer, model, &error) == ACRE_OK);
  heads[2] = heads[5] = 1;
  CHECK(learn(trainer, &l.example, &ones, &error) == ACRE_OK);
  heads[2] = 4, heads[5] = 255;
  CHECK(learn(trainer, &l.example, &others, &error) == ACRE_OK);
  CHECK(ones.evidence > 0 && ones.evidence == others.evidence);
  acre_trainer_release(trainer);
}

int main(void) {
  acre_error error = {0};
  acre_engine *engine = NULL;
  test_memory_that_runs_out(false);
  test_memory_that_runs_out(true);
  acre_model *model = open_model(&engine, false, &error);
  CHECK(model != NULL);
  if (model) {
    test_states(model);
    test_learning(model);
    test_flags_of_heads(model);
  }
  acre_model_release(model);
  acre_engine_release(engine);
  return check_report();
}
