/* acre._core.Builder: reads a text window by window, gives a Cache.
 *
 * The loop is the caller's: one step() is one window, so progress and interruption need
 * nothing from here. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"
#include "records.h"

typedef struct builder_object {
  PyObject_HEAD acre_builder *builder;
  PyObject *model;
} builder_object;

typedef struct builder_arguments {
  PyObject *model, *ids, *base, *keep, *losses;
  PyObject *options[RECORD_MAX_FIELDS];
} builder_arguments;

/* What a continuation starts from: an option beside `base` would contradict the cache.
 */
static int read_base(const binding_state *state, const builder_arguments *args,
                     const acre_cache **from, int64_t *keep) {
  for (int i = 0; i < record_build_options.count; ++i)
    if (args->options[i]) {
      PyErr_Format(PyExc_TypeError, "%s: not allowed with base, whose options hold",
                   record_build_options.fields[i].name);
      return -1;
    }
  if (argument_instance(args->base, state->cache, "base") < 0) return -1;
  *from = ((cache_object *)args->base)->cache;
  *keep = acre_cache_plan(*from)->n;
  return args->keep ? argument_int64(args->keep, "keep", keep) : 0;
}

/* The builder told to keep losses where `losses` is true; NULL with an exception, and the
 * builder released, where that fails. */
static acre_builder *with_losses(const binding_state *state, acre_builder *builder,
                                 bool losses) {
  acre_error error;
  if (!losses || acre_builder_keep_losses(builder, &error) == ACRE_OK) return builder;
  acre_builder_release(builder);
  errors_raise(state, &error);
  return NULL;
}

static acre_builder *open_builder(const binding_state *state,
                                  const builder_arguments *args) {
  bool losses = false;
  if (args->losses && argument_bool(args->losses, "losses", &losses) < 0) return NULL;
  acre_model *model = model_take_ready(state, args->model, "model");
  if (!model) return NULL;
  acre_build_options options = acre_build_options_default();
  const acre_cache *from = NULL;
  int64_t keep = 0, n;
  if (args->base && args->base != Py_None) {
    if (read_base(state, args, &from, &keep) < 0) return NULL;
  } else if (args->keep && args->keep != Py_None) {
    PyErr_SetString(PyExc_TypeError, "keep: got a value, expected none without base");
    return NULL;
  } else if (record_from_values(&record_build_options, &options, args->options) < 0) {
    return NULL;
  }
  int32_t *ids;
  if (ids_take(args->ids, "ids", &ids, &n) < 0) return NULL;
  acre_builder *builder = NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_builder_open(&builder, model, from ? NULL : &options, from,
                                         keep, ids, n, &error));
  PyMem_RawFree(ids);
  if (status != ACRE_OK) {
    errors_raise(state, &error);
    return NULL;
  }
  return with_losses(state, builder, losses);
}

static PyObject *builder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "ids",  "proxy",   "interval", "window", "stride",
                          "carry", "eta",  "reserve", "weight",   "sink",   "l2",
                          "base",  "keep", "losses",  NULL};
  builder_arguments a = {0};
  PyObject **o = a.options;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$OOOOOOOOOOOOO:Builder", names,
                                   &a.model, &a.ids, &o[0], &o[1], &o[2], &o[3], &o[4],
                                   &o[5], &o[6], &o[7], &o[8], &o[9], &a.base, &a.keep,
                                   &a.losses))
    return NULL;
  if (a.keep == Py_None) a.keep = NULL;
  builder_object *self = (builder_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->model = Py_NewRef(a.model);
  self->builder = open_builder(PyType_GetModuleState(type), &a);
  if (self->builder) return (PyObject *)self;
  Py_DECREF(self);
  return NULL;
}

static int builder_traverse(builder_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->model);
  return 0;
}

static void builder_dealloc(builder_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_builder_release(self->builder);
  Py_XDECREF(self->model);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *builder_step(builder_object *self, PyObject *unused) {
  (void)unused;
  if (PyErr_CheckSignals() < 0) return NULL;
  int64_t done, total;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_builder_step(self->builder, &done, &total, &error));
  if (status != ACRE_OK) return errors_raise(state_of((PyObject *)self), &error);
  return Py_BuildValue("(LL)", (long long)done, (long long)total);
}

static PyObject *builder_freeze(builder_object *self, PyObject *unused) {
  (void)unused;
  binding_state *state = state_of((PyObject *)self);
  if (PyErr_CheckSignals() < 0) return NULL;
  cache_object *result = cache_new(state, self->model);
  if (!result) return NULL;
  acre_cache *cache;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_builder_freeze(self->builder, &cache, &error));
  if (status == ACRE_OK) return cache_finish(result, cache);
  Py_DECREF(result);
  return errors_raise(state, &error);
}

static PyObject *builder_model(builder_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->model);
}

static PyObject *builder_losses(builder_object *self, PyObject *unused) {
  (void)unused;
  int64_t shape[1] = {acre_builder_tokens(self->builder)};
  Py_buffer buffer;
  PyObject *losses = result_array("float32", 1, shape, &buffer);
  if (!losses) return NULL;
  acre_error error;
  acre_status status = acre_builder_losses(buffer.buf, self->builder, &error);
  PyBuffer_Release(&buffer);
  if (status == ACRE_OK) return losses;
  Py_DECREF(losses);
  return errors_raise(state_of((PyObject *)self), &error);
}

PyDoc_STRVAR(step_doc,
             "step($self, /)\n--\n\n"
             "Reads at most one window; returns (tokens read so far, tokens in all).\n\n"
             "Finished when the two are equal. Raises BusyError where another thread is\n"
             "at it; after DeviceError the builder is useless.");
PyDoc_STRVAR(freeze_doc,
             "freeze($self, /)\n--\n\n"
             "Ends a finished build and returns its Cache; the builder is spent.\n\n"
             "Raises RuntimeError before the last step and after freeze().");
PyDoc_STRVAR(losses_doc,
             "losses($self, /)\n--\n\n"
             "-log p of every token in nats, float32 [n], given what it may see before "
             "it.\n\n"
             "nan for the first token and for those not read by this builder. Raises\n"
             "RuntimeError where the builder was not opened with losses=True.");
PyDoc_STRVAR(
    builder_doc,
    "Builder(model, ids, *, proxy='pooled', interval=0, window=4096, stride=2048, "
    "carry=0, eta=4096, reserve=0, weight=0, sink=0, l2='auto', base=None, keep=None, "
    "losses=False)\n--\n\n"
    "Reads token ids [n] into a bi-layer cache, one window per step().\n\n"
    "ids: a one-dimensional array or sequence of integers, each within the "
    "vocabulary.\n"
    "interval: L1/L2 interval l, 0 = the least that fits. window, stride: L2 tokens "
    "of\n"
    "the first and of later windows. carry: L2 tokens that stay attendable beyond "
    "their\n"
    "window. eta, reserve: positions to leave for refilling and for question and "
    "answer.\n"
    "l2: where the L2 cache lies: 'device', 'host' (pinned memory, where the device lies\n"
    "apart) or 'auto', the device where all fits there.\n"
    "With base, a Cache, that text is continued: its first keep tokens stay (default:\n"
    "all), ids follow them, and its options hold. losses: keep -log p of every token,\n"
    "for .losses. Raises ValueError, and TooLongError before any work.");

static PyMethodDef builder_methods[] = {
    {"step", (PyCFunction)builder_step, METH_NOARGS, step_doc},
    {"freeze", (PyCFunction)builder_freeze, METH_NOARGS, freeze_doc},
    {"losses", (PyCFunction)builder_losses, METH_NOARGS, losses_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef builder_getset[] = {
    {"model", (getter)builder_model, NULL, PyDoc_STR("The model that reads."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot builder_slots[] = {
    {Py_tp_doc, (void *)builder_doc},
    {Py_tp_new, builder_new},
    {Py_tp_dealloc, builder_dealloc},
    {Py_tp_traverse, builder_traverse},
    {Py_tp_methods, builder_methods},
    {Py_tp_getset, builder_getset},
    {0, NULL},
};

PyType_Spec builder_spec = {
    .name = "acre._core.Builder",
    .basicsize = sizeof(builder_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = builder_slots,
};
