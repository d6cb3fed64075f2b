/* The operations at the sizes of real models, which the benchmarks time: right within
 * their bounds on every table that this processor can run, and on the device of a plug-in. */
#include "backends.h"
#include "cases.h"

static void test_case(const op_case *c, int i) {
  op_work work = case_open(c, backends[i], queues[i]);
  bool right = case_check(&work);
  CHECK(right);
  if (!right) {
    char name[80];
    case_name(name, sizeof name, c);
    fprintf(stderr, "  %s: %s\n", backends[i]->isa, name);
  }
  case_close(&work);
}

static void test_cases(int i, bool heavy) {
  for (int64_t n = 0; n < ACRE_COUNT(model_cases); n++) {
    if (model_cases[n].heavy && !heavy) continue;
    op_case c = model_cases[n].op;
    for (int dtype = 0; dtype < 2; dtype++) {
      c.dtype = (acre_dtype)dtype;
      test_case(&c, i);
    }
    if (c.kind != OP_MATMUL && c.kind != OP_SWIGLU) continue;
    c.weights = ACRE_WEIGHTS_Q8;
    test_case(&c, i);
  }
}

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 9)) return 1;
  bool light = getenv("ACRE_TEST_LIGHT") != NULL;
  if (plugin_under_test()) {
    for (int i = exact_count; i < backend_count; i++) test_cases(i, !light);
  } else {
    for (int i = 1; i < exact_count; i += 2) /* three threads */
      test_cases(i, i > 1);                  /* the first is the scalar table */
  }
  close_backends();
  return check_report();
}
