/* acre._core.Tensor: a read-only view of cache bytes that C owns.
 *
 * It leaves through DLPack, the buffer protocol and numpy(). NumPy and the buffer
 * protocol have no bfloat16: there its elements are the 16 bits as uint16, and numpy()
 * converts. A tensor on a GPU leaves there through DLPack without a copy; what wants it on the
 * host gets a copy, made once. */
#include <stdlib.h>

#include "arguments.h"
#include "arrays.h"
#include "errors.h"

typedef struct tensor_object {
  PyObject_HEAD acre_array view;
  acre_buffer *owner;
  PyObject *engine;
  _Atomic(acre_buffer *) home; /* a copy on the host of what lies on a GPU; NULL: not yet */
  Py_ssize_t shape[ACRE_MAX_DIMS], byte_strides[ACRE_MAX_DIMS]; /* for Py_buffer */
} tensor_object;

PyObject *tensor_new(const binding_state *state, const acre_array *view, acre_buffer *owner,
                     PyObject *engine) {
  tensor_object *self = (tensor_object *)state->tensor->tp_alloc(state->tensor, 0);
  if (!self) {
    acre_buffer_release(owner);
    return NULL;
  }
  self->view = *view;
  self->owner = owner;
  self->engine = Py_NewRef(engine);
  atomic_init(&self->home, NULL);
  for (int i = 0; i < view->ndim; ++i) {
    self->shape[i] = (Py_ssize_t)view->shape[i];
    self->byte_strides[i] =
        (Py_ssize_t)(view->strides[i] * (int64_t)acre_dtype_size(view->dtype));
  }
  return (PyObject *)self;
}

static int tensor_traverse(tensor_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->engine);
  return 0;
}

static void tensor_dealloc(tensor_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_buffer_release(self->owner);
  acre_buffer_release(atomic_load(&self->home));
  Py_XDECREF(self->engine);
  type->tp_free(self);
  Py_DECREF(type);
}

static int64_t element_count(const acre_array *view) {
  int64_t count = 1;
  for (int i = 0; i < view->ndim; ++i) count *= view->shape[i];
  return count;
}

static acre_engine *engine_of(const tensor_object *self) {
  return ((engine_object *)self->engine)->engine;
}

/* The view on the host, and who owns that (borrowed). Two threads may both copy; one copy
 * stays. */
static int at_home(tensor_object *self, acre_array *view, acre_buffer **owner) {
  *view = self->view;
  *owner = self->owner;
  if (!view->on_device) return 0;
  acre_buffer *home = atomic_load(&self->home), *made;
  view->on_device = false;
  if (!home) {
    acre_array copy = self->view;
    acre_error error;
    acre_status status;
    WITHOUT_GIL(status = acre_engine_copy(engine_of(self), &copy, true, &made, &error));
    if (status != ACRE_OK) {
      errors_raise(state_of((PyObject *)self), &error);
      return -1;
    }
    if (atomic_compare_exchange_strong(&self->home, &home, made))
      home = made;
    else
      acre_buffer_release(made);
  }
  view->data = acre_buffer_data(home);
  *owner = home;
  return 0;
}

/* ------------------------------------------------------------------ buffer protocol */

static const char *refusal(const Py_buffer *view, int flags) {
  if (flags & PyBUF_WRITABLE) return "Tensor: the bytes are read-only";
  bool any_layout = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
  char order = 0;
  if (!any_layout || (flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS)
    order = 'C';
  else if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS)
    order = 'F';
  else if ((flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS)
    order = 'A';
  if (order && !PyBuffer_IsContiguous(view, order))
    return "Tensor: the view is not contiguous as asked for";
  return NULL;
}

static int tensor_getbuffer(tensor_object *self, Py_buffer *out, int flags) {
  size_t item_size = acre_dtype_size(self->view.dtype);
  *out = (Py_buffer){
      .len = (Py_ssize_t)(element_count(&self->view) * (int64_t)item_size),
      .itemsize = (Py_ssize_t)item_size,
      .readonly = 1,
      .ndim = self->view.ndim,
      .format = self->view.dtype == ACRE_F32 ? "f" : "H",
      .shape = self->shape,
      .strides = self->byte_strides,
  };
  const char *reason = refusal(out, flags);
  if (reason) {
    PyErr_SetString(PyExc_BufferError, reason);
    return -1;
  }
  acre_array home;
  acre_buffer *owner;
  if (at_home(self, &home, &owner) < 0) return -1;
  out->buf = (void *)home.data;
  if (!(flags & PyBUF_FORMAT)) out->format = NULL;
  if ((flags & PyBUF_STRIDES) != PyBUF_STRIDES) out->strides = NULL;
  if (!(flags & PyBUF_ND)) out->shape = NULL;
  out->obj = Py_NewRef(self);
  return 0;
}

/* ------------------------------------------------------------------ copies */

/* Row-major copy; elements are 2 or 4 bytes, `widen` turns bfloat16 into float32. */
static void copy_elements(const acre_array *view, void *out, bool widen) {
  int64_t index[ACRE_MAX_DIMS] = {0}, count = element_count(view);
  for (int64_t i = 0; i < count; ++i) {
    int64_t element = 0;
    for (int a = 0; a < view->ndim; ++a) element += index[a] * view->strides[a];
    if (view->dtype != ACRE_BF16)
      ((uint32_t *)out)[i] = ((const uint32_t *)view->data)[element];
    else if (widen)
      ((uint32_t *)out)[i] = (uint32_t)((const uint16_t *)view->data)[element] << 16;
    else
      ((uint16_t *)out)[i] = ((const uint16_t *)view->data)[element];
    for (int a = view->ndim; a-- > 0;) {
      if (++index[a] < view->shape[a]) break;
      index[a] = 0;
    }
  }
}

static PyObject *tensor_numpy(tensor_object *self, PyObject *unused) {
  (void)unused;
  if (self->view.dtype == ACRE_F32) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy) return NULL;
    PyObject *array = PyObject_CallMethod(numpy, "asarray", "(O)", self);
    Py_DECREF(numpy);
    return array;
  }
  Py_buffer buffer;
  acre_array home;
  acre_buffer *owner;
  if (at_home(self, &home, &owner) < 0) return NULL;
  PyObject *array = result_array("float32", home.ndim, home.shape, &buffer);
  if (!array) return NULL;
  WITHOUT_GIL(copy_elements(&home, buffer.buf, true));
  PyBuffer_Release(&buffer);
  return array;
}

/* A copy of the view in memory of its own, on the host or where it lies. *owner is the caller's
 * reference. */
static int copy_view(const tensor_object *self, acre_array *view, bool to_host,
                     acre_buffer **owner) {
  *view = self->view;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_engine_copy(engine_of(self), view, to_host, owner, &error));
  if (status == ACRE_OK) return 0;
  errors_raise(state_of((PyObject *)self), &error);
  return -1;
}

/* ------------------------------------------------------------------ DLPack */

typedef struct dlpack_request {
  bool versioned, copy, no_copy, to_host;
} dlpack_request;

static dlpack_device device_of(const tensor_object *self) {
  if (!self->view.on_device) return (dlpack_device){DLPACK_CPU, 0};
  return dlpack_device_of(engine_of(self));
}

static int read_pair(PyObject *object, const char *name, int64_t *first, int64_t *second) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2)
    return argument_refuse(object, name, "a tuple of two integers or None");
  if (argument_int64(PyTuple_GET_ITEM(object, 0), name, first) < 0) return -1;
  return argument_int64(PyTuple_GET_ITEM(object, 1), name, second);
}

/* Where the consumer wants it: where it lies, or on the host. */
static int read_device(const tensor_object *self, PyObject *device,
                       dlpack_request *request) {
  dlpack_device own = device_of(self);
  int64_t type = own.type, id = own.id;
  if (device != Py_None && read_pair(device, "dl_device", &type, &id) < 0) return -1;
  request->to_host = type == DLPACK_CPU && id == 0;
  if (request->to_host || (type == own.type && id == own.id)) return 0;
  if (own.type == DLPACK_CPU)
    PyErr_Format(PyExc_BufferError, "dl_device: got %R, expected the cpu, (1, 0)", device);
  else
    PyErr_Format(PyExc_BufferError,
                 "dl_device: got %R, expected (2, %d) or the cpu, (1, 0)", device, own.id);
  return -1;
}

static int read_request(const tensor_object *self, PyObject *args, PyObject *kwargs,
                        dlpack_request *request) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream,
                                   &version, &device, &copy))
    return -1;
  int64_t major = 0, minor = 0;
  if (version != Py_None && read_pair(version, "max_version", &major, &minor) < 0)
    return -1;
  if (copy != Py_None && argument_bool(copy, "copy", &request->copy) < 0) return -1;
  request->no_copy = copy != Py_None && !request->copy;
  request->versioned = major >= 1;
  if (dlpack_check_stream(stream, device_of(self).type) < 0) return -1;
  if (read_device(self, device, request) < 0) return -1;
  if (!request->to_host || !request->no_copy || !self->view.on_device) return 0;
  PyErr_SetString(PyExc_BufferError,
                  "copy: got False, but from a GPU to the cpu there is no way without");
  return -1;
}

static PyObject *tensor_dlpack(tensor_object *self, PyObject *args, PyObject *kwargs) {
  dlpack_request request = {false};
  if (read_request(self, args, kwargs, &request) < 0) return NULL;
  acre_array view = self->view;
  acre_buffer *owner = self->owner;
  dlpack_device device = request.to_host ? (dlpack_device){DLPACK_CPU, 0} : device_of(self);
  if (!request.copy) {
    if (request.to_host && at_home(self, &view, &owner) < 0) return NULL;
    return dlpack_export(&view, owner, device, request.versioned, DLPACK_FLAG_READ_ONLY);
  }
  if (copy_view(self, &view, request.to_host, &owner) < 0) return NULL;
  PyObject *capsule =
      dlpack_export(&view, owner, device, request.versioned, DLPACK_FLAG_COPIED);
  acre_buffer_release(owner);
  return capsule;
}

static PyObject *tensor_dlpack_device(tensor_object *self, PyObject *unused) {
  (void)unused;
  dlpack_device device = device_of(self);
  return Py_BuildValue("(ii)", device.type, device.id);
}

/* ------------------------------------------------------------------ attributes */

static PyObject *tuple_of(const int64_t *values, int count) {
  PyObject *tuple = PyTuple_New(count);
  for (int i = 0; tuple && i < count; ++i) {
    PyObject *value = PyLong_FromLongLong(values[i]);
    if (value)
      PyTuple_SET_ITEM(tuple, i, value);
    else
      Py_CLEAR(tuple);
  }
  return tuple;
}

static PyObject *tensor_shape(tensor_object *self, void *closure) {
  (void)closure;
  return tuple_of(self->view.shape, self->view.ndim);
}

static PyObject *tensor_strides(tensor_object *self, void *closure) {
  (void)closure;
  return tuple_of(self->view.strides, self->view.ndim);
}

static PyObject *tensor_dtype(tensor_object *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(acre_dtype_name(self->view.dtype));
}

static PyObject *tensor_nbytes(tensor_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(element_count(&self->view) *
                             (int64_t)acre_dtype_size(self->view.dtype));
}

static PyObject *tensor_device(tensor_object *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(self->view.on_device ? acre_engine_device(engine_of(self))
                                                   : "cpu");
}

/* ------------------------------------------------------------------ type */

PyDoc_STRVAR(numpy_doc,
             "numpy($self, /)\n--\n\n"
             "The tensor as a float32 array: a read-only view of float32 tensors, a\n"
             "converted copy of bfloat16 ones.");
PyDoc_STRVAR(dlpack_doc,
             "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, "
             "copy=None)\n--\n\n"
             "A DLPack capsule: versioned and marked read-only from max_version (1, 0)\n"
             "on, else a legacy one, which must be treated as read-only. copy=True gives\n"
             "writable bytes of the consumer's own. On a GPU the bytes are complete for\n"
             "every stream, so that none is waited for; stream=0 is refused, and\n"
             "dl_device=(1, 0) gives a copy on the cpu. Raises BufferError for any other\n"
             "device than the tensor's, and for a stream on the cpu.");
PyDoc_STRVAR(device_doc,
             "__dlpack_device__($self, /)\n--\n\n"
             "(1, 0): the cpu, or (2, N): GPU N.");
PyDoc_STRVAR(tensor_doc,
             "A read-only view of a cache tensor [rows, g, d], made by Cache.view().\n\n"
             "It keeps the bytes alive. Exports DLPack and the buffer protocol (bfloat16\n"
             "there as uint16 bits).");

static PyMethodDef tensor_methods[] = {
    {"numpy", (PyCFunction)tensor_numpy, METH_NOARGS, numpy_doc},
    {"__dlpack__", KEYWORD_METHOD(tensor_dlpack), METH_VARARGS | METH_KEYWORDS, dlpack_doc},
    {"__dlpack_device__", (PyCFunction)tensor_dlpack_device, METH_NOARGS, device_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef tensor_getset[] = {
    {"shape", (getter)tensor_shape, NULL, PyDoc_STR("Rows, KV heads, head dim."), NULL},
    {"strides", (getter)tensor_strides, NULL, PyDoc_STR("In elements."), NULL},
    {"dtype", (getter)tensor_dtype, NULL, PyDoc_STR("'f32' or 'bf16'."), NULL},
    {"nbytes", (getter)tensor_nbytes, NULL, PyDoc_STR("Bytes of the elements."), NULL},
    {"device", (getter)tensor_device, NULL,
     PyDoc_STR("Where it lies: 'cpu' or the engine's 'cuda:N'."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tensor_slots[] = {
    {Py_tp_doc, (void *)tensor_doc},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_traverse, tensor_traverse},
    {Py_tp_methods, tensor_methods},
    {Py_tp_getset, tensor_getset},
    {Py_bf_getbuffer, tensor_getbuffer},
    {0, NULL},
};

PyType_Spec tensor_spec = {
    .name = "acre._core.Tensor",
    .basicsize = sizeof(tensor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = tensor_slots,
};
