/* Reference-counted bytes, and the account of what an engine holds.
 *
 * A buffer never knows where its bytes came from: whoever made them says how to free
 * them. The last release frees, on whichever thread it happens. */
#include "buffer.h"

#include "platform.h"

#include <stdatomic.h>

struct acre_buffer {
  _Atomic int64_t references;
  void *data;
  size_t size;
  void (*free_bytes)(void *context);
  void *context;
};

acre_status acre_buffer_wrap(acre_buffer **out, void *data, size_t size,
                             void (*free_bytes)(void *context), void *context,
                             acre_error *error) {
  *out = NULL;
  acre_buffer *buffer = acre_alloc_zero(sizeof *buffer);
  if (!buffer) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a buffer");
  atomic_init(&buffer->references, 1);
  buffer->data = data;
  buffer->size = size;
  buffer->free_bytes = free_bytes;
  buffer->context = context;
  *out = buffer;
  return ACRE_OK;
}

void acre_buffer_retain(acre_buffer *buffer) {
  if (buffer) atomic_fetch_add_explicit(&buffer->references, 1, memory_order_relaxed);
}

void acre_buffer_release(acre_buffer *buffer) {
  if (!buffer) return;
  if (atomic_fetch_sub_explicit(&buffer->references, 1, memory_order_acq_rel) != 1) return;
  if (buffer->free_bytes) buffer->free_bytes(buffer->context);
  acre_free(buffer);
}

void *acre_buffer_data(const acre_buffer *buffer) { return buffer ? buffer->data : NULL; }

size_t acre_buffer_size(const acre_buffer *buffer) { return buffer ? buffer->size : 0; }

/* The account's header is read by C++ too, which has no _Atomic: hence the builtins. */

void acre_account_add(acre_account *account, size_t bytes) {
  size_t held = __atomic_add_fetch(&account->held, bytes, __ATOMIC_RELAXED);
  size_t peak = __atomic_load_n(&account->peak, __ATOMIC_RELAXED);
  while (held > peak && !__atomic_compare_exchange_n(&account->peak, &peak, held, true,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

void acre_account_remove(acre_account *account, size_t bytes) {
  __atomic_sub_fetch(&account->held, bytes, __ATOMIC_RELAXED);
}

size_t acre_account_held(const acre_account *account) {
  return __atomic_load_n(&account->held, __ATOMIC_RELAXED);
}

size_t acre_account_peak(const acre_account *account) {
  return __atomic_load_n(&account->peak, __ATOMIC_RELAXED);
}

void acre_account_reset_peak(acre_account *account) {
  __atomic_store_n(&account->peak, acre_account_held(account), __ATOMIC_RELAXED);
}
