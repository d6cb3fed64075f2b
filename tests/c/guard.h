/* Memory that ends at a page nobody may touch: reading or writing one byte beyond stops
 * the test, whatever instruction does it. */
#ifndef ACRE_TEST_GUARD_H
#define ACRE_TEST_GUARD_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct guarded_block {
  char *data, *map;
  size_t mapped;
} guarded_block;

static guarded_block guarded_blocks[256];

/* `bytes` bytes, the last of them before the forbidden page; another lies in front. */
static inline void *guarded_alloc(size_t bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t used = (bytes + page - 1) / page * page;
  for (int i = 0; i < 256; i++) {
    guarded_block *b = &guarded_blocks[i];
    if (b->data) continue;
    b->mapped = used + 2 * page;
    b->map = mmap(NULL, b->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->map == MAP_FAILED) break;
    if (used && mprotect(b->map + page, used, PROT_READ | PROT_WRITE) != 0) break;
    return b->data = b->map + page + used - bytes;
  }
  fprintf(stderr, "guarded_alloc: out of memory or of blocks\n");
  exit(1);
}

static inline void guarded_free(void *data) {
  if (!data) return;
  for (int i = 0; i < 256; i++) {
    guarded_block *b = &guarded_blocks[i];
    if (b->data != data) continue;
    munmap(b->map, b->mapped);
    *b = (guarded_block){0};
    return;
  }
  fprintf(stderr, "guarded_free: unknown block\n");
  exit(1);
}

#endif
