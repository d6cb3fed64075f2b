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

int main(int argc, char **argv) {
  if (!open_backends(argc, argv, 9)) return 1;
  bool plugin = plugin_under_test() != NULL; /* which on the host is slow, too */
  bool light = getenv("ACRE_TEST_LIGHT") != NULL;
  int end = plugin ? backend_count : exact_count;
  for (int i = plugin ? exact_count : 1; i < end; i += 2) /* three threads */
    for (int64_t n = 0; n < ACRE_COUNT(model_cases); n++) {
      if (model_cases[n].heavy && (plugin ? light : i == 1)) continue; /* the scalar table */
      op_case c = model_cases[n].op;
      for (int dtype = 0; dtype < 2; dtype++) {
        c.dtype = (acre_dtype)dtype;
        test_case(&c, i);
      }
      if (c.kind != OP_MATMUL && c.kind != OP_SWIGLU) continue;
      c.weights = ACRE_WEIGHTS_Q8;
      test_case(&c, i);
    }
  close_backends();
  return check_report();
}
