/* A pool of worker threads that runs one parallel loop at a time.
 *
 * The caller works too. A loop started while another thread's loop runs is done by its caller
 * alone, so sessions never wait for each other. Results never depend on the thread count:
 * tasks are independent and each writes its own part. */
#ifndef ACRE_POOL_H
#define ACRE_POOL_H

#include "status.h"

typedef struct acre_pool acre_pool;

/* `worker` is 0..threads-1, for per-thread scratch; it is 0 for a lone caller, so scratch
 * belongs to (queue, worker), never to the pool. */
typedef void (*acre_task)(void *context, int64_t index, int32_t worker);

acre_status acre_pool_open(acre_pool **out, int32_t threads, acre_error *error);
void acre_pool_close(acre_pool *pool); /* no loop may be running */
int32_t acre_pool_threads(const acre_pool *pool);

/* task(context, i, worker) for every i in [0, count), each once; returns when all are done. */
void acre_pool_run(acre_pool *pool, acre_task task, void *context, int64_t count);

#endif
