/* Device memory of its own, that nobody can touch unless it is open: one reserved range, handed
 * out by whole pages, first fit. For tests, so small and slow. */
#ifndef ACRE_HOST_APART_H
#define ACRE_HOST_APART_H

#include <stdlib.h>
#include <sys/mman.h>

namespace {

constexpr size_t APART_RANGE = (size_t)1 << 35, APART_PAGE = 4096;
constexpr int APART_BLOCKS = 4096;

struct apart_block {
  size_t first, bytes;
  bool used;
};

struct apart_range {
  char *memory;
  size_t end; /* handed out so far */
  int count, open;
  apart_block blocks[APART_BLOCKS];
} apart;

bool acre_apart_wanted(void) { return getenv("ACRE_HOST_APART") != NULL; }

void acre_apart_access(bool begins) {
  bool before = apart.open > 0;
  apart.open += begins ? 1 : -1;
  if (apart.end && before != (apart.open > 0))
    mprotect(apart.memory, apart.end, begins ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void *acre_apart_alloc(size_t bytes) {
  bytes = (bytes + APART_PAGE - 1) / APART_PAGE * APART_PAGE;
  if (!apart.memory) {
    void *map = mmap(NULL, APART_RANGE, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return NULL;
    apart.memory = (char *)map;
  }
  for (int i = 0; i < apart.count; i++) {
    apart_block *block = &apart.blocks[i];
    if (block->used || block->bytes < bytes || block->bytes > 2 * bytes) continue;
    block->used = true;
    return apart.memory + block->first;
  }
  if (apart.count == APART_BLOCKS || bytes > APART_RANGE - apart.end) return NULL;
  apart.blocks[apart.count++] = {apart.end, bytes, true};
  apart.end += bytes;
  return apart.memory + apart.blocks[apart.count - 1].first;
}

/* Whether it was one of these. */
bool acre_apart_free(void *memory) {
  for (int i = 0; i < apart.count; i++) {
    if (apart.memory + apart.blocks[i].first != memory || !apart.blocks[i].used) continue;
    apart.blocks[i].used = false;
    return true;
  }
  return false;
}

}  // namespace
#endif
