/* Reference-counted bytes, and the account of what an engine holds.
 *
 * A buffer never knows where its bytes came from: whoever made them says how to free them.
 * The last release frees, on whichever thread it happens. */
#include "buffer.h"

#include "platform.h"

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

void acre_account_add(acre_account *account, size_t bytes) {
  size_t held = atomic_fetch_add(&account->held, bytes) + bytes;
  size_t peak = atomic_load(&account->peak);
  while (held > peak && !atomic_compare_exchange_weak(&account->peak, &peak, held)) {
  }
}

void acre_account_remove(acre_account *account, size_t bytes) {
  atomic_fetch_sub(&account->held, bytes);
}
