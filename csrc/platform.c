/* Memory, threads, clocks: Linux first, with POSIX fallbacks where Linux has its own
 * way.
 *
 * Every allocation is preceded by the pointer that the C library gave, so that aligned,
 * zeroed and plain blocks are freed alike. */
#include "platform.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

/* ---------------------------------------------------------------- memory */

static _Atomic int64_t live_allocations;
static _Atomic int64_t fail_countdown; /* tests only; 0 = never */

#define HUGE_PAGE ((size_t)2 << 20)

void acre_alloc_fail_at(int64_t n) { atomic_store(&fail_countdown, n); }

int64_t acre_alloc_live(void) { return atomic_load(&live_allocations); }

static bool must_fail(void) {
  if (atomic_load_explicit(&fail_countdown, memory_order_relaxed) <= 0) return false;
  return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

/* Large blocks on huge pages: weights and caches are streamed, and a 4 KiB page every
 * 60 lines costs a table walk each. Advice only, so its failure changes nothing. */
static void advise_huge(void *memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * HUGE_PAGE) return;
  uintptr_t first = ((uintptr_t)memory + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
  uintptr_t end = ((uintptr_t)memory + bytes) & ~(uintptr_t)(HUGE_PAGE - 1);
  if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

static void *allocate(size_t bytes, bool zero) {
  size_t extra = ACRE_ALIGN + sizeof(void *);
  if (bytes > SIZE_MAX / 2 || must_fail()) return NULL;
  void *given = zero ? calloc(1, bytes + extra) : malloc(bytes + extra);
  if (!given) return NULL;
  uintptr_t start = (uintptr_t)given + sizeof(void *);
  void **memory = (void **)((start + ACRE_ALIGN - 1) & ~(uintptr_t)(ACRE_ALIGN - 1));
  memory[-1] = given;
  advise_huge(memory, bytes);
  atomic_fetch_add(&live_allocations, 1);
  return memory;
}

void *acre_alloc(size_t bytes) { return allocate(bytes, false); }

void *acre_alloc_zero(size_t bytes) { return allocate(bytes, true); }

void acre_free(void *memory) {
  if (!memory) return;
  atomic_fetch_sub(&live_allocations, 1);
  free(((void **)memory)[-1]);
}

/* ---------------------------------------------------------------- machine */

/* Up to two numbers from the first line of a small text file; returns how many came. */
static int read_numbers(const char *path, long long *a, long long *b) {
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  int count = fscanf(file, "%lld %lld", a, b);
  fclose(file);
  return count < 0 ? 0 : count;
}

int32_t acre_cpu_count(void) {
  int64_t count = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
  long long quota, period; /* a container's share; "max" reads as no number */
  if (read_numbers("/sys/fs/cgroup/cpu.max", &quota, &period) == 2 && period > 0)
    count = acre_min(count, acre_ceil_div(quota, period));
#endif
  return (int32_t)acre_max(count, 1);
}

/* The number after `name` at the start of a line, or 0. */
static unsigned long long read_field(const char *path, const char *name) {
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  char line[128];
  unsigned long long value = 0;
  while (fgets(line, sizeof line, file))
    if (strncmp(line, name, strlen(name)) == 0)
      value = strtoull(line + strlen(name), NULL, 10);
  fclose(file);
  return value;
}

size_t acre_memory_available(void) {
  size_t available = (size_t)read_field("/proc/meminfo", "MemAvailable:") * 1024;
  long long limit, used, none;
  if (read_numbers("/sys/fs/cgroup/memory.max", &limit, &none) == 1 &&
      read_numbers("/sys/fs/cgroup/memory.current", &used, &none) == 1) {
    /* Pages of files that nobody maps count as used, and are dropped when wanted. */
    used -= (long long)read_field("/sys/fs/cgroup/memory.stat", "inactive_file ");
    size_t left = limit > used ? (size_t)(limit - used) : 0;
    if (left < available) available = left;
  }
  return available;
}

double acre_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---------------------------------------------------------------- mutex */

struct acre_mutex {
  pthread_mutex_t mutex;
};

acre_mutex *acre_mutex_new(void) {
  acre_mutex *mutex = acre_alloc_zero(sizeof *mutex);
  if (mutex && pthread_mutex_init(&mutex->mutex, NULL) != 0) {
    acre_free(mutex);
    return NULL;
  }
  return mutex;
}

void acre_mutex_free(acre_mutex *mutex) {
  if (!mutex) return;
  pthread_mutex_destroy(&mutex->mutex);
  acre_free(mutex);
}

void acre_mutex_lock(acre_mutex *mutex) { pthread_mutex_lock(&mutex->mutex); }

bool acre_mutex_try(acre_mutex *mutex) { return pthread_mutex_trylock(&mutex->mutex) == 0; }

void acre_mutex_unlock(acre_mutex *mutex) { pthread_mutex_unlock(&mutex->mutex); }

/* ---------------------------------------------------------------- threads */

struct acre_thread {
  pthread_t thread;
  void (*run)(void *context);
  void *context;
};

static void *thread_main(void *argument) {
  acre_thread *thread = argument;
  thread->run(thread->context);
  return NULL;
}

acre_thread *acre_thread_new(void (*run)(void *context), void *context) {
  acre_thread *thread = acre_alloc_zero(sizeof *thread);
  if (!thread) return NULL;
  thread->run = run;
  thread->context = context;
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int failed = pthread_create(&thread->thread, NULL, thread_main, thread);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (!failed) return thread;
  acre_free(thread);
  return NULL;
}

void acre_thread_join(acre_thread *thread) {
  if (!thread) return;
  pthread_join(thread->thread, NULL);
  acre_free(thread);
}

void acre_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void acre_sleep(double seconds) {
  struct timespec time = {(time_t)seconds,
                          (long)(1e9 * (seconds - (double)(time_t)seconds))};
  nanosleep(&time, NULL);
}

#ifdef __linux__

void acre_wait(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void acre_wake(_Atomic uint32_t *word, int32_t n) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

#else

/* One condition for every word: wakers wake all, sleepers look again. */
static pthread_mutex_t wait_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wait_condition = PTHREAD_COND_INITIALIZER;

void acre_wait(_Atomic uint32_t *word, uint32_t value) {
  pthread_mutex_lock(&wait_mutex);
  if (atomic_load(word) == value) pthread_cond_wait(&wait_condition, &wait_mutex);
  pthread_mutex_unlock(&wait_mutex);
}

void acre_wake(_Atomic uint32_t *word, int32_t n) {
  (void)word, (void)n;
  pthread_mutex_lock(&wait_mutex);
  pthread_cond_broadcast(&wait_condition);
  pthread_mutex_unlock(&wait_mutex);
}

#endif
