/* acre._core.Engine: a device and its threads. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"

/* A device name of None means the default, as an `isa` of None does. */
static int optional_text(PyObject *object, const char *name, const char **out) {
  return !object || object == Py_None ? 0 : argument_text(object, name, out);
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"device", "threads", "isa", "plugin", "libraries", NULL};
  PyObject *device = NULL, *threads = NULL, *isa = NULL, *plugin = NULL, *libraries = NULL;
  acre_engine_options options = acre_engine_options_default();
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOOOO:Engine", names, &device, &threads,
                                   &isa, &plugin, &libraries) ||
      optional_text(device, "device", &options.device) < 0 ||
      (threads && argument_int32(threads, "threads", &options.threads) < 0) ||
      optional_text(isa, "isa", &options.isa) < 0 ||
      optional_text(plugin, "plugin", &options.plugin) < 0 ||
      optional_text(libraries, "libraries", &options.libraries) < 0)
    return NULL;
  engine_object *self = (engine_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_engine_open(&self->engine, &options, &error));
  if (status == ACRE_OK) return (PyObject *)self;
  errors_raise(PyType_GetModuleState(type), &error);
  Py_DECREF(self);
  return NULL;
}

static int engine_traverse(PyObject *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  return 0;
}

static void engine_dealloc(engine_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_engine_release(self->engine);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *engine_device(engine_object *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(acre_engine_device(self->engine));
}

static PyObject *engine_threads(engine_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLong(acre_engine_threads(self->engine));
}

static PyObject *engine_isa(engine_object *self, void *closure) {
  (void)closure;
  return PyUnicode_FromString(acre_engine_isa(self->engine));
}

static PyObject *engine_bytes(engine_object *self, void *closure) {
  (void)closure;
  return PyLong_FromSize_t(acre_engine_bytes(self->engine));
}

static PyObject *engine_peak_bytes(engine_object *self, void *closure) {
  (void)closure;
  return PyLong_FromSize_t(acre_engine_peak_bytes(self->engine));
}

static PyObject *engine_host_bytes(engine_object *self, void *closure) {
  (void)closure;
  return PyLong_FromSize_t(acre_engine_host_bytes(self->engine));
}

static PyObject *engine_reset_peak(engine_object *self, PyObject *unused) {
  (void)unused;
  acre_engine_reset_peak(self->engine);
  Py_RETURN_NONE;
}

/* NumPy's name for elements of this kind; bfloat16 has none and is given as its bits. */
static void dtype_of(const foreign_array *array, char *out, size_t size) {
  static const char *const names[] = {"int", "uint", "float", "uint", "bool"};
  if (array->kind == ELEMENT_BOOL)
    PyOS_snprintf(out, size, "bool");
  else
    PyOS_snprintf(out, size, "%s%d", names[array->kind], 8 * array->item_size);
}

static void copy_elements(const foreign_array *array, char *out) {
  int64_t index[ACRE_MAX_DIMS] = {0}, count = 1;
  for (int a = 0; a < array->ndim; ++a) count *= array->shape[a];
  for (int64_t i = 0; i < count; ++i, out += array->item_size) {
    int64_t element = 0;
    for (int a = 0; a < array->ndim; ++a) element += index[a] * array->strides[a];
    memcpy(out, (const char *)array->data + element * array->item_size,
           (size_t)array->item_size);
    for (int a = array->ndim; a-- > 0;) {
      if (++index[a] < array->shape[a]) break;
      index[a] = 0;
    }
  }
}

static PyObject *engine_fetch(engine_object *self, PyObject *object) {
  binding_state *state = state_of((PyObject *)self);
  foreign_array array;
  if (PyErr_CheckSignals() < 0 ||
      foreign_take_for(&array, object, "array", "an array", self->engine) < 0)
    return NULL;
  PyObject *result = NULL;
  Py_buffer buffer;
  char dtype[16];
  dtype_of(&array, dtype, sizeof dtype);
  if (foreign_land(state, &array, "array", self->engine) == 0)
    result = result_array(dtype, array.ndim, array.shape, &buffer);
  if (result) {
    WITHOUT_GIL(copy_elements(&array, buffer.buf));
    PyBuffer_Release(&buffer);
  }
  foreign_drop(&array);
  return result;
}

PyDoc_STRVAR(fetch_doc,
             "fetch($self, array, /)\n--\n\n"
             "A copy of an array as NumPy's, also from this engine's GPU (DLPack).\n\n"
             "bfloat16 comes as its 16 bits, uint16. Raises ValueError for an array of\n"
             "another device.");

static PyMethodDef engine_methods[] = {
    {"fetch", (PyCFunction)engine_fetch, METH_O, fetch_doc},
    {"reset_peak", (PyCFunction)engine_reset_peak, METH_NOARGS,
     PyDoc_STR("reset_peak($self, /)\n--\n\nLets peak_bytes start again from bytes.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef engine_getset[] = {
    {"device", (getter)engine_device, NULL, PyDoc_STR("Its name: 'cpu' or 'cuda:N'."),
     NULL},
    {"threads", (getter)engine_threads, NULL, PyDoc_STR("Worker threads in use."), NULL},
    {"isa", (getter)engine_isa, NULL, PyDoc_STR("Instruction set in use, e.g. 'avx2'."),
     NULL},
    {"bytes", (getter)engine_bytes, NULL,
     PyDoc_STR("Bytes now held by weights, caches and scratch memory."), NULL},
    {"peak_bytes", (getter)engine_peak_bytes, NULL,
     PyDoc_STR("Most bytes held at once since the last reset_peak()."), NULL},
    {"host_bytes", (getter)engine_host_bytes, NULL,
     PyDoc_STR("Bytes of pinned host memory now held for a device apart from the host."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    engine_doc,
    "Engine(device='cpu', threads=0, isa=None, plugin=None, libraries=None)\n--\n\n"
    "A device and its threads; models are created on one and share it.\n\n"
    "device: 'cpu', 'cuda' or 'cuda:N'; for CUDA, plugin is the backend's file and\n"
    "libraries the directories, ':' between, to look for cuBLASLt in first.\n"
    "threads: worker threads including the caller's; 0 = all usable cores.\n"
    "isa: None = the best of this processor; 'scalar', 'avx2', 'avx512' or\n"
    "'avx512_bf16' cap the choice. Raises ValueError, or NotImplementedError\n"
    "for a device or instruction set that this build or machine lacks.");

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, (void *)engine_doc},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_traverse, engine_traverse},
    {Py_tp_methods, engine_methods},
    {Py_tp_getset, engine_getset},
    {0, NULL},
};

PyType_Spec engine_spec = {
    .name = "acre._core.Engine",
    .basicsize = sizeof(engine_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};
