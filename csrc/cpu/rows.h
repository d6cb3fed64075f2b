/* Work shared out by rows, in pieces that are worth a thread's attention. A row is always
 * computed by one thread, so results do not depend on threads. */
#ifndef ACRE_CPU_ROWS_H
#define ACRE_CPU_ROWS_H

#include "cpu.h"

typedef struct rows_job rows_job;

/* Does rows [first, first + count). */
typedef void (*rows_task)(const rows_job *job, int64_t first, int64_t count);

/* The arguments of any operation on rows; each uses its own. */
struct rows_job {
  rows_task task;
  int64_t rows, step;
  const acre_kernels *kernels;
  const acre_typed *T; /* of dtype */
  void *y, *raw, *values;
  const void *x, *table, *other;
  const int32_t *index;
  const float *gain, *cos, *sin;
  double eps;
  int64_t width, y_stride, x_stride, position, vocab, heads, head_dim;
  size_t bytes;
  acre_dtype dtype;
};

/* Fills in kernels and T and runs the task on all rows: `step` of them at a time, or as many
 * as are worth a task where `row_cost` is the elements of one. */
void acre_cpu_run_steps(acre_queue *queue, rows_job *job);
void acre_cpu_run_rows(acre_queue *queue, rows_job *job, int64_t row_cost);

#endif
