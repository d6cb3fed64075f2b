/* A backend for tests whose arrays lie on the host and whose operations run on a device:
 * each carries its arrays there, calls the plug-in's operation, and carries back what that
 * writes. So the tests of operations run over real device memory as they are.
 *
 * Sizes are those of the contract (backend.h), to the last byte. What is written is carried
 * there first, too, so a test's poison is what an element that nobody wrote comes back with.
 * An array keeps its address modulo ACRE_ALIGN, has a pattern in front and behind which must
 * stay, and must stay itself where it is only read. With ACRE_TEST_EXACT in the environment
 * nothing lies behind it, so that compute-sanitizer sees what is read there. A failure of the
 * device ends the test, with the operation's name. */
#ifndef ACRE_TEST_CARRIED_H
#define ACRE_TEST_CARRIED_H

#include "backend.h"
#include "plugin.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CARRIED_EDGE = 64, CARRIED_MOST = 32, CARRIED_SINGLY = 8, CARRIED_PATTERN = 0xa5 };

typedef struct carried_backend {
  acre_backend base;
  acre_backend_ops ops;
  acre_backend *device;
  char isa[48];
} carried_backend;

typedef struct carried_queue {
  carried_backend *owner;
  acre_queue *device;
} carried_queue;

typedef struct carried_matrix {
  carried_backend *owner;
  acre_matrix *device;
  int64_t N, K;
  acre_dtype dtype;
} carried_matrix;

/* At once: nothing of a device that has failed is given back. */
static inline void carried_fail(const char *what, const char *message) {
  fprintf(stderr, "%s: %s\n", what, message);
  fflush(NULL);
  _exit(1);
}

static inline void *carried_memory(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory) carried_fail("carried", "out of memory");
  return memory;
}

/* ---------------------------------------------------------------- arrays on the way */

typedef struct parcel {
  char *host;
  acre_buffer *buffer;
  size_t front, bytes, behind;
  bool back;
} parcel;

/* One operation's arrays. */
typedef struct trip {
  const char *name;
  carried_queue *queue;
  parcel parcels[CARRIED_MOST];
  int count;
} trip;

static inline trip trip_of(acre_queue *queue, const char *name) {
  return (trip){.name = name, .queue = (carried_queue *)queue};
}

static inline const acre_backend_ops *device_ops(const trip *t) {
  return t->queue->owner->device->ops;
}

static inline char *parcel_data(const parcel *p) {
  return (char *)acre_buffer_data(p->buffer) + p->front;
}

/* The place of an array on the device; the same one for the same array. Nothing to carry:
 * itself, which nobody may touch. */
static inline void *carry(trip *t, const void *host, size_t bytes, bool back) {
  if (!host || !bytes) return (void *)host;
  for (int i = 0; i < t->count; i++) {
    parcel *p = &t->parcels[i];
    if (p->host != host || p->bytes != bytes) continue;
    p->back |= back;
    return parcel_data(p);
  }
  if (t->count == CARRIED_MOST) carried_fail(t->name, "too many arrays");
  parcel *p = &t->parcels[t->count++];
  size_t behind = getenv("ACRE_TEST_EXACT") ? 0 : CARRIED_EDGE;
  size_t front = CARRIED_EDGE + (uintptr_t)host % ACRE_ALIGN, size = front + bytes + behind;
  *p = (parcel){(char *)host, NULL, front, bytes, behind, back};
  const acre_backend_ops *ops = device_ops(t);
  acre_error error = {0};
  if (ops->alloc(t->queue->owner->device, &p->buffer, size, &error) != ACRE_OK)
    carried_fail(t->name, error.message);
  char *image = carried_memory(size);
  memset(image, CARRIED_PATTERN, size);
  memcpy(image + front, host, bytes);
  ops->upload(t->queue->device, acre_buffer_data(p->buffer), image, size);
  free(image);
  return parcel_data(p);
}

static inline const void *in(trip *t, const void *host, int64_t count, size_t size) {
  return carry(t, host, (size_t)count * size, false);
}

static inline void *both(trip *t, void *host, int64_t count, size_t size) {
  return carry(t, host, (size_t)count * size, true);
}

static inline bool untouched_edges(const parcel *p, const char *image) {
  size_t end = p->front + p->bytes + p->behind;
  for (size_t i = 0; i < end; i++)
    if ((i < p->front || i >= p->front + p->bytes) && (uint8_t)image[i] != CARRIED_PATTERN)
      return false;
  return true;
}

static inline void unload(trip *t, int index) {
  parcel *p = &t->parcels[index];
  size_t size = p->front + p->bytes + p->behind;
  char *image = carried_memory(size), where[64];
  device_ops(t)->download(t->queue->device, image, acre_buffer_data(p->buffer), size);
  snprintf(where, sizeof where, "%s, array %d of %zu bytes", t->name, index, p->bytes);
  if (!untouched_edges(p, image)) carried_fail(where, "written before or behind it");
  if (p->back)
    memcpy(p->host, image + p->front, p->bytes);
  else if (memcmp(p->host, image + p->front, p->bytes) != 0)
    carried_fail(where, "written, but only to be read");
  free(image);
  acre_buffer_release(p->buffer);
}

/* Waits, and carries back. */
static inline void arrive(trip *t) {
  acre_error error = {0};
  if (device_ops(t)->sync(t->queue->device, &error) != ACRE_OK)
    carried_fail(t->name, error.message);
  for (int i = 0; i < t->count; i++) unload(t, i);
}

/* An operation: its arrays named, then the device's own call of the same name. */
#define CARRIED(name, ...)                              \
  do {                                                  \
    device_ops(&t)->name(t.queue->device, __VA_ARGS__); \
    arrive(&t);                                         \
  } while (0)

/* Elements of rows that are `stride` apart, up to the last one's last. */
static inline int64_t strided(int64_t rows, int64_t stride, int64_t width) {
  return rows ? (rows - 1) * stride + width : 0;
}

/* Rows that an index reaches. */
static inline int64_t reached(const int32_t *index, int64_t rows) {
  int64_t most = 0;
  for (int64_t i = 0; i < rows; i++) most = acre_max(most, index[i] + 1);
  return most;
}

static inline acre_keys keys_there(trip *t, const acre_keys *keys, const acre_heads *s) {
  int64_t n = keys->count * s->kv_heads * s->head_dim;
  size_t size = acre_dtype_size(s->dtype);
  return (acre_keys){in(t, keys->rotated, n, size), in(t, keys->values, n, size),
                     in(t, keys->bias, keys->count, 4), keys->count};
}

/* ---------------------------------------------------------------- memory, matrices */

static inline acre_status carried_alloc(acre_backend *b, acre_buffer **out, size_t bytes,
                                        acre_error *error) {
  acre_backend *device = ((carried_backend *)b)->device;
  return device->ops->alloc(device, out, bytes, error);
}

static inline size_t carried_available(acre_backend *b) {
  acre_backend *device = ((carried_backend *)b)->device;
  return device->ops->available(device);
}

static inline void carried_destroy(acre_backend *b) {
  acre_backend *device = ((carried_backend *)b)->device;
  device->ops->destroy(device);
  free(b);
}

static inline acre_status carried_queue_open(acre_backend *b, acre_queue **out,
                                             acre_error *error) {
  carried_queue *queue = carried_memory(sizeof *queue);
  queue->owner = (carried_backend *)b;
  acre_backend *device = queue->owner->device;
  acre_status status = device->ops->queue_open(device, &queue->device, error);
  *out = status == ACRE_OK ? (acre_queue *)queue : NULL;
  if (status != ACRE_OK) free(queue);
  return status;
}

static inline void carried_queue_close(acre_queue *q) {
  carried_queue *queue = (carried_queue *)q;
  queue->owner->device->ops->queue_close(queue->device);
  free(queue);
}

static inline acre_status carried_sync(acre_queue *q, acre_error *error) {
  carried_queue *queue = (carried_queue *)q;
  return queue->owner->device->ops->sync(queue->device, error);
}

static inline void carried_upload(acre_queue *q, void *dst, const void *host,
                                  size_t bytes) {
  trip t = trip_of(q, "upload");
  CARRIED(upload, both(&t, dst, 1, bytes), host, bytes);
}

static inline void carried_download(acre_queue *q, void *host, const void *src,
                                    size_t bytes) {
  trip t = trip_of(q, "download");
  CARRIED(download, host, in(&t, src, 1, bytes), bytes);
}

static inline const acre_matrix *matrix_there(const acre_matrix *W) {
  return ((const carried_matrix *)W)->device;
}

static inline acre_status carried_matrix_create(acre_backend *b, acre_matrix **out,
                                                int64_t N, int64_t K, acre_dtype dtype,
                                                acre_weights weights, acre_error *error) {
  carried_matrix *W = carried_memory(sizeof *W);
  *W = (carried_matrix){(carried_backend *)b, NULL, N, K, dtype};
  acre_backend *device = W->owner->device;
  acre_status status =
      device->ops->matrix_create(device, &W->device, N, K, dtype, weights, error);
  *out = status == ACRE_OK ? (acre_matrix *)W : NULL;
  if (status != ACRE_OK) free(W);
  return status;
}

static inline void carried_matrix_release(acre_matrix *matrix) {
  carried_matrix *W = (carried_matrix *)matrix;
  W->owner->device->ops->matrix_release(W->device);
  free(W);
}

static inline void carried_matrix_fill(acre_matrix *matrix, int64_t row,
                                       const acre_array *host, bool *finite) {
  carried_matrix *W = (carried_matrix *)matrix;
  W->owner->device->ops->matrix_fill(W->device, row, host, finite);
}

static inline void carried_matrix_get(acre_queue *q, float *x, const acre_matrix *W,
                                      int64_t row, int64_t rows) {
  trip t = trip_of(q, "matrix_get");
  int64_t K = ((const carried_matrix *)W)->K;
  CARRIED(matrix_get, both(&t, x, rows * K, 4), matrix_there(W), row, rows);
}

static inline void carried_matrix_set(acre_queue *q, acre_matrix *W, int64_t row,
                                      const float *x, int64_t rows) {
  trip t = trip_of(q, "matrix_set");
  carried_matrix *matrix = (carried_matrix *)W;
  CARRIED(matrix_set, matrix->device, row, in(&t, x, rows * matrix->K, 4), rows);
}

static inline acre_status carried_matrix_transpose(acre_queue *q, acre_matrix **out,
                                                   const acre_matrix *W,
                                                   acre_error *error) {
  carried_queue *queue = (carried_queue *)q;
  const carried_matrix *from = (const carried_matrix *)W;
  carried_matrix *turned = (carried_matrix *)*out;
  acre_matrix *there = turned ? turned->device : NULL;
  acre_status status = queue->owner->device->ops->matrix_transpose(queue->device, &there,
                                                                   from->device, error);
  if (status != ACRE_OK || turned) return status;
  turned = carried_memory(sizeof *turned);
  *turned = (carried_matrix){from->owner, there, from->K, from->N, from->dtype};
  *out = (acre_matrix *)turned;
  return ACRE_OK;
}

#include "carried_ops.h"

/* ---------------------------------------------------------------- opening */

/* Takes over `device`. */
static inline acre_backend *carried_wrap(acre_backend *device) {
  carried_backend *b = carried_memory(sizeof *b);
  memset(b, 0, sizeof *b);
  b->device = device;
  b->ops = carried_operations();
  snprintf(b->isa, sizeof b->isa, "carried/%.30s", device->isa);
  b->base = (acre_backend){.ops = &b->ops, .isa = b->isa, .threads = device->threads};
  b->base.rows_max = device->rows_max;
  return &b->base;
}

/* The plug-in's device 0 behind such a table; scratch and staging memory of the given bytes,
 * 0: as it comes. */
static inline acre_status carried_open(acre_backend **out, const char *plugin,
                                       const char *libraries, size_t workspace,
                                       size_t staging, acre_error *error) {
  *out = NULL;
  void *file = dlopen(plugin, RTLD_NOW | RTLD_LOCAL), *symbol = NULL;
  if (file) symbol = dlsym(file, "acre_cuda_backend_open");
  if (!symbol) {
    const char *why = dlerror();
    snprintf(error->message, sizeof error->message, "%.300s", why ? why : "no plug-in");
    return error->status = ACRE_UNSUPPORTED;
  }
  acre_cuda_open open_device;
  memcpy(&open_device, &symbol, sizeof open_device);
  acre_cuda_options options = {sizeof options, libraries, workspace, staging};
  acre_backend *device;
  ACRE_TRY(open_device(&device, 0, &options, error));
  *out = carried_wrap(device);
  return ACRE_OK;
}

#endif
