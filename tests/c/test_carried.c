/* What carries the tests of operations to a device (carried.h): it gives the bits that the
 * table behind it gives, and finds a device that writes beside its output or into its input,
 * leaves an element unwritten, or fails. */
#include "carried.h"
#include "check.h"
#include "platform.h"

#include <sys/wait.h>
#include <unistd.h>

enum { ROWS = 5, WIDTH = 7 };

static acre_backend *cpu, *carrying;
static acre_queue *queue, *carrying_queue;
static void (*right_rmsnorm)(acre_queue *, void *, const float *, const float *, double,
                             int64_t, int64_t, acre_dtype);

/* ---------------------------------------------------------------- faults of a device */

static int64_t fault_at; /* of bytes from y */

static void writes_beside(acre_queue *q, void *y, const float *x, const float *gain,
                          double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  right_rmsnorm(q, y, x, gain, eps, rows, width, dtype);
  ((char *)y)[fault_at] = 1;
}

static void writes_input(acre_queue *q, void *y, const float *x, const float *gain,
                         double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  right_rmsnorm(q, y, x, gain, eps, rows, width, dtype);
  ((float *)x)[ROWS * WIDTH - 1] += 1.0f;
}

static void leaves_last(acre_queue *q, void *y, const float *x, const float *gain,
                        double eps, int64_t rows, int64_t width, acre_dtype dtype) {
  right_rmsnorm(q, y, x, gain, eps, rows - 1, width, dtype);
}

static acre_status failing_sync(acre_queue *q, acre_error *error) {
  (void)q;
  snprintf(error->message, sizeof error->message, "the device failed");
  return error->status = ACRE_DEVICE;
}

/* ---------------------------------------------------------------- tests */

static void fill(float *x, int64_t n, uint64_t seed) {
  for (int64_t i = 0; i < n; i++) x[i] = random_float(&seed);
}

/* The last of y's bits where it was NaN. */
static void norm(float *y, acre_backend *b, acre_queue *q) {
  float x[ROWS * WIDTH], gain[WIDTH];
  fill(x, ROWS * WIDTH, 1), fill(gain, WIDTH, 2);
  memset(y, 0xff, ROWS * WIDTH * sizeof *y);
  b->ops->rmsnorm(q, y, x, gain, 1e-5, ROWS, WIDTH, ACRE_F32);
}

/* Whether a process of its own ends with 1, as it does where the carrier finds something. */
static bool found(void) {
  fflush(NULL);
  pid_t child = fork();
  if (child == 0) {
    float y[ROWS * WIDTH];
    if (!freopen("/dev/null", "w", stderr)) _exit(2);
    norm(y, carrying, carrying_queue);
    _exit(0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 1;
}

static void test_faults(void) {
  static const int64_t beside[] = {-CARRIED_EDGE, -1, ROWS * WIDTH * 4,
                                   ROWS * WIDTH * 4 + CARRIED_EDGE - 1};
  const acre_backend_ops *ops = cpu->ops;
  acre_backend_ops faulty = *ops;
  right_rmsnorm = ops->rmsnorm;
  cpu->ops = &faulty;
  CHECK(!found());
  faulty.rmsnorm = writes_beside;
  for (int i = 0; i < 4; i++) {
    fault_at = beside[i];
    CHECK(found());
  }
  faulty.rmsnorm = writes_input;
  CHECK(found());
  faulty.rmsnorm = ops->rmsnorm, faulty.sync = failing_sync;
  CHECK(found());
  faulty.sync = ops->sync, faulty.rmsnorm = leaves_last;
  float y[ROWS * WIDTH];
  norm(y, carrying, carrying_queue);
  uint32_t bits;
  memcpy(&bits, &y[ROWS * WIDTH - 1], sizeof bits);
  CHECK(bits == 0xffffffff); /* the poison came back */
  cpu->ops = ops;
}

static void test_same_bits(void) {
  float a[ROWS * WIDTH], b[ROWS * WIDTH];
  norm(a, cpu, queue), norm(b, carrying, carrying_queue);
  CHECK(memcmp(a, b, sizeof a) == 0);

  /* Many spans, and few: the destination's gap stays. */
  uint8_t from[40 * 3], to[2][64 * 3];
  acre_span spans[12];
  for (int i = 0; i < 120; i++) from[i] = (uint8_t)i;
  for (int count = 2; count <= 12; count += 10) {
    for (int i = 0; i < count; i++) spans[i] = (acre_span){from + 9 * i, 5 * i, 1 + i % 3};
    memset(to, 0xee, sizeof to);
    cpu->ops->copy_rows(queue, to[0], spans, count, 3);
    carrying->ops->copy_rows(carrying_queue, to[1], spans, count, 3);
    CHECK(memcmp(to[0], to[1], sizeof to[0]) == 0 && to[1][4 * 3] == 0xee);
  }

  /* In place: one array there, too. */
  float angles[2 * 10], keys[2][ROWS * 4];
  acre_heads heads = {1, 1, 4, ACRE_F32};
  fill(angles, 20, 3), fill(keys[0], ROWS * 4, 4);
  memcpy(keys[1], keys[0], sizeof keys[0]);
  cpu->ops->rotate(queue, keys[0], keys[0], angles, angles + 10, 0, ROWS, &heads);
  carrying->ops->rotate(carrying_queue, keys[1], keys[1], angles, angles + 10, 0, ROWS,
                        &heads);
  CHECK(memcmp(keys[0], keys[1], sizeof keys[0]) == 0);
}

int main(void) {
  acre_error error = {0};
  CHECK(acre_cpu_backend_open(&cpu, 1, "scalar", &error) == ACRE_OK);
  carrying = carried_wrap(cpu);
  CHECK(cpu->ops->queue_open(cpu, &queue, &error) == ACRE_OK);
  CHECK(carrying->ops->queue_open(carrying, &carrying_queue, &error) == ACRE_OK);
  CHECK(carrying->ops->available(carrying) > 0);
  test_same_bits();
  test_faults();
  acre_backend *none;
  CHECK(carried_open(&none, "no/such/file.so", "", 0, 0, &error) == ACRE_UNSUPPORTED &&
        strstr(error.message, "no/such/file.so"));
  cpu->ops->queue_close(queue);
  carrying->ops->queue_close(carrying_queue);
  carrying->ops->destroy(carrying);
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
