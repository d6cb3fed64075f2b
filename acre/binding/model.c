/* acre._core.Model: configuration and weights, immutable once ready.
 *
 * Binding belongs to one thread at a time: a second one is answered BusyError. What
 * needs weights asks for `ready` here first, so that C never sees a model that another
 * thread is still filling. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"
#include "records.h"

acre_model *model_take_ready(const binding_state *state, PyObject *object,
                             const char *name) {
  if (argument_instance(object, state->model, name) < 0) return NULL;
  model_object *self = (model_object *)object;
  if (atomic_load(&self->ready)) return self->model;
  PyErr_Format(PyExc_RuntimeError, "%s: not ready, call ready() after the last bind()",
               name);
  return NULL;
}

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"engine", "config", NULL};
  binding_state *state = PyType_GetModuleState(type);
  PyObject *engine, *config;
  acre_model_config values = acre_model_config_default();
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:Model", names, &engine, &config) ||
      argument_instance(engine, state->engine, "engine") < 0 ||
      record_from_dict(&record_model_config, &values, config) < 0)
    return NULL;
  model_object *self = (model_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->engine = Py_NewRef(engine);
  atomic_init(&self->in_use, false);
  atomic_init(&self->ready, false);
  acre_engine *device = ((engine_object *)engine)->engine;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_model_create(&self->model, device, &values, &error));
  if (status == ACRE_OK) return (PyObject *)self;
  errors_raise(state, &error);
  Py_DECREF(self);
  return NULL;
}

static int model_traverse(model_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->engine);
  return 0;
}

static void model_dealloc(model_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_model_release(self->model);
  Py_XDECREF(self->engine);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ------------------------------------------------------------------ weights */

static int enter(model_object *self) {
  if (!atomic_exchange(&self->in_use, true)) return 0;
  PyErr_SetString(state_of((PyObject *)self)->busy_error,
                  "model: bind() or ready() is running on another thread");
  return -1;
}

static PyObject *leave(model_object *self, acre_status status, const acre_error *error) {
  atomic_store(&self->in_use, false);
  if (status != ACRE_OK) return errors_raise(state_of((PyObject *)self), error);
  Py_RETURN_NONE;
}

static PyObject *model_bind(model_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"name", "array", "dtype", NULL};
  PyObject *name_object, *array_object, *dtype_object = Py_None;
  const char *name, *dtype = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:bind", names, &name_object,
                                   &array_object, &dtype_object) ||
      argument_text(name_object, "name", &name) < 0)
    return NULL;
  if (dtype_object != Py_None && argument_text(dtype_object, "dtype", &dtype) < 0)
    return NULL;
  if (PyErr_CheckSignals() < 0) return NULL;
  foreign_array foreign;
  if (foreign_take_for(&foreign, array_object, name, "an array of floats",
                       acre_model_engine(self->model)) < 0)
    return NULL;
  acre_array array;
  PyObject *result = NULL;
  if (foreign_floats(&foreign, dtype, name, &array) == 0 && enter(self) == 0) {
    acre_error error;
    acre_status status;
    WITHOUT_GIL(status = acre_model_bind(self->model, name, &array, &error));
    result = leave(self, status, &error);
  }
  foreign_drop(&foreign);
  return result;
}

static PyObject *model_ready(model_object *self, PyObject *unused) {
  (void)unused;
  if (PyErr_CheckSignals() < 0 || enter(self) < 0) return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_model_ready(self->model, &error));
  if (status == ACRE_OK) atomic_store(&self->ready, true);
  return leave(self, status, &error);
}

/* ------------------------------------------------------------------ questions */

static PyObject *model_plan(model_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"n",   "proxy",   "interval", "window", "stride", "carry",
                          "eta", "reserve", "weight",   "sink",   "l2",     NULL};
  PyObject *n_object, *values[RECORD_MAX_FIELDS] = {NULL};
  acre_build_options options = acre_build_options_default();
  int64_t n;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOOOO:plan", names, &n_object,
                                   &values[0], &values[1], &values[2], &values[3],
                                   &values[4], &values[5], &values[6], &values[7],
                                   &values[8], &values[9]) ||
      argument_int64(n_object, "n", &n) < 0 ||
      record_from_values(&record_build_options, &options, values) < 0)
    return NULL;
  acre_plan plan;
  acre_error error;
  if (acre_plan_build(&plan, self->model, &options, n, &error) != ACRE_OK)
    return errors_raise(state_of((PyObject *)self), &error);
  return record_to_dict(&record_plan, &plan);
}

static PyObject *model_config(model_object *self, void *closure) {
  (void)closure;
  return record_to_dict(&record_model_config, acre_model_get_config(self->model));
}

static PyObject *model_has_l1(model_object *self, void *closure) {
  (void)closure;
  return PyBool_FromLong(atomic_load(&self->ready) && acre_model_has_l1(self->model));
}

static PyObject *model_engine(model_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->engine);
}

/* ------------------------------------------------------------------ type */

PyDoc_STRVAR(
    bind_doc,
    "bind($self, /, name, array, dtype=None)\n--\n\n"
    "Copies one tensor by its Hugging Face name.\n\n"
    "array: float16, bfloat16, float32 or float64 of the shape that the\n"
    "configuration asks for, any strides: a NumPy array, a DLPack producer or\n"
    "capsule on the CPU, or a producer on the engine's own GPU, whose numbers stay\n"
    "there. With dtype='bf16' 16-bit integers are bfloat16 bits.\n"
    "Nothing of it is kept. Binding a name twice replaces the tensor. Raises\n"
    "ValueError for an unknown name, another shape or dtype, NaN or infinity,\n"
    "RuntimeError after ready().");
PyDoc_STRVAR(ready_doc,
             "ready($self, /)\n--\n\n"
             "Checks that every tensor came and fixes the model.\n\n"
             "Missing L1 parameters get their untrained values. Raises RuntimeError that\n"
             "names a missing tensor; more may then be bound.");
PyDoc_STRVAR(plan_doc,
             "plan($self, /, n, *, proxy='pooled', interval=0, window=4096, stride=2048, "
             "carry=0, eta=4096, reserve=0, weight=0, sink=0, l2='auto')\n--\n\n"
             "What a text of n tokens would become: the resolved options, the numbers\n"
             "of entries and the bytes, on the device (peak_bytes) and of host memory\n"
             "beside it (host_bytes); l2: 'device' or 'host', by what is free now where\n"
             "'auto' was asked for. Does no work; needs no weights. Raises ValueError\n"
             "for impossible options and TooLongError for a text that does not fit.");
PyDoc_STRVAR(model_doc,
             "Model(engine, config)\n--\n\n"
             "A transformer of the Llama or Qwen2 family on an engine.\n\n"
             "config: a dict with the fields of acre_model_config; vocab_size, hidden,\n"
             "layers, heads, kv_heads, head_dim, ffn and w_max are required; rms_eps,\n"
             "rope (a dict with 'kind' and its fields), tied_head, dtype ('f32' or\n"
             "'bf16') and eos_id have defaults. bind() every tensor, then ready().");

static PyMethodDef model_methods[] = {
    {"bind", KEYWORD_METHOD(model_bind), METH_VARARGS | METH_KEYWORDS, bind_doc},
    {"ready", (PyCFunction)model_ready, METH_NOARGS, ready_doc},
    {"plan", KEYWORD_METHOD(model_plan), METH_VARARGS | METH_KEYWORDS, plan_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"config", (getter)model_config, NULL,
     PyDoc_STR("The whole configuration, a new dict."), NULL},
    {"has_l1", (getter)model_has_l1, NULL,
     PyDoc_STR("Whether trained L1 parameters were bound; False until ready()."), NULL},
    {"engine", (getter)model_engine, NULL, PyDoc_STR("The model's engine."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)model_doc},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_traverse, model_traverse},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {0, NULL},
};

PyType_Spec model_spec = {
    .name = "acre._core.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};
