/* The pool: every task once, whatever the thread counts, sleeping or spinning workers,
 * loops from several threads at a time, loops within loops; opening that fails
 * half-way. */
#include "check.h"

#include "platform.h"
#include "pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TASKS 1000

typedef struct job {
  acre_pool *pool;
  int64_t plain[TASKS]; /* each written by one task only: a race shows under tsan */
  int64_t before;       /* written by the caller, read by tasks */
  _Atomic int64_t total;
  _Atomic int32_t highest;
} job;

static void count_task(void *context, int64_t index, int32_t worker) {
  job *j = context;
  j->plain[index] += j->before;
  atomic_fetch_add(&j->total, 1);
  int32_t highest = atomic_load(&j->highest);
  while (worker > highest && !atomic_compare_exchange_weak(&j->highest, &highest, worker)) {
  }
}

static void run_and_check(acre_pool *pool, job *j, int64_t count) {
  memset(j->plain, 0, sizeof j->plain);
  atomic_store(&j->total, 0);
  j->before = count + 1;
  acre_pool_run(pool, count_task, j, count);
  int64_t right = 0;
  for (int64_t i = 0; i < TASKS; i++) right += j->plain[i] == (i < count ? count + 1 : 0);
  CHECK(right == TASKS);
  CHECK(atomic_load(&j->total) == count);
}

static void test_counts(int32_t threads) {
  acre_pool *pool;
  job *j = calloc(1, sizeof *j);
  CHECK(acre_pool_open(&pool, threads, NULL) == ACRE_OK);
  CHECK(acre_pool_threads(pool) == threads);
  for (int64_t count = 0; count < 40; count++) run_and_check(pool, j, count);
  run_and_check(pool, j, TASKS);
  for (int i = 0; i < 2000; i++) run_and_check(pool, j, 1 + i % 5);
  CHECK(j->highest < threads);
  acre_pool_close(pool);
  free(j);
}

/* Workers asleep: long pauses between loops. */
static void test_sleep(void) {
  acre_pool *pool;
  job *j = calloc(1, sizeof *j);
  struct timespec pause = {0, 2000000};
  CHECK(acre_pool_open(&pool, 4, NULL) == ACRE_OK);
  for (int i = 0; i < 30; i++) {
    nanosleep(&pause, NULL);
    run_and_check(pool, j, 100);
  }
  nanosleep(&pause, NULL);
  acre_pool_close(pool);
  free(j);
}

static void slow_task(void *context, int64_t index, int32_t worker) {
  struct timespec pause = {0,
                           index ? 100 : 3000000}; /* one task keeps the others waiting */
  nanosleep(&pause, NULL);
  count_task(context, index, worker);
}

/* The caller finishes first and must wait, beyond its spinning, for a slow worker. */
static void test_slow_worker(void) {
  acre_pool *pool;
  job *j = calloc(1, sizeof *j);
  CHECK(acre_pool_open(&pool, 2, NULL) == ACRE_OK);
  for (int i = 0; i < 20; i++) {
    atomic_store(&j->total, 0);
    acre_pool_run(pool, slow_task, j, 3);
    CHECK(atomic_load(&j->total) == 3);
  }
  acre_pool_close(pool);
  free(j);
}

static void *caller(void *context) {
  acre_pool *pool = context;
  job *j = calloc(1, sizeof *j);
  for (int i = 0; i < 500; i++) run_and_check(pool, j, 1 + i % 60);
  free(j);
  return NULL;
}

static void test_callers(int32_t threads) {
  acre_pool *pool;
  pthread_t callers[8];
  CHECK(acre_pool_open(&pool, threads, NULL) == ACRE_OK);
  for (int i = 0; i < 8; i++) CHECK(!pthread_create(&callers[i], NULL, caller, pool));
  for (int i = 0; i < 8; i++) pthread_join(callers[i], NULL);
  acre_pool_close(pool);
}

static void nested_task(void *context, int64_t index, int32_t worker) {
  job *outer = context;
  job *inner = calloc(1, sizeof *inner);
  acre_pool_run(outer->pool, count_task, inner, 7);
  atomic_fetch_add(&outer->total, atomic_load(&inner->total));
  free(inner);
  (void)index, (void)worker;
}

static void test_nested(void) {
  job *j = calloc(1, sizeof *j);
  CHECK(acre_pool_open(&j->pool, 3, NULL) == ACRE_OK);
  acre_pool_run(j->pool, nested_task, j, 50);
  CHECK(atomic_load(&j->total) == 350);
  acre_pool_close(j->pool);
  free(j);
}

static void test_open(void) {
  acre_pool *pool;
  acre_error error;
  CHECK(acre_pool_open(&pool, 0, &error) == ACRE_BAD_VALUE && !pool);
  int64_t live = acre_alloc_live();
  for (int64_t n = 1; n <= 4; n++) { /* the pool, then each of three workers */
    acre_alloc_fail_at(n);
    CHECK(acre_pool_open(&pool, 4, &error) == ACRE_NO_MEMORY && !pool);
    CHECK(acre_alloc_live() == live);
  }
  acre_alloc_fail_at(0);
  for (int i = 0; i < 50; i++) { /* closed before the workers have begun */
    CHECK(acre_pool_open(&pool, 8, NULL) == ACRE_OK);
    acre_pool_close(pool);
  }
  acre_pool_close(NULL);
}

int main(void) {
  test_open();
  for (int32_t threads = 1; threads <= 8; threads++) test_counts(threads);
  test_sleep();
  test_slow_worker();
  test_callers(2);
  test_callers(8);
  test_nested();
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
