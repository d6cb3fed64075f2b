/* acre._core.Session: one question, or one generation; it has one owner at a time. And the
 * functions for several that decode together.
 *
 * Scores and logits go straight into NumPy arrays made beforehand: where there is no
 * memory for the answer, the work is not begun. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"
#include "records.h"

typedef struct session_object {
  PyObject_HEAD acre_session *session;
  PyObject *model;
  PyObject *cache; /* a Cache, or None */
} session_object;

static const acre_model_config *config_of(const session_object *self) {
  return acre_model_get_config(((model_object *)self->model)->model);
}

/* The C cache of a Cache or None. */
static int cache_take(const binding_state *state, PyObject *object, acre_cache **out) {
  *out = NULL;
  if (object == Py_None) return 0;
  if (argument_instance(object, state->cache, "cache") < 0) return -1;
  *out = ((cache_object *)object)->cache;
  return 0;
}

static int open_session(const binding_state *state, session_object *self,
                        int64_t capacity) {
  acre_model *model = model_take_ready(state, self->model, "model");
  acre_cache *cache;
  if (!model || cache_take(state, self->cache, &cache) < 0) return -1;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_session_open(&self->session, model, cache, capacity, &error));
  if (status == ACRE_OK) return 0;
  errors_raise(state, &error);
  return -1;
}

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "cache", "capacity", NULL};
  PyObject *model, *cache = Py_None, *capacity_object = NULL;
  int64_t capacity;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$O:Session", names, &model, &cache,
                                   &capacity_object))
    return NULL;
  if (!capacity_object) {
    PyErr_SetString(PyExc_TypeError, "Session() needs the keyword argument 'capacity'");
    return NULL;
  }
  if (argument_int64(capacity_object, "capacity", &capacity) < 0) return NULL;
  session_object *self = (session_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->model = Py_NewRef(model);
  self->cache = Py_NewRef(cache);
  if (open_session(PyType_GetModuleState(type), self, capacity) == 0)
    return (PyObject *)self;
  Py_DECREF(self);
  return NULL;
}

static int session_traverse(session_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->model);
  Py_VISIT(self->cache);
  return 0;
}

static void session_dealloc(session_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_session_release(self->session);
  Py_XDECREF(self->cache);
  Py_XDECREF(self->model);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ------------------------------------------------------------------ score */

typedef struct score_arguments {
  int32_t *ids;
  int64_t t, first, last;
  uint8_t *heads; /* NULL: as the options say */
  acre_score_options options;
} score_arguments;

static int read_score(const session_object *self, PyObject *args, PyObject *kwargs,
                      score_arguments *a) {
  static char *names[] = {"ids", "first", "last", "select", "rotated", "heads", NULL};
  PyObject *ids, *first, *last, *values[2] = {NULL}, *heads = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$OOO:score", names, &ids, &first,
                                   &last, &values[0], &values[1], &heads) ||
      argument_int64(first, "first", &a->first) < 0 ||
      argument_int64(last, "last", &a->last) < 0 ||
      record_from_values(&record_score_options, &a->options, values) < 0 ||
      ids_take(ids, "ids", &a->ids, &a->t) < 0)
    return -1;
  if (!heads || heads == Py_None) return 0;
  return head_flags_take(heads, config_of(self)->layers, config_of(self)->heads, &a->heads);
}

static PyObject *run_score(session_object *self, score_arguments *a) {
  bool per_layer = a->options.select == ACRE_SELECT_PER_LAYER;
  int64_t m = 0;
  if (self->cache != Py_None) m = acre_cache_plan(((cache_object *)self->cache)->cache)->m;
  int64_t shape[2] = {per_layer ? config_of(self)->layers : m, m};
  Py_buffer buffer;
  PyObject *scores = result_array("float32", per_layer ? 2 : 1, shape, &buffer);
  if (!scores) return NULL;
  a->options.heads = a->heads;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_session_score(self->session, buffer.buf, a->ids, a->t, a->first,
                                          a->last, &a->options, &error));
  PyBuffer_Release(&buffer);
  if (status == ACRE_OK) return scores;
  Py_DECREF(scores);
  return errors_raise(state_of((PyObject *)self), &error);
}

static PyObject *session_score(session_object *self, PyObject *args, PyObject *kwargs) {
  score_arguments a = {.options = acre_score_options_default()};
  PyObject *scores = NULL;
  if (PyErr_CheckSignals() == 0 && read_score(self, args, kwargs, &a) == 0)
    scores = run_score(self, &a);
  PyMem_RawFree(a.heads);
  PyMem_RawFree(a.ids);
  return scores;
}

/* ------------------------------------------------------------------ timeline */

static PyObject *session_refill(session_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"groups", NULL};
  PyObject *object;
  integers groups;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:refill", names, &object) ||
      PyErr_CheckSignals() < 0 || integers_take(object, "groups", 2, false, &groups) < 0)
    return NULL;
  PyObject *result = NULL;
  bool per_layer = groups.ndim == 2;
  int64_t layers = config_of(self)->layers;
  if (per_layer && groups.shape[0] != layers) {
    PyErr_Format(PyExc_ValueError,
                 "groups: got shape [%lld, %lld], expected [k] or [%lld, k]",
                 (long long)groups.shape[0], (long long)groups.shape[1], (long long)layers);
  } else {
    acre_error error;
    acre_status status;
    WITHOUT_GIL(status = acre_session_refill(self->session, groups.data,
                                             groups.shape[per_layer ? 1 : 0], per_layer,
                                             &error));
    result = status == ACRE_OK ? Py_NewRef(Py_None)
                               : errors_raise(state_of((PyObject *)self), &error);
  }
  PyMem_RawFree(groups.data);
  return result;
}

static PyObject *run_prefill(session_object *self, const int32_t *ids, int64_t t,
                             bool with_logits) {
  PyObject *result = Py_NewRef(Py_None);
  Py_buffer buffer = {.buf = NULL};
  if (with_logits) {
    int64_t shape[2] = {t, config_of(self)->vocab_size};
    Py_SETREF(result, result_array("float32", 2, shape, &buffer));
    if (!result) return NULL;
  }
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_session_prefill(self->session, ids, t, buffer.buf, &error));
  if (with_logits) PyBuffer_Release(&buffer);
  if (status == ACRE_OK) return result;
  Py_DECREF(result);
  return errors_raise(state_of((PyObject *)self), &error);
}

static PyObject *session_prefill(session_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"ids", "logits", NULL};
  PyObject *ids_object, *logits_object = Py_False;
  bool logits;
  int32_t *ids;
  int64_t t;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:prefill", names, &ids_object,
                                   &logits_object) ||
      argument_bool(logits_object, "logits", &logits) < 0 || PyErr_CheckSignals() < 0 ||
      ids_take(ids_object, "ids", &ids, &t) < 0)
    return NULL;
  PyObject *result = run_prefill(self, ids, t, logits);
  PyMem_RawFree(ids);
  return result;
}

static PyObject *session_next(session_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"temperature",        "top_k", "top_p",
                          "repetition_penalty", "seed",  NULL};
  PyObject *values[RECORD_MAX_FIELDS] = {NULL};
  acre_sampling sampling = acre_sampling_default();
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOOO:next", names, &values[0],
                                   &values[1], &values[2], &values[3], &values[4]) ||
      record_from_values(&record_sampling, &sampling, values) < 0 ||
      PyErr_CheckSignals() < 0)
    return NULL;
  int32_t token;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_session_next(self->session, &token, &sampling, &error));
  if (status != ACRE_OK) return errors_raise(state_of((PyObject *)self), &error);
  return PyLong_FromLong(token);
}

static PyObject *session_logits(session_object *self, PyObject *unused) {
  (void)unused;
  int64_t vocab_size = config_of(self)->vocab_size;
  Py_buffer buffer;
  PyObject *result = result_array("float32", 1, &vocab_size, &buffer);
  if (!result) return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_session_logits(self->session, buffer.buf, &error));
  PyBuffer_Release(&buffer);
  if (status == ACRE_OK) return result;
  Py_DECREF(result);
  return errors_raise(state_of((PyObject *)self), &error);
}

static PyObject *session_count(session_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(acre_session_count(self->session));
}

static PyObject *session_model(session_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->model);
}

static PyObject *session_cache(session_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->cache);
}

/* ------------------------------------------------------------------ several at once */

/* Session objects of these caches (a sequence from PySequence_Fast), still without C's. */
static PyObject *new_sessions(const binding_state *state, PyObject *model,
                              PyObject *caches) {
  Py_ssize_t count = PySequence_Fast_GET_SIZE(caches);
  PyObject *list = PyList_New(count);
  for (Py_ssize_t i = 0; list && i < count; ++i) {
    session_object *self = (session_object *)state->session->tp_alloc(state->session, 0);
    if (!self) {
      Py_CLEAR(list);
      break;
    }
    self->model = Py_NewRef(model);
    self->cache = Py_NewRef(PySequence_Fast_GET_ITEM(caches, i));
    PyList_SET_ITEM(list, i, (PyObject *)self);
  }
  return list;
}

/* What C takes of `count` sessions; one block. */
typedef struct opening {
  acre_session **sessions;
  acre_cache **caches;
  int64_t *capacities;
} opening;

static int opening_take(opening *o, const binding_state *state, PyObject *caches,
                        PyObject *capacities) {
  Py_ssize_t count = PySequence_Fast_GET_SIZE(caches);
  if (PySequence_Fast_GET_SIZE(capacities) != count) {
    PyErr_Format(PyExc_ValueError, "capacities: got %zd, expected one for each of %zd",
                 PySequence_Fast_GET_SIZE(capacities), count);
    return -1;
  }
  size_t size = sizeof *o->sessions + sizeof *o->caches + sizeof *o->capacities;
  o->sessions = PyMem_RawCalloc((size_t)count + 1, size);
  if (!o->sessions) {
    PyErr_NoMemory();
    return -1;
  }
  o->caches = (acre_cache **)(o->sessions + count);
  o->capacities = (int64_t *)(o->caches + count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (cache_take(state, PySequence_Fast_GET_ITEM(caches, i), &o->caches[i]) < 0 ||
        argument_int64(PySequence_Fast_GET_ITEM(capacities, i), "capacities",
                       &o->capacities[i]) < 0)
      return -1;
  }
  return 0;
}

static PyObject *open_all(const binding_state *state, PyObject *model_object,
                          PyObject *caches, PyObject *capacities) {
  acre_model *model = model_take_ready(state, model_object, "model");
  opening o = {NULL, NULL, NULL};
  PyObject *list = model ? new_sessions(state, model_object, caches) : NULL;
  if (list && opening_take(&o, state, caches, capacities) == 0) {
    acre_error error;
    acre_status status;
    int64_t count = PyList_GET_SIZE(list);
    WITHOUT_GIL(status = acre_sessions_open(o.sessions, model, o.caches, o.capacities,
                                            count, &error));
    if (status != ACRE_OK) errors_raise(state, &error);
    for (int64_t i = 0; status == ACRE_OK && i < count; ++i)
      ((session_object *)PyList_GET_ITEM(list, i))->session = o.sessions[i];
  }
  PyMem_RawFree(o.sessions);
  if (PyErr_Occurred()) Py_CLEAR(list);
  return list;
}

/* A list or tuple that nobody else changes, of any sequence. */
static PyObject *own_sequence(PyObject *object, const char *name) {
  PyObject *own = PySequence_Tuple(object);
  if (!own && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    argument_refuse(object, name, "a sequence");
  }
  return own;
}

PyObject *sessions_open(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "caches", "capacities", NULL};
  PyObject *model, *caches, *capacities, *result = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:sessions_open", names, &model,
                                   &caches, &capacities))
    return NULL;
  caches = own_sequence(caches, "caches");
  if (!caches) return NULL;
  capacities = own_sequence(capacities, "capacities");
  if (capacities) result = open_all(PyModule_GetState(module), model, caches, capacities);
  Py_DECREF(caches);
  Py_XDECREF(capacities);
  return result;
}

/* What C takes of a step of `count` sessions; one block. */
typedef struct step {
  acre_session **sessions;
  const acre_sampling **pointers;
  acre_sampling *samplings;
  int32_t *tokens;
} step;

static int step_take(step *s, const binding_state *state, PyObject *sessions,
                     PyObject *samplings) {
  Py_ssize_t count = PyTuple_GET_SIZE(sessions);
  if (PyTuple_GET_SIZE(samplings) != count) {
    PyErr_Format(PyExc_ValueError, "samplings: got %zd, expected one for each of %zd",
                 PyTuple_GET_SIZE(samplings), count);
    return -1;
  }
  size_t size =
      sizeof *s->sessions + sizeof *s->pointers + sizeof *s->samplings + sizeof *s->tokens;
  s->samplings = PyMem_RawCalloc((size_t)count + 1, size);
  if (!s->samplings) {
    PyErr_NoMemory();
    return -1;
  }
  s->sessions = (acre_session **)(s->samplings + count);
  s->pointers = (const acre_sampling **)(s->sessions + count);
  s->tokens = (int32_t *)(s->pointers + count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject *session = PyTuple_GET_ITEM(sessions, i);
    if (argument_instance(session, state->session, "sessions") < 0) return -1;
    s->sessions[i] = ((session_object *)session)->session;
    s->samplings[i] = acre_sampling_default();
    s->pointers[i] = &s->samplings[i];
    if (record_from_dict(&record_sampling, &s->samplings[i],
                         PyTuple_GET_ITEM(samplings, i)) < 0)
      return -1;
  }
  return 0;
}

static PyObject *next_all(const binding_state *state, PyObject *sessions,
                          PyObject *samplings) {
  step s = {NULL, NULL, NULL, NULL};
  PyObject *list = NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(sessions);
  if (step_take(&s, state, sessions, samplings) == 0 && PyErr_CheckSignals() == 0) {
    acre_error error;
    acre_status status;
    list = PyList_New(count);
    if (list) {
      WITHOUT_GIL(status =
                      acre_sessions_next(s.sessions, count, s.tokens, s.pointers, &error));
      if (status != ACRE_OK) {
        Py_CLEAR(list);
        errors_raise(state, &error);
      }
    }
  }
  for (Py_ssize_t i = 0; list && i < count; ++i) {
    PyObject *token = PyLong_FromLong(s.tokens[i]);
    if (token)
      PyList_SET_ITEM(list, i, token);
    else
      Py_CLEAR(list);
  }
  PyMem_RawFree(s.samplings);
  return list;
}

PyObject *sessions_next(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"sessions", "samplings", NULL};
  PyObject *sessions, *samplings, *result = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:sessions_next", names, &sessions,
                                   &samplings))
    return NULL;
  sessions = own_sequence(sessions, "sessions");
  if (!sessions) return NULL;
  samplings = own_sequence(samplings, "samplings");
  if (samplings) result = next_all(PyModule_GetState(module), sessions, samplings);
  Py_DECREF(sessions);
  Py_XDECREF(samplings);
  return result;
}

PyObject *sessions_fit(PyObject *module, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "cache", "k", "capacity", "wanted", NULL};
  PyObject *model_object, *cache_object, *numbers[3];
  int64_t k, capacity, wanted;
  const binding_state *state = PyModule_GetState(module);
  acre_cache *cache;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO:sessions_fit", names, &model_object,
                                   &cache_object, &numbers[0], &numbers[1], &numbers[2]) ||
      argument_int64(numbers[0], "k", &k) < 0 ||
      argument_int64(numbers[1], "capacity", &capacity) < 0 ||
      argument_int64(numbers[2], "wanted", &wanted) < 0 ||
      cache_take(state, cache_object, &cache) < 0)
    return NULL;
  acre_model *model = model_take_ready(state, model_object, "model");
  if (!model) return NULL;
  return PyLong_FromLongLong(acre_sessions_fit(model, cache, k, capacity, wanted));
}

/* ------------------------------------------------------------------ type */

PyDoc_STRVAR(score_doc,
             "score($self, /, ids, first, last, *, select='shared', rotated=True, "
             "heads=None)\n--\n\n"
             "Group scores of a question (section 4.1-4.2).\n\n"
             "Runs ids [t] over [L1 | recent]; the tokens [first, last) score. Returns\n"
             "float32 [m] for select='shared', [L, m] for 'per_layer'. heads: booleans or\n"
             "integers [L, h], nonzero = counts; None = the last layer's heads (shared)\n"
             "or every layer's. Raises ValueError, TooLongError, RuntimeError, BusyError.");
PyDoc_STRVAR(refill_doc,
             "refill($self, /, groups)\n--\n\n"
             "Begins the timeline with the groups' L2 entries spliced into L1.\n\n"
             "groups: ascending integers [k], or [L, k] with a row per layer. May be\n"
             "called again: the session starts anew.");
PyDoc_STRVAR(prefill_doc,
             "prefill($self, /, ids, logits=False)\n--\n\n"
             "Appends ids [t] to the timeline.\n\n"
             "Returns None, or with logits=True float32 [t, vocab_size]. May be called\n"
             "repeatedly: a long prompt in pieces can be interrupted between them.");
PyDoc_STRVAR(next_doc,
             "next($self, /, *, temperature=0.0, top_k=0, top_p=1.0, "
             "repetition_penalty=1.0, seed=0)\n--\n\n"
             "Chooses the next token and returns its id.\n\n"
             "temperature 0 = greedy; top_k 0, top_p 1, repetition_penalty 1 = off. The\n"
             "same seed gives the same tokens.");
PyDoc_STRVAR(logits_doc,
             "logits($self, /)\n--\n\n"
             "float32 [vocab_size]: what the next token is chosen from, a new array.");
PyDoc_STRVAR(session_doc,
             "Session(model, cache=None, *, capacity)\n--\n\n"
             "One question over a frozen cache, or with None a generation over nothing.\n\n"
             "capacity: query and answer tokens that it must hold. One thread at a time:\n"
             "a second one is answered BusyError.");

static PyMethodDef session_methods[] = {
    {"score", KEYWORD_METHOD(session_score), METH_VARARGS | METH_KEYWORDS, score_doc},
    {"refill", KEYWORD_METHOD(session_refill), METH_VARARGS | METH_KEYWORDS, refill_doc},
    {"prefill", KEYWORD_METHOD(session_prefill), METH_VARARGS | METH_KEYWORDS, prefill_doc},
    {"next", KEYWORD_METHOD(session_next), METH_VARARGS | METH_KEYWORDS, next_doc},
    {"logits", (PyCFunction)session_logits, METH_NOARGS, logits_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef session_getset[] = {
    {"count", (getter)session_count, NULL, PyDoc_STR("Positions used so far."), NULL},
    {"model", (getter)session_model, NULL, PyDoc_STR("The session's model."), NULL},
    {"cache", (getter)session_cache, NULL, PyDoc_STR("The session's cache, or None."),
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, (void *)session_doc},
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_traverse, session_traverse},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_getset},
    {0, NULL},
};

PyType_Spec session_spec = {
    .name = "acre._core.Session",
    .basicsize = sizeof(session_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = session_slots,
};
