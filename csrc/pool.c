/* Worker threads that share one loop at a time: tasks are claimed by an atomic counter.
 *
 * One idea: a loop is a gate. Opening it publishes the job; a worker enters (inside +=
 * 1), looks whether the gate is open, and only then reads the job; the caller closes
 * the gate when the tasks are all claimed and waits for inside == 0. So nobody reads a
 * job that has ended, and a worker that wakes too late costs nothing. A decode step
 * starts hundreds of short loops: idle workers spin for a moment before they sleep. */
#include "pool.h"

#include "platform.h"

#define SPIN_SECONDS 40e-6
#define SPIN_TURNS 64 /* turns between two looks at the clock */

typedef struct worker {
  acre_pool *pool;
  acre_thread *thread;
  int32_t index;
} worker;

/* Words that different threads write lie on lines of their own. */
struct acre_pool {
  _Alignas(ACRE_ALIGN) _Atomic uint32_t epoch;  /* changes when a loop starts or all stop */
  _Atomic uint32_t sleepers;                    /* workers about to sleep on epoch */
  _Alignas(ACRE_ALIGN) _Atomic int64_t next;    /* first task not yet claimed */
  _Alignas(ACRE_ALIGN) _Atomic uint32_t inside; /* workers between entry and exit */
  _Atomic uint32_t waiting;                     /* the caller is about to sleep on inside */
  _Alignas(ACRE_ALIGN) _Atomic bool open;       /* the job below may be read */
  _Atomic bool busy;                            /* a caller owns the pool */
  _Atomic bool stop;
  acre_task task;
  void *context;
  int64_t count;
  int32_t threads; /* the caller included */
  int32_t started; /* workers that exist */
  bool spin;       /* a core for each thread: waiting may burn it */
  worker workers[];
};

static void work(acre_pool *pool, int32_t index) {
  int64_t count = pool->count;
  for (;;) {
    int64_t i = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
    if (i >= count) return;
    pool->task(pool->context, i, index);
  }
}

/* Spins for a moment while *word == value; false if it still does. */
static bool spin_while(const acre_pool *pool, _Atomic uint32_t *word, uint32_t value) {
  if (atomic_load(word) != value) return true;
  if (!pool->spin) return false;
  double end = acre_clock() + SPIN_SECONDS;
  do {
    for (int turn = 0; turn < SPIN_TURNS; turn++) {
      if (atomic_load_explicit(word, memory_order_acquire) != value) return true;
      acre_pause();
    }
  } while (acre_clock() < end);
  return false;
}

static void await_epoch(acre_pool *pool, uint32_t seen) {
  if (spin_while(pool, &pool->epoch, seen)) return;
  atomic_fetch_add(&pool->sleepers, 1);
  while (atomic_load(&pool->epoch) == seen) acre_wait(&pool->epoch, seen);
  atomic_fetch_sub(&pool->sleepers, 1);
}

static void leave(acre_pool *pool) {
  if (atomic_fetch_sub(&pool->inside, 1) == 1 && atomic_load(&pool->waiting))
    acre_wake(&pool->inside, 1);
}

static void worker_main(void *context) {
  worker *self = context;
  acre_pool *pool = self->pool;
  uint32_t seen = 0;
  for (;;) {
    await_epoch(pool, seen);
    seen = atomic_load(&pool->epoch);
    if (atomic_load(&pool->stop)) return;
    atomic_fetch_add(&pool->inside, 1);
    if (atomic_load(&pool->open)) work(pool, self->index);
    leave(pool);
  }
}

static void await_empty(acre_pool *pool) {
  uint32_t inside;
  while ((inside = atomic_load(&pool->inside)) != 0) {
    if (spin_while(pool, &pool->inside, inside)) continue;
    atomic_store(&pool->waiting, 1);
    inside = atomic_load(&pool->inside);
    if (inside != 0) acre_wait(&pool->inside, inside);
    atomic_store(&pool->waiting, 0);
  }
}

static void run_alone(acre_task task, void *context, int64_t count) {
  for (int64_t i = 0; i < count; i++) task(context, i, 0);
}

void acre_pool_run(acre_pool *pool, acre_task task, void *context, int64_t count) {
  if (count <= 0) return;
  if (count == 1 || pool->threads == 1 || atomic_exchange(&pool->busy, true)) {
    run_alone(task, context, count);
    return;
  }
  pool->task = task;
  pool->context = context;
  pool->count = count;
  atomic_store(&pool->next, 0);
  atomic_store(&pool->open, true);
  atomic_fetch_add(&pool->epoch, 1);
  if (atomic_load(&pool->sleepers))
    acre_wake(&pool->epoch, (int32_t)acre_min(count - 1, pool->started));
  work(pool, 0);
  atomic_store(&pool->open, false);
  await_empty(pool);
  atomic_store(&pool->busy, false);
}

acre_status acre_pool_open(acre_pool **out, int32_t threads, acre_error *error) {
  *out = NULL;
  if (threads < 1)
    return acre_fail(error, ACRE_BAD_VALUE, "threads is %d, expected at least 1", threads);
  size_t bytes = sizeof(acre_pool) + (size_t)threads * sizeof(worker);
  acre_pool *pool = acre_alloc_zero(bytes);
  if (!pool) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a thread pool");
  pool->threads = threads;
  pool->spin = threads <= acre_cpu_count();
  for (int32_t i = 0; i + 1 < threads; i++) {
    worker *self = &pool->workers[i];
    *self = (worker){.pool = pool, .index = i + 1};
    self->thread = acre_thread_new(worker_main, self);
    if (!self->thread) {
      acre_pool_close(pool);
      return acre_fail(error, ACRE_NO_MEMORY, "thread %d of %d could not be started", i + 2,
                       threads);
    }
    pool->started++;
  }
  *out = pool;
  return ACRE_OK;
}

void acre_pool_close(acre_pool *pool) {
  if (!pool) return;
  atomic_store(&pool->stop, true);
  atomic_fetch_add(&pool->epoch, 1);
  acre_wake(&pool->epoch, pool->started);
  for (int32_t i = 0; i < pool->started; i++) acre_thread_join(pool->workers[i].thread);
  acre_free(pool);
}

int32_t acre_pool_threads(const acre_pool *pool) { return pool->threads; }
