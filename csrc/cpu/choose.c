/* Choosing a token: the highest logits of a row, in an order that has no ties.
 *
 * A logit and its id become one integer that is larger for a higher logit and, of equals, for
 * the lower id, so that the k highest of them are the k highest, whatever the way there. */
#include "rows.h"

#include <math.h>

/* ---------------------------------------------------------------- keys */

/* Integers in the order of floats: -0 as 0, NaN below all. */
static uint32_t ordered(float x) {
  if (isnan(x)) return 0;
  uint32_t bits = acre_bits(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static uint64_t key_of(const float *logits, int64_t id) {
  return (uint64_t)ordered(logits[id]) << 32 | (uint32_t) ~(uint32_t)id;
}

static int32_t id_of(uint64_t key) { return (int32_t) ~(uint32_t)key; }

/* ---------------------------------------------------------------- the highest */

static void argmax_some(const rows_job *job, int64_t first, int64_t count) {
  for (int64_t i = first; i < first + count; i++) {
    const float *row = (const float *)job->x + i * job->vocab;
    uint64_t best = key_of(row, 0);
    for (int64_t id = 1; id < job->vocab; id++) {
      uint64_t key = key_of(row, id);
      best = key > best ? key : best;
    }
    ((int32_t *)job->y)[i] = id_of(best);
  }
}

void acre_cpu_argmax(acre_queue *queue, int32_t *id, const float *logits, int64_t rows,
                     int64_t vocab) {
  rows_job job = {.task = argmax_some, .rows = rows, .y = id, .x = logits, .vocab = vocab};
  acre_cpu_run_rows(queue, &job, vocab);
}

/* ---------------------------------------------------------------- the k highest */

/* heap[at] sinks to its place among `count`, the lowest key on top. */
static void sink(uint64_t *heap, int64_t at, int64_t count) {
  uint64_t key = heap[at];
  for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && heap[child + 1] < heap[child]) child++;
    if (heap[child] >= key) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = key;
}

void acre_cpu_top(acre_queue *queue, float *values, int32_t *ids, float *mass,
                  const float *logits, int64_t vocab, int64_t k, float scale) {
  (void)queue;
  uint64_t heap[ACRE_TOP_MOST];
  for (int64_t id = 0; id < k; id++) heap[id] = key_of(logits, id);
  for (int64_t at = k / 2; at-- > 0;) sink(heap, at, k);
  for (int64_t id = k; id < vocab; id++) {
    uint64_t key = key_of(logits, id);
    if (key < heap[0]) continue;
    heap[0] = key;
    sink(heap, 0, k);
  }
  for (int64_t left = k; left > 0; left--) { /* the lowest one last */
    ids[left - 1] = id_of(heap[0]);
    values[left - 1] = logits[ids[left - 1]];
    heap[0] = heap[left - 1];
    sink(heap, 0, left - 1);
  }
  double sum = 0;
  for (int64_t id = 0; id < vocab; id++)
    if (logits[id] > -INFINITY)
      sum += exp((double)scale * ((double)logits[id] - values[0]));
  *mass = (float)sum;
}

void acre_cpu_penalize(acre_queue *queue, float *logits, const int32_t *ids, int64_t count,
                       float penalty) {
  (void)queue;
  for (int64_t i = 0; i < count; i++) {
    float *x = &logits[ids[i]];
    *x = *x > 0 ? *x / penalty : *x * penalty;
  }
}
