/* The only seam to the operating system: memory, threads, clocks. */
#ifndef ACRE_PLATFORM_H
#define ACRE_PLATFORM_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#else
#include <stdatomic.h>
#endif

/* Aligned to ACRE_ALIGN. Freed by acre_free. NULL where memory is short. */
void *acre_alloc(size_t bytes);
void *acre_alloc_zero(size_t bytes); /* untouched pages cost nothing */
void acre_free(void *memory);

/* Tests only: the n-th allocation from now fails (1 = next; 0 = never). */
void acre_alloc_fail_at(int64_t n);
int64_t acre_alloc_live(void); /* allocations not yet freed */

int32_t acre_cpu_count(void);       /* usable by this process */
size_t acre_memory_available(void); /* bytes of the host not yet taken; 0 = unknown */
double acre_clock(void);            /* seconds, monotonic */

typedef struct acre_mutex acre_mutex;
acre_mutex *acre_mutex_new(void);
void acre_mutex_free(acre_mutex *mutex);
void acre_mutex_lock(acre_mutex *mutex);
bool acre_mutex_try(acre_mutex *mutex);
void acre_mutex_unlock(acre_mutex *mutex);

/* Threads start with every signal blocked: handlers stay with the program's own
 * threads. */
typedef struct acre_thread acre_thread;
acre_thread *acre_thread_new(void (*run)(void *context), void *context); /* or NULL */
void acre_thread_join(acre_thread *thread); /* waits for its end and frees it */

void acre_pause(void);           /* one turn of a spin loop */
void acre_sleep(double seconds); /* may wake early */
#ifndef __cplusplus              /* which has no _Atomic */
/* Sleeps while *word == value (may return early); wakes up to n who sleep on it. */
void acre_wait(_Atomic uint32_t *word, uint32_t value);
void acre_wake(_Atomic uint32_t *word, int32_t n);
#endif

#ifdef __cplusplus
}
#endif
#endif
