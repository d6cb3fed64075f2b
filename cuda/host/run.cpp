/* Kernels on the host: the blocks of a launch in turn, the threads of a block as fibers.
 *
 * A fiber runs until it reaches a barrier or a shuffle, so between two of them a thread sees
 * either all or nothing of what another did; both blocks and threads are taken in an order
 * that changes from block to block, so that a barrier that is missing shows as a wrong
 * result. An asynchronous copy leaves NaN where it goes to and arrives at the first barrier
 * behind its thread's wait for it, no sooner. Shared memory is full of NaN before each block,
 * and allocated to the byte, so that AddressSanitizer sees what lies beyond. Where no thread
 * can go on, the launch fails and says who waits for what; nothing hangs. */
#include "cuda_runtime.h"
#include "fiber.h"
#include "hopper.h"
#include "host.h"

#include <stdio.h>
#include <stdlib.h>

extern "C" size_t acre_host_shared_most(void); /* runtime.cpp */

namespace {

enum { THREADS_MOST = 1024, LANES = 32, COPIES_MOST = 512 };
enum wait { READY, AT_BARRIER, AT_EXCHANGE, AT_CONDITION, ENDED };

const char *const WAIT[ACRE_WAITS] = {"a barrier",
                                      "__syncwarp",
                                      "__shfl_xor_sync",
                                      "__shfl_sync",
                                      "a matrix instruction",
                                      "a named barrier",
                                      "an mbarrier",
                                      "wgmma"};

/* An asynchronous copy under way, of the group-th group of its thread. */
struct async_copy {
  void *to;
  const void *from;
  size_t bytes, room;
  int64_t group;
};

struct thread {
  acre_host_thread place;
  acre_fiber fiber;
  wait state;
  unsigned mask; /* of an exchange */
  uint32_t value;
  int source;
  acre_host_wait kind;
  acre_host_act act; /* of what a warp does together, and this lane's part of it */
  void *part;
  bool (*ready)(const void *, uint32_t); /* of a condition */
  const void *awaited;
  async_copy *copies; /* [COPIES_MOST], from the oldest on */
  int copy_count;
  int64_t groups, waited; /* that were committed; up to which the thread waited */
};

struct machine {
  thread *threads; /* [THREADS_MOST] */
  thread *current;
  acre_fiber scheduler;
  unsigned char *shared;
  int count, ended, at_barrier;
  bool broken;   /* a rule: the block has failed */
  uint32_t slow; /* warps that mostly stay behind */
  int order[THREADS_MOST];
  uint64_t random;
  void (*call)(const void *);
  const void *arguments;
};

thread_local machine here;
thread_local int64_t launches, conflicts;
thread_local const char *latest = "";
uint64_t first_seed = 1;

uint64_t random_bits(machine *m) { /* splitmix64 */
  uint64_t z = (m->random += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void shuffle(machine *m) {
  for (int i = 0; i < m->count; i++) {
    int j = (int)(random_bits(m) % (uint64_t)(i + 1));
    m->order[i] = m->order[j], m->order[j] = i;
  }
}

void yield(void) { acre_fiber_switch(&here.current->fiber, &here.scheduler, false); }

void thread_main(void) {
  here.call(here.arguments);
  here.current->state = ENDED;
  here.ended++;
  acre_fiber_switch(&here.current->fiber, &here.scheduler, true);
}

/* ------------------------------------------------------------------ a block */

void begin(machine *m, dim3 block, dim3 at, dim3 grid) {
  m->count = (int)(block.x * block.y * block.z);
  m->ended = m->at_barrier = 0;
  m->broken = false;
  m->slow = (uint32_t)(random_bits(m) & random_bits(m));
  for (int i = 0; i < m->count; i++) {
    thread *t = &m->threads[i];
    unsigned n = (unsigned)i;
    dim3 index(n % block.x, n / block.x % block.y, n / block.x / block.y);
    t->place = {index, at, block, grid};
    t->state = READY;
    t->copy_count = 0, t->groups = t->waited = 0;
    acre_fiber_begin(&t->fiber, thread_main);
  }
  shuffle(m);
}

/* One turn of all threads of these warps; false where none could move. */
bool turn_of(machine *m, uint32_t warps) {
  bool moved = false;
  for (int i = 0; i < m->count; i++) {
    thread *t = &m->threads[m->order[i]];
    if (!(warps >> (m->order[i] / LANES) & 1)) continue;
    if (t->state == AT_CONDITION && t->ready(t->awaited, t->value)) t->state = READY;
    if (t->state != READY) continue;
    moved = true;
    m->current = t;
    acre_fiber_switch(&m->scheduler, &t->fiber, false);
  }
  return moved;
}

/* Some warps run ahead of others, and a few of them far ahead. */
bool turn(machine *m) {
  uint32_t kept = random_bits(m) % 16 ? m->slow : 0;
  return turn_of(m, (uint32_t)random_bits(m) & ~kept) || turn_of(m, ~(uint32_t)0);
}

void tell(const machine *m, const char *name, uint64_t seed) {
  fprintf(stderr, "kernel %s, seed %llu: of %d threads %d have ended", name,
          (unsigned long long)seed, m->count, m->ended);
  int waiting[ACRE_WAITS] = {0}, first[ACRE_WAITS] = {0};
  for (int i = m->count - 1; i >= 0; i--) {
    const thread *t = &m->threads[i];
    if (t->state == ENDED) continue;
    waiting[t->kind]++, first[t->kind] = i;
  }
  for (int kind = 0; kind < ACRE_WAITS; kind++)
    if (waiting[kind])
      fprintf(stderr, ", %d wait at %s (thread %d of block %u)", waiting[kind], WAIT[kind],
              first[kind], m->threads[0].place.block.x);
  fprintf(stderr, "\n");
}

bool run_block(machine *m, const char *name) {
  uint64_t seed = m->random;
  while (m->ended < m->count) {
    bool moved = turn(m);
    moved |= acre_hopper_step(random_bits(m), !moved);
    if (m->at_barrier == m->count) { /* all of them: nobody may have ended before */
      for (int i = 0; i < m->count; i++) m->threads[i].state = READY;
      m->at_barrier = 0;
      shuffle(m);
    } else if (!moved || m->broken) {
      tell(m, name, seed);
      for (int i = 0; i < m->count; i++) acre_fiber_abandon(&m->threads[i].fiber);
      return false;
    }
  }
  return acre_hopper_end() && !m->broken;
}

/* ------------------------------------------------------------------ a launch */

bool prepare(machine *m) {
  if (m->threads) return true;
  m->threads = (thread *)calloc(THREADS_MOST, sizeof *m->threads);
  m->random = first_seed;
  return m->threads != NULL;
}

bool allowed(dim3 grid, dim3 block, size_t shared) {
  unsigned threads = block.x * block.y * block.z;
  return grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 1u << 16 &&
         grid.z < 1u << 16 && threads && threads <= THREADS_MOST &&
         shared <= acre_host_shared_most();
}

/* Blocks from anywhere on, with a stride that meets each of them once. */
cudaError_t run_blocks(machine *m, const char *name, dim3 grid, dim3 block, size_t shared) {
  uint64_t count = (uint64_t)grid.x * grid.y * grid.z;
  uint64_t at = random_bits(m) % count, step = random_bits(m) % 2 ? 1 : count - 1;
  bool right = true;
  for (uint64_t i = 0; right && i < count; i++, at = (at + step) % count) {
    dim3 place((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
               (unsigned)(at / grid.x / grid.y));
    memset(m->shared, 0xff, shared);
    acre_hopper_begin(m->shared, shared);
    begin(m, block, place, grid);
    right = run_block(m, name);
  }
  return right ? cudaSuccess : cudaErrorLaunchFailure;
}

/* What a thread has waited for, at its next barrier: others may not look before. */
void deliver(thread *self) {
  int left = 0;
  for (int i = 0; i < self->copy_count; i++) {
    async_copy copy = self->copies[i];
    if (copy.group >= self->waited) {
      self->copies[left++] = copy;
      continue;
    }
    memset(copy.to, 0, copy.room);
    if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
  }
  self->copy_count = left;
}

/* Whether all lanes of the mask are here for the same thing, this thread the last of them;
 * else returns when that one has done it. */
bool last_to_come(machine *m, thread *self, unsigned mask, acre_host_wait kind,
                  acre_host_act act) {
  int warp = (int)(self - m->threads) / LANES * LANES;
  self->state = AT_EXCHANGE;
  self->mask = mask, self->kind = kind, self->act = act;
  bool all = mask >> (self - m->threads - warp) & 1;
  for (int lane = 0; all && lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    const thread *t = &m->threads[warp + lane];
    all = warp + lane < m->count && t->state == AT_EXCHANGE && t->mask == mask &&
          t->kind == kind && t->act == act;
  }
  if (!all) yield();
  return all;
}

}  // namespace

extern "C" {

cudaError_t acre_host_result(void); /* runtime.cpp */

const acre_host_thread *acre_host_current(void) { return &here.current->place; }

unsigned char *acre_host_shared(void) { return here.shared; }

void acre_host_barrier(void) {
  deliver(here.current);
  here.current->state = AT_BARRIER, here.current->kind = ACRE_WAIT_BARRIER;
  here.at_barrier++;
  yield();
}

uint32_t acre_host_exchange(unsigned mask, uint32_t value, int source,
                            acre_host_wait kind) {
  machine *m = &here;
  thread *self = m->current;
  self->value = value, self->source = source;
  if (kind == ACRE_WAIT_WARP) deliver(self);
  if (!last_to_come(m, self, mask, kind, NULL)) return self->value;
  int warp = (int)(self - m->threads) / LANES * LANES;
  uint32_t given[LANES];
  for (int lane = 0; lane < LANES; lane++)
    if (mask >> lane & 1) given[lane] = m->threads[warp + lane].value;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    thread *t = &m->threads[warp + lane];
    t->state = READY;
    if (mask >> t->source & 1) t->value = given[t->source];
  }
  return self->value;
}

void acre_host_together(acre_host_act act, void *part, acre_host_wait kind) {
  machine *m = &here;
  thread *self = m->current;
  self->part = part;
  if (!last_to_come(m, self, ~0u, kind, act)) return;
  int warp = (int)(self - m->threads) / LANES;
  void *parts[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    parts[lane] = m->threads[warp * LANES + lane].part;
    m->threads[warp * LANES + lane].state = READY;
  }
  act(parts, warp);
}

void acre_host_conflict(void) { conflicts++; }

void acre_host_copy(void *to, const void *from, size_t bytes, size_t room) {
  thread *self = here.current;
  if (!self->copies) self->copies = (async_copy *)calloc(COPIES_MOST, sizeof *self->copies);
  if (!self->copies || self->copy_count == COPIES_MOST) abort();
  memset(to, 0xff, room); /* NaN */
  self->copies[self->copy_count++] = {to, from, bytes, room, self->groups};
}

void acre_host_copies_commit(void) { here.current->groups++; }

void acre_host_copies_wait(int under_way) {
  here.current->waited = here.current->groups - under_way;
}

void acre_host_await(bool (*ready)(const void *, uint32_t), const void *what,
                     uint32_t which, acre_host_wait kind) {
  thread *self = here.current;
  self->state = AT_CONDITION, self->kind = kind;
  self->ready = ready, self->awaited = what, self->value = which;
  yield();
}

uint64_t acre_host_random(void) { return random_bits(&here); }

void acre_host_fault(const char *rule) {
  if (!here.broken) fprintf(stderr, "a broken rule: %s\n", rule);
  here.broken = true;
}

cudaError_t acre_host_run(const acre_host_work *kernel, const void *arguments) {
  machine *m = &here;
  dim3 grid = kernel->grid, block = kernel->block;
  size_t shared = kernel->shared;
  launches++, latest = kernel->name;
  cudaError_t refused = acre_host_result();
  if (refused != cudaSuccess) return refused;
  if (!allowed(grid, block, shared) || !prepare(m)) {
    fprintf(stderr, "kernel %s: grid %u %u %u, block %u %u %u, %zu bytes shared\n",
            kernel->name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return cudaErrorInvalidValue;
  }
  void *memory = NULL;
  if (posix_memalign(&memory, 128, shared ? shared : 1) != 0)
    return cudaErrorMemoryAllocation;
  m->shared = (unsigned char *)memory;
  m->call = kernel->call, m->arguments = arguments;
  acre_host_access(true);
  cudaError_t error = run_blocks(m, kernel->name, grid, block, shared);
  acre_host_access(false);
  free(memory);
  m->shared = NULL;
  return error;
}

void acre_host_seed(uint64_t seed) { first_seed = here.random = seed; }
int64_t acre_host_launches(void) { return launches; }
const char *acre_host_kernel(void) { return latest; }
int64_t acre_host_conflicts(void) { return conflicts; }
}
