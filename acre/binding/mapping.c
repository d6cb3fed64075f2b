/* Takes a path, gives its bytes as an acre_buffer without reading them.
 *
 * The map belongs to the buffer and to no Python object: whoever drops the last
 * reference unmaps it, on any thread, with or without an interpreter. Blocks are
 * buffers of their own over one shared map, so that C checks each against its own size.
 *
 * A mapped file must not shrink: touching pages beyond the new end kills the process
 * (SIGBUS), which no check here can prevent. Files that are replaced by renaming, as
 * acre.storage writes them, are safe: the map keeps the old one. */
#include "mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "errors.h"

typedef struct mapped {
  void *bytes;
  size_t size;
} mapped;

static void unmap(void *context) {
  mapped *map = context;
  munmap(map->bytes, map->size);
  free(map);
}

static void release_file(void *context) { acre_buffer_release(context); }

/* 0, or an errno; EINVAL also for what is no regular file, or an empty one. */
static int map_file(const char *path, mapped *map) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return errno;
  struct stat status;
  int error = 0;
  if (fstat(file, &status) < 0) {
    error = errno;
  } else if (!S_ISREG(status.st_mode) || status.st_size <= 0) {
    error = EINVAL;
  } else {
    map->size = (size_t)status.st_size;
    map->bytes = mmap(NULL, map->size, PROT_READ, MAP_PRIVATE, file, 0);
    if (map->bytes == MAP_FAILED) error = errno;
  }
  close(file);
  return error;
}

static acre_buffer *wrap_map(const binding_state *state, const mapped *map) {
  mapped *context = malloc(sizeof *context);
  acre_buffer *buffer = NULL;
  acre_error error = {ACRE_NO_MEMORY, "path: no memory for the map"};
  acre_status status = ACRE_NO_MEMORY;
  if (context) {
    *context = *map;
    status = acre_buffer_wrap(&buffer, map->bytes, map->size, unmap, context, &error);
  }
  if (status == ACRE_OK) return buffer;
  munmap(map->bytes, map->size);
  free(context);
  errors_raise(state, &error);
  return NULL;
}

acre_buffer *mapping_open(const binding_state *state, PyObject *path) {
  PyObject *encoded;
  if (!PyUnicode_FSConverter(path, &encoded)) return NULL;
  mapped map;
  int error;
  WITHOUT_GIL(error = map_file(PyBytes_AS_STRING(encoded), &map));
  Py_DECREF(encoded);
  if (error == 0) return wrap_map(state, &map);
  if (error == EINVAL) {
    PyErr_Format(PyExc_ValueError, "path: %R is empty or no regular file", path);
  } else {
    errno = error;
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
  }
  return NULL;
}

acre_buffer *mapping_block(const binding_state *state, acre_buffer *file, int64_t offset,
                           int64_t size, const char *name) {
  int64_t whole = (int64_t)acre_buffer_size(file);
  if (offset < 0 || size < 0 || size > whole || offset > whole - size) {
    PyErr_Format(PyExc_ValueError,
                 "%s: got offset %lld and %lld bytes, expected a block inside the file's "
                 "%lld bytes",
                 name, (long long)offset, (long long)size, (long long)whole);
    return NULL;
  }
  acre_buffer *block;
  acre_error error;
  acre_buffer_retain(file);
  if (acre_buffer_wrap(&block, (char *)acre_buffer_data(file) + offset, (size_t)size,
                       release_file, file, &error) == ACRE_OK)
    return block;
  acre_buffer_release(file);
  errors_raise(state, &error);
  return NULL;
}
