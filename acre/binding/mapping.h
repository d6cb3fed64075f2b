/* Files as C buffers. */
#ifndef ACRE_BINDING_MAPPING_H
#define ACRE_BINDING_MAPPING_H

#include "binding.h"

/* Maps a whole regular file, read-only. NULL with an exception (OSError by errno). */
acre_buffer *mapping_open(const binding_state *state, PyObject *path);

/* The bytes [offset, offset + size) of a mapped file as a buffer that keeps the map.
 * `name` is for messages. NULL with an exception. */
acre_buffer *mapping_block(const binding_state *state, acre_buffer *file, int64_t offset,
                           int64_t size, const char *name);

#endif
