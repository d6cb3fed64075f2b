/* The only owner of bytes: an atomic count, a size, and how to free them. */
#ifndef ACRE_BUFFER_H
#define ACRE_BUFFER_H

#include "status.h"

#include <stdatomic.h>

/* Bytes held by an engine's buffers. peak >= held at every moment. */
typedef struct acre_account {
  _Atomic size_t held;
  _Atomic size_t peak;
} acre_account;

void acre_account_add(acre_account *account, size_t bytes);
void acre_account_remove(acre_account *account, size_t bytes);

struct acre_buffer {
  _Atomic int64_t references;
  void *data;
  size_t size;
  void (*free_bytes)(void *context);
  void *context;
};

#endif
