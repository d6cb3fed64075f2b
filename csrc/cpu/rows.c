/* The loop behind rows.h. */
#include "rows.h"

#define GRAIN 16384 /* elements that are worth a task */

static void run_some_rows(void *context, int64_t index, int32_t worker) {
  (void)worker;
  const rows_job *job = context;
  int64_t first = index * job->step;
  job->task(job, first, acre_min(job->step, job->rows - first));
}

void acre_cpu_run_steps(acre_queue *queue, rows_job *job) {
  if (job->rows <= 0) return;
  job->kernels = queue->kernels;
  job->T = &queue->kernels->of[job->dtype];
  acre_pool_run(queue->pool, run_some_rows, job, acre_ceil_div(job->rows, job->step));
}

void acre_cpu_run_rows(acre_queue *queue, rows_job *job, int64_t row_cost) {
  int64_t threads = acre_pool_threads(queue->pool);
  int64_t even = acre_ceil_div(job->rows, 4 * threads);
  job->step = acre_max(even, acre_ceil_div(GRAIN, acre_max(row_cost, 1)));
  acre_cpu_run_steps(queue, job);
}
