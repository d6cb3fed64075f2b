/* acre._core.Tensor: a read-only view of cache bytes that C owns.
 *
 * It leaves through DLPack, the buffer protocol and numpy(). NumPy and the buffer
 * protocol have no bfloat16: there its elements are the 16 bits as uint16, and numpy()
 * converts. */
#include <stdlib.h>

#include "arguments.h"
#include "arrays.h"
#include "errors.h"

typedef struct tensor_object {
  PyObject_HEAD acre_array view;
  acre_buffer *owner;
  Py_ssize_t shape[ACRE_MAX_DIMS], byte_strides[ACRE_MAX_DIMS]; /* for Py_buffer */
} tensor_object;

PyObject *tensor_new(const binding_state *state, const acre_array *view,
                     acre_buffer *owner) {
  tensor_object *self = (tensor_object *)state->tensor->tp_alloc(state->tensor, 0);
  if (!self) {
    acre_buffer_release(owner);
    return NULL;
  }
  self->view = *view;
  self->owner = owner;
  for (int i = 0; i < view->ndim; ++i) {
    self->shape[i] = (Py_ssize_t)view->shape[i];
    self->byte_strides[i] =
        (Py_ssize_t)(view->strides[i] * (int64_t)acre_dtype_size(view->dtype));
  }
  return (PyObject *)self;
}

static int tensor_traverse(PyObject *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  return 0;
}

static void tensor_dealloc(tensor_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_buffer_release(self->owner);
  type->tp_free(self);
  Py_DECREF(type);
}

static int64_t element_count(const acre_array *view) {
  int64_t count = 1;
  for (int i = 0; i < view->ndim; ++i) count *= view->shape[i];
  return count;
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
      .buf = (void *)self->view.data,
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
  PyObject *array = result_array("float32", self->view.ndim, self->view.shape, &buffer);
  if (!array) return NULL;
  WITHOUT_GIL(copy_elements(&self->view, buffer.buf, true));
  PyBuffer_Release(&buffer);
  return array;
}

/* A compact copy of the view in bytes of its own; *owner is the caller's reference. */
static int copy_view(const tensor_object *self, acre_array *view, acre_buffer **owner) {
  *view = self->view;
  size_t size = (size_t)element_count(view) * acre_dtype_size(view->dtype);
  void *bytes = malloc(size ? size : 1);
  if (!bytes) {
    PyErr_NoMemory();
    return -1;
  }
  acre_error error;
  if (acre_buffer_wrap(owner, bytes, size, free, bytes, &error) != ACRE_OK) {
    free(bytes);
    errors_raise(state_of((PyObject *)self), &error);
    return -1;
  }
  WITHOUT_GIL(copy_elements(&self->view, bytes, false));
  view->data = bytes;
  int64_t stride = 1;
  for (int i = view->ndim; i-- > 0;) {
    view->strides[i] = stride;
    stride *= view->shape[i];
  }
  return 0;
}

/* ------------------------------------------------------------------ DLPack */

typedef struct dlpack_request {
  bool versioned, copy;
} dlpack_request;

static int read_pair(PyObject *object, const char *name, int64_t *first, int64_t *second) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2)
    return argument_refuse(object, name, "a tuple of two integers or None");
  if (argument_int64(PyTuple_GET_ITEM(object, 0), name, first) < 0) return -1;
  return argument_int64(PyTuple_GET_ITEM(object, 1), name, second);
}

static int read_request(PyObject *args, PyObject *kwargs, dlpack_request *request) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream,
                                   &version, &device, &copy))
    return -1;
  int64_t major = 0, minor = 0, type = DLPACK_CPU, id = 0;
  if (version != Py_None && read_pair(version, "max_version", &major, &minor) < 0)
    return -1;
  if (device != Py_None && read_pair(device, "dl_device", &type, &id) < 0) return -1;
  if (copy != Py_None && argument_bool(copy, "copy", &request->copy) < 0) return -1;
  request->versioned = major >= 1;
  if (stream != Py_None)
    PyErr_Format(PyExc_BufferError, "stream: got %R, expected None on the cpu", stream);
  else if (type != DLPACK_CPU || id != 0)
    PyErr_Format(PyExc_BufferError, "dl_device: got %R, expected the cpu, (1, 0)", device);
  else
    return 0;
  return -1;
}

static PyObject *tensor_dlpack(tensor_object *self, PyObject *args, PyObject *kwargs) {
  dlpack_request request = {false, false};
  if (read_request(args, kwargs, &request) < 0) return NULL;
  if (!request.copy)
    return dlpack_export(&self->view, self->owner, request.versioned,
                         DLPACK_FLAG_READ_ONLY);
  acre_array view;
  acre_buffer *owner;
  if (copy_view(self, &view, &owner) < 0) return NULL;
  PyObject *capsule = dlpack_export(&view, owner, request.versioned, DLPACK_FLAG_COPIED);
  acre_buffer_release(owner);
  return capsule;
}

static PyObject *tensor_dlpack_device(tensor_object *self, PyObject *unused) {
  (void)self;
  (void)unused;
  return Py_BuildValue("(ii)", DLPACK_CPU, 0);
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
             "writable bytes of the consumer's own. Raises BufferError for a stream or a\n"
             "device other than the cpu.");
PyDoc_STRVAR(device_doc,
             "__dlpack_device__($self, /)\n--\n\n"
             "(1, 0): the cpu.");
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
