/* Takes any DLPack producer on the CPU or on an engine's device, gives its tensor; and takes a view of C bytes,
 * gives a capsule.
 *
 * The bytes behind an exported capsule belong to an acre_buffer and its header to
 * malloc: so a consumer may drop it on any thread, without the GIL and after this
 * interpreter. A legacy capsule cannot say that its bytes are read-only; it is given to
 * consumers that know no other (NumPy before 2.1, which treats all of them as
 * read-only). */
#include "dlpack.h"

#include <stdlib.h>

#include "arguments.h"

static const char LEGACY[] = "dltensor";
static const char LEGACY_USED[] = "used_dltensor";
static const char VERSIONED[] = "dltensor_versioned";
static const char VERSIONED_USED[] = "used_dltensor_versioned";

/* ------------------------------------------------------------------ import */

static const char *device_name(int64_t type) {
  static const char *const names[] = {
      "device 0", "cpu",    "cuda",    "cuda_host", "opencl",    "device 5", "device 6",
      "vulkan",   "metal",  "vpi",     "rocm",      "rocm_host", "ext_dev",  "cuda_managed",
      "oneapi",   "webgpu", "hexagon", "maia",      "trainium"};
  int64_t count = (int64_t)(sizeof names / sizeof names[0]);
  return type >= 0 && type < count ? names[type] : "an unknown device";
}

/* "cuda:N" is how an engine names what is not the CPU. */
dlpack_device dlpack_device_of(const acre_engine *engine) {
  const char *number = strchr(acre_engine_device(engine), ':');
  if (!number) return (dlpack_device){DLPACK_CPU, 0};
  return (dlpack_device){DLPACK_CUDA, (int32_t)strtol(number + 1, NULL, 10)};
}

static int check_device(int64_t type, int64_t id, const char *name,
                        const acre_engine *engine) {
  if (type == DLPACK_CPU) return 0;
  dlpack_device own = {DLPACK_CPU, 0};
  if (engine) own = dlpack_device_of(engine);
  if (own.type == DLPACK_CPU) {
    PyErr_Format(PyExc_ValueError, "%s: got an array on %s:%lld, expected one on the cpu",
                 name, device_name(type), (long long)id);
    return -1;
  }
  if (type == own.type && id == own.id) return 0;
  PyErr_Format(PyExc_ValueError,
               "%s: got an array on %s:%lld, expected one on the cpu or on cuda:%d", name,
               device_name(type), (long long)id, own.id);
  return -1;
}

bool dlpack_is_capsule(PyObject *object) { return PyCapsule_CheckExact(object); }

bool dlpack_is_producer(PyObject *object) {
  return PyObject_HasAttrString(object, "__dlpack__");
}

/* Asks for the device first: where it is not ours, no data is moved or waited for. *type
 * stays where nothing is said. */
static int ask_device(PyObject *producer, const char *name, const acre_engine *engine,
                      int64_t *type) {
  if (!PyObject_HasAttrString(producer, "__dlpack_device__")) return 0;
  PyObject *device = PyObject_CallMethod(producer, "__dlpack_device__", NULL);
  if (!device) return -1;
  PyObject *pair = PySequence_Tuple(device);
  Py_DECREF(device);
  if (!pair) return -1;
  int64_t id = 0;
  int result = -1;
  if (PyTuple_GET_SIZE(pair) != 2)
    PyErr_Format(PyExc_TypeError, "%s: __dlpack_device__() gave %R, expected a pair", name,
                 pair);
  else if (argument_int64(PyTuple_GET_ITEM(pair, 0), "__dlpack_device__()", type) == 0 &&
           argument_int64(PyTuple_GET_ITEM(pair, 1), "__dlpack_device__()", &id) == 0)
    result = check_device(*type, id, name, engine);
  Py_DECREF(pair);
  return result;
}

/* producer.__dlpack__(max_version=(1, 1)), and on a device stream=..., for which what makes
 * the array is then done; producers older than max_version answer TypeError and are asked
 * again without it. */
static PyObject *ask_capsule(PyObject *producer, void *stream) {
  PyObject *method = PyObject_GetAttrString(producer, "__dlpack__");
  PyObject *none = PyTuple_New(0);
  PyObject *keywords = Py_BuildValue("{s(ii)}", "max_version", 1, 1);
  PyObject *handle = stream ? PyLong_FromVoidPtr(stream) : Py_NewRef(Py_None);
  PyObject *capsule = NULL;
  if (method && none && keywords && handle &&
      (!stream || PyDict_SetItemString(keywords, "stream", handle) == 0)) {
    capsule = PyObject_Call(method, none, keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
      if (PyDict_DelItemString(keywords, "max_version") == 0)
        capsule = PyObject_Call(method, none, keywords);
    }
  }
  Py_XDECREF(handle);
  Py_XDECREF(keywords);
  Py_XDECREF(none);
  Py_XDECREF(method);
  return capsule;
}

/* Renaming a capsule is how DLPack says that its tensor has found its owner. */
static int consume(dlpack_import *import, PyObject *capsule, const char *name) {
  if (PyCapsule_IsValid(capsule, VERSIONED)) {
    dlpack_versioned *managed = PyCapsule_GetPointer(capsule, VERSIONED);
    if (PyCapsule_SetName(capsule, VERSIONED_USED) < 0) return -1;
    import->versioned = managed;
    return 0;
  }
  if (PyCapsule_IsValid(capsule, LEGACY)) {
    dlpack_legacy *managed = PyCapsule_GetPointer(capsule, LEGACY);
    if (PyCapsule_SetName(capsule, LEGACY_USED) < 0) return -1;
    import->legacy = managed;
    return 0;
  }
  if (PyCapsule_IsValid(capsule, VERSIONED_USED) || PyCapsule_IsValid(capsule, LEGACY_USED))
    PyErr_Format(PyExc_ValueError, "%s: the DLPack capsule has been consumed already",
                 name);
  else
    PyErr_Format(PyExc_TypeError, "%s: got %R, expected a DLPack capsule", name, capsule);
  return -1;
}

/* `told`: the producer knows on which stream the engine reads. */
static int check_import(const dlpack_import *import, const char *name,
                        const acre_engine *engine, bool told) {
  const dlpack_versioned *versioned = import->versioned;
  /* Of a major version to come only the place of version and deleter is known. */
  if (versioned && versioned->major > 1) {
    PyErr_Format(PyExc_ValueError, "%s: got DLPack version %u.%u, expected 1.x", name,
                 versioned->major, versioned->minor);
    return -1;
  }
  const dlpack_tensor *tensor = versioned ? &versioned->tensor : &import->legacy->tensor;
  dlpack_device device = tensor->device;
  if (check_device(device.type, device.id, name, engine) < 0) return -1;
  if (device.type == DLPACK_CPU || told) return 0;
  PyErr_Format(PyExc_ValueError,
               "%s: got a capsule on %s:%d, which was not made for this engine's stream; "
               "pass the array itself, with __dlpack__ and __dlpack_device__",
               name, device_name(device.type), device.id);
  return -1;
}

int dlpack_take(dlpack_import *import, const dlpack_tensor **tensor, PyObject *object,
                const char *name, const acre_engine *engine) {
  *import = (dlpack_import){NULL, NULL};
  int64_t type = DLPACK_CPU;
  PyObject *capsule;
  if (dlpack_is_capsule(object)) {
    capsule = Py_NewRef(object);
  } else {
    if (ask_device(object, name, engine, &type) < 0) return -1;
    capsule = ask_capsule(object, type == DLPACK_CPU ? NULL : acre_engine_stream(engine));
    if (!capsule) return -1;
  }
  int result = PyCapsule_CheckExact(capsule)
                   ? consume(import, capsule, name)
                   : argument_refuse(capsule, name, "a capsule from __dlpack__()");
  Py_DECREF(capsule);
  if (result == 0) result = check_import(import, name, engine, type != DLPACK_CPU);
  if (result < 0) {
    dlpack_drop(import);
    return -1;
  }
  *tensor = import->versioned ? &import->versioned->tensor : &import->legacy->tensor;
  return 0;
}

void dlpack_drop(dlpack_import *import) {
  /* A producer's deleter may run Python code; an exception on its way must survive it.
   */
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  if (import->versioned && import->versioned->deleter)
    import->versioned->deleter(import->versioned);
  if (import->legacy && import->legacy->deleter) import->legacy->deleter(import->legacy);
  *import = (dlpack_import){NULL, NULL};
  PyErr_Restore(type, value, traceback);
}

/* ------------------------------------------------------------------ export */

int dlpack_check_stream(PyObject *stream, int32_t device_type) {
  if (stream == Py_None) return 0;
  if (device_type == DLPACK_CPU) {
    PyErr_Format(PyExc_BufferError, "stream: got %R, expected None on the cpu", stream);
    return -1;
  }
  int64_t number = 0;
  if (argument_int64(stream, "stream", &number) < 0) return -1;
  if (number >= -1 && number != 0) return 0;
  PyErr_Format(PyExc_BufferError,
               "stream: got %R, expected None, -1, 1, 2 or the handle of a CUDA stream",
               stream);
  return -1;
}

/* One allocation: the header of either generation, then what it points to. */
typedef struct exported {
  union {
    dlpack_legacy legacy;
    dlpack_versioned versioned;
  } managed;
  acre_buffer *owner;
  int64_t shape[ACRE_MAX_DIMS], strides[ACRE_MAX_DIMS];
} exported;

static void drop_exported(exported *self) {
  acre_buffer_release(self->owner);
  free(self);
}

static void delete_legacy(dlpack_legacy *managed) { drop_exported(managed->context); }

static void delete_versioned(dlpack_versioned *managed) { drop_exported(managed->context); }

/* A capsule that nobody consumed still owns its tensor. */
static void destroy_capsule(PyObject *capsule) {
  if (PyCapsule_IsValid(capsule, VERSIONED))
    delete_versioned(PyCapsule_GetPointer(capsule, VERSIONED));
  else if (PyCapsule_IsValid(capsule, LEGACY))
    delete_legacy(PyCapsule_GetPointer(capsule, LEGACY));
}

static void fill_tensor(dlpack_tensor *tensor, exported *self, const acre_array *view,
                        dlpack_device device) {
  memcpy(self->shape, view->shape, sizeof self->shape);
  memcpy(self->strides, view->strides, sizeof self->strides);
  tensor->data = (void *)view->data;
  tensor->device = device;
  tensor->ndim = view->ndim;
  tensor->dtype.code = view->dtype == ACRE_BF16 ? DLPACK_BFLOAT : DLPACK_FLOAT;
  tensor->dtype.bits = (uint8_t)(8 * acre_dtype_size(view->dtype));
  tensor->dtype.lanes = 1;
  tensor->shape = self->shape;
  tensor->strides = self->strides;
}

PyObject *dlpack_export(const acre_array *view, acre_buffer *owner, dlpack_device device,
                        bool versioned, uint64_t flags) {
  exported *self = calloc(1, sizeof *self);
  if (!self) return PyErr_NoMemory();
  if (versioned) {
    dlpack_versioned *managed = &self->managed.versioned;
    managed->major = 1;
    managed->minor = 1;
    managed->context = self;
    managed->deleter = delete_versioned;
    managed->flags = flags;
    fill_tensor(&managed->tensor, self, view, device);
  } else {
    dlpack_legacy *managed = &self->managed.legacy;
    managed->context = self;
    managed->deleter = delete_legacy;
    fill_tensor(&managed->tensor, self, view, device);
  }
  PyObject *capsule =
      PyCapsule_New(&self->managed, versioned ? VERSIONED : LEGACY, destroy_capsule);
  if (!capsule) {
    free(self);
    return NULL;
  }
  acre_buffer_retain(owner);
  self->owner = owner;
  return capsule;
}
