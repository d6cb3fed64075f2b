/* The DLPack exchange, both generations: capsules in and out. */
#ifndef ACRE_BINDING_DLPACK_H
#define ACRE_BINDING_DLPACK_H

#include "binding.h"

/* The ABI of DLPack 1.1, as its specification lays it down. */
enum {
  DLPACK_INT = 0,
  DLPACK_UINT = 1,
  DLPACK_FLOAT = 2,
  DLPACK_BFLOAT = 4,
  DLPACK_BOOL = 6
};
enum { DLPACK_CPU = 1, DLPACK_CUDA = 2 };
enum { DLPACK_FLAG_READ_ONLY = 1, DLPACK_FLAG_COPIED = 2 };

typedef struct dlpack_device {
  int32_t type, id;
} dlpack_device;

typedef struct dlpack_tensor {
  void *data;
  dlpack_device device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL = compact, row-major */
  uint64_t byte_offset;
} dlpack_tensor;

typedef struct dlpack_legacy {
  dlpack_tensor tensor;
  void *context;
  void (*deleter)(struct dlpack_legacy *self);
} dlpack_legacy;

typedef struct dlpack_versioned {
  uint32_t major, minor;
  void *context;
  void (*deleter)(struct dlpack_versioned *self);
  uint64_t flags;
  dlpack_tensor tensor;
} dlpack_versioned;

/* A tensor taken out of a capsule; exactly one of the two is set, or none. */
typedef struct dlpack_import {
  dlpack_legacy *legacy;
  dlpack_versioned *versioned;
} dlpack_import;

bool dlpack_is_capsule(PyObject *object);
bool dlpack_is_producer(PyObject *object); /* has __dlpack__ */

/* The device of an engine as DLPack has it. */
dlpack_device dlpack_device_of(const acre_engine *engine);

/* Takes the tensor of a producer, or of a capsule itself. *tensor lives until
 * dlpack_drop(import). It lies on the CPU, or on the device of `engine` (nullable); there it
 * may be read on the engine's stream, which the producer was told of: so a mere capsule of it
 * is refused, as are other devices, spent capsules and major versions to come. 0, or -1 with
 * an exception. */
int dlpack_take(dlpack_import *import, const dlpack_tensor **tensor, PyObject *object,
                const char *name, const acre_engine *engine);
void dlpack_drop(dlpack_import *import);

/* An export's stream by the rules of its device: None, -1 (nothing is to be waited for) or a
 * stream of CUDA: 1, 2, or a handle. BufferError for others. What is exported is complete and
 * never written again, so that there is nothing that a stream would have to wait for. */
int dlpack_check_stream(PyObject *stream, int32_t device_type);

/* A new capsule over `view` on that device, which keeps `owner` alive by a reference of its
 * own. */
PyObject *dlpack_export(const acre_array *view, acre_buffer *owner, dlpack_device device,
                        bool versioned, uint64_t flags);

#endif
