/* Arrays between Python and C: foreign ones in, NumPy ones out. */
#ifndef ACRE_BINDING_ARRAYS_H
#define ACRE_BINDING_ARRAYS_H

#include "dlpack.h"

typedef enum element_kind {
  ELEMENT_INT,
  ELEMENT_UINT,
  ELEMENT_FLOAT,
  ELEMENT_BFLOAT,
  ELEMENT_BOOL,
} element_kind;

/* Someone else's array, borrowed until foreign_drop. Strides in elements. */
typedef struct foreign_array {
  const void *data;
  element_kind kind;
  int32_t item_size; /* bytes */
  int32_t ndim;
  int64_t shape[ACRE_MAX_DIMS];
  int64_t strides[ACRE_MAX_DIMS];
  bool on_device;       /* of the engine that it was taken for */
  void *landed;         /* its copy on the host, or NULL */
  Py_buffer buffer;     /* held when buffer.obj is set */
  dlpack_import import; /* held otherwise */
} foreign_array;

/* Takes a buffer, a DLPack producer or capsule on the CPU, or a sequence of numbers.
 * `expected` ends the sentence of a refusal. 0, or -1 with an exception. */
int foreign_take(foreign_array *out, PyObject *object, const char *name,
                 const char *expected);
/* The same, also from the engine's device: then on_device is set. */
int foreign_take_for(foreign_array *out, PyObject *object, const char *name,
                     const char *expected, const acre_engine *engine);
/* From the device to the host, if it is there. */
int foreign_land(const binding_state *state, foreign_array *array, const char *name,
                 acre_engine *engine);
void foreign_drop(foreign_array *array);

/* A foreign array of floats as C takes it. `dtype`: NULL, or its name, which must be
 * what came, except that 16-bit integers may be declared "bf16". */
int foreign_floats(const foreign_array *array, const char *dtype, const char *name,
                   acre_array *out);

/* Integers as int32, range-checked, row-major. *out is freed by PyMem_RawFree. */
typedef struct integers {
  int32_t *data;
  int32_t ndim;
  int64_t shape[ACRE_MAX_DIMS];
} integers;

/* With at most max_ndim dimensions; `flags`: booleans are taken for 0 and 1. */
int integers_take(PyObject *object, const char *name, int max_ndim, bool flags,
                  integers *out);
/* What follows gives arrays that PyMem_RawFree frees. One-dimensional: token ids. */
int ids_take(PyObject *object, const char *name, int32_t **out, int64_t *count);

/* One-dimensional float32 or float64 of `count` numbers, as float32. */
int numbers_take(PyObject *object, const char *name, int64_t count, float **out);
/* One-dimensional booleans or integers of `count` items, as bytes 0 and 1. */
int flags_take(PyObject *object, const char *name, int64_t count, uint8_t **out);
/* The same of [layers, heads]. */
int head_flags_take(PyObject *object, int64_t layers, int64_t heads, uint8_t **out);

/* A new NumPy array of `dtype`, contiguous; `buffer` holds its writable bytes until
 * PyBuffer_Release. */
PyObject *result_array(const char *dtype, int ndim, const int64_t *shape,
                       Py_buffer *buffer);
/* A NumPy array int32 [count] over bytes of its own that nobody can write. */
PyObject *constant_ids(const int32_t *ids, int64_t count);

#endif
