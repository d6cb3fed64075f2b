/* The extension module acre._core: the C library's nouns as Python types.
 *
 * Initialised in phases with all of its state per module: it imports twice, in
 * subinterpreters with a GIL of their own and in free-threaded builds. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"

/* float32 [m] without copying where it is compact, else a copy. *own is for free. */
static const float *compact_scores(const acre_array *array, float **own) {
  *own = NULL;
  if (array->strides[0] == 1 || array->shape[0] <= 1) return array->data;
  *own = PyMem_RawMalloc((size_t)array->shape[0] * sizeof **own);
  if (!*own) return NULL;
  for (int64_t j = 0; j < array->shape[0]; ++j)
    (*own)[j] = ((const float *)array->data)[j * array->strides[0]];
  return *own;
}

static PyObject *select_into_array(const binding_state *state, const acre_array *scores,
                                   int64_t k) {
  float *own;
  const float *compact = compact_scores(scores, &own);
  if (!compact && scores->shape[0] > 1) return PyErr_NoMemory();
  Py_buffer buffer;
  PyObject *groups = result_array("int32", 1, &k, &buffer);
  if (groups) {
    acre_error error;
    acre_status status;
    WITHOUT_GIL(status =
                    acre_select_groups(buffer.buf, compact, scores->shape[0], k, &error));
    PyBuffer_Release(&buffer);
    if (status != ACRE_OK) {
      Py_CLEAR(groups);
      errors_raise(state, &error);
    }
  }
  PyMem_RawFree(own);
  return groups;
}

static PyObject *select_groups(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"scores", "k", NULL};
  PyObject *scores_object, *k_object, *result = NULL;
  int64_t k;
  foreign_array foreign;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:select_groups", names, &scores_object,
                                   &k_object) ||
      argument_int64(k_object, "k", &k) < 0 ||
      foreign_take(&foreign, scores_object, "scores", "a float32 array") < 0)
    return NULL;
  acre_array scores;
  if (foreign_floats(&foreign, NULL, "scores", &scores) == 0) {
    if (scores.ndim != 1 || scores.dtype != ACRE_F32)
      PyErr_Format(PyExc_ValueError, "scores: got %d dimensions of %s, expected 1 of f32",
                   scores.ndim, acre_dtype_name(scores.dtype));
    else if (k < 0 || k > scores.shape[0])
      PyErr_Format(PyExc_ValueError, "k: got %lld, expected 0 to m = %lld", (long long)k,
                   (long long)scores.shape[0]);
    else
      result = select_into_array(PyModule_GetState(module), &scores, k);
  }
  foreign_drop(&foreign);
  return result;
}

static int add_type(PyObject *module, PyTypeObject **out, PyType_Spec *spec) {
  *out = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
  return *out ? PyModule_AddType(module, *out) : -1;
}

static int module_exec(PyObject *module) {
  binding_state *state = PyModule_GetState(module);
  if (errors_add(module, state) < 0 || add_type(module, &state->engine, &engine_spec) < 0 ||
      add_type(module, &state->model, &model_spec) < 0 ||
      add_type(module, &state->builder, &builder_spec) < 0 ||
      add_type(module, &state->cache, &cache_spec) < 0 ||
      add_type(module, &state->session, &session_spec) < 0 ||
      add_type(module, &state->tensor, &tensor_spec) < 0 ||
      add_type(module, &state->trainer, &trainer_spec) < 0)
    return -1;
  return PyModule_AddStringConstant(module, "__version__", ACRE_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
  binding_state *state = PyModule_GetState(module);
  Py_VISIT(state->engine);
  Py_VISIT(state->model);
  Py_VISIT(state->builder);
  Py_VISIT(state->cache);
  Py_VISIT(state->session);
  Py_VISIT(state->tensor);
  Py_VISIT(state->trainer);
  Py_VISIT(state->too_long_error);
  Py_VISIT(state->busy_error);
  Py_VISIT(state->device_error);
  return 0;
}

static int module_clear(PyObject *module) {
  binding_state *state = PyModule_GetState(module);
  Py_CLEAR(state->engine);
  Py_CLEAR(state->model);
  Py_CLEAR(state->builder);
  Py_CLEAR(state->cache);
  Py_CLEAR(state->session);
  Py_CLEAR(state->tensor);
  Py_CLEAR(state->trainer);
  Py_CLEAR(state->too_long_error);
  Py_CLEAR(state->busy_error);
  Py_CLEAR(state->device_error);
  return 0;
}

static void module_free(void *module) { module_clear(module); }

PyDoc_STRVAR(select_doc,
             "select_groups($module, /, scores, k)\n--\n\n"
             "The k best of the scores float32 [m], ties by lower index, ascending.\n\n"
             "Returns int32 [k]. Raises ValueError for k outside 0..m.");

PyDoc_STRVAR(open_doc,
             "sessions_open($module, /, model, caches, capacities)\n--\n\n"
             "Sessions that decode together: a list, one for each cache (or None).\n\n"
             "capacities: of each, as Session takes it. While one of them is in use on a\n"
             "thread, the others are answered BusyError. Raises what Session does, with\n"
             "the session's place.");
PyDoc_STRVAR(
    next_doc,
    "sessions_next($module, /, sessions, samplings)\n--\n\n"
    "The next token of each of some sessions of one sessions_open, in one pass.\n\n"
    "samplings: a dict for each, with the keyword arguments of Session.next.\n"
    "Returns a list of ids: those of one by one. Nothing moves on an error.");
PyDoc_STRVAR(fit_doc,
             "sessions_fit($module, /, model, cache, k, capacity, wanted)\n--\n\n"
             "How many sessions fit the memory available now: 1 to wanted.\n\n"
             "Each over cache (or None) with k groups refilled; wanted where that is not\n"
             "known.");

static PyMethodDef module_methods[] = {
    {"select_groups", KEYWORD_METHOD(select_groups), METH_VARARGS | METH_KEYWORDS,
     select_doc},
    {"sessions_open", KEYWORD_METHOD(sessions_open), METH_VARARGS | METH_KEYWORDS,
     open_doc},
    {"sessions_next", KEYWORD_METHOD(sessions_next), METH_VARARGS | METH_KEYWORDS,
     next_doc},
    {"sessions_fit", KEYWORD_METHOD(sessions_fit), METH_VARARGS | METH_KEYWORDS, fit_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "acre._core",
    .m_doc = "The C library acre: bi-layer KV caches and query-guided refilling.",
    .m_size = sizeof(binding_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_definition); }
