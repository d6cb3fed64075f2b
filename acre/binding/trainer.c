/* acre._core.Trainer: L1 parameters that learn.
 *
 * An example is a loop over windows here, so that an interrupt is taken between two of
 * them. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"

typedef struct trainer_object {
  PyObject_HEAD acre_trainer *trainer;
  PyObject *model;
} trainer_object;

static const acre_model_config *config_of(const trainer_object *self) {
  return acre_model_get_config(((model_object *)self->model)->model);
}

static PyObject *fail(trainer_object *self, const acre_error *error) {
  return errors_raise(state_of((PyObject *)self), error);
}

static PyObject *trainer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", NULL};
  PyObject *object;
  const binding_state *state = PyType_GetModuleState(type);
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Trainer", names, &object)) return NULL;
  acre_model *model = model_take_ready(state, object, "model");
  if (!model) return NULL;
  trainer_object *self = (trainer_object *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->model = Py_NewRef(object);
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_open(&self->trainer, model, &error));
  if (status == ACRE_OK) return (PyObject *)self;
  Py_DECREF(self);
  return errors_raise(state, &error);
}

static int trainer_traverse(trainer_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->model);
  return 0;
}

static void trainer_dealloc(trainer_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_trainer_release(self->trainer);
  Py_XDECREF(self->model);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ------------------------------------------------------------------ vectors */

static PyObject *entry_to_tuple(const acre_trainer_entry *e) {
  if (!e->rows)
    return Py_BuildValue("(sL(L))", e->name, (long long)e->offset, (long long)e->columns);
  return Py_BuildValue("(sL(LL))", e->name, (long long)e->offset, (long long)e->rows,
                       (long long)e->columns);
}

static PyObject *trainer_entries(trainer_object *self, void *closure) {
  (void)closure;
  int64_t count = acre_trainer_entries(self->trainer);
  PyObject *list = PyList_New((Py_ssize_t)count);
  for (int64_t i = 0; list && i < count; ++i) {
    acre_trainer_entry entry;
    acre_error error;
    PyObject *item = NULL;
    if (acre_trainer_entry_at(&entry, self->trainer, i, &error) == ACRE_OK)
      item = entry_to_tuple(&entry);
    else
      fail(self, &error);
    if (item)
      PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    else
      Py_CLEAR(list);
  }
  return list;
}

static PyObject *trainer_size(trainer_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(acre_trainer_size(self->trainer));
}

static PyObject *trainer_model(trainer_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->model);
}

static int take_part(PyObject *object, acre_trainer_part *out) {
  static const char *const parts[] = {"parameters", "gradients", "first", "second", NULL};
  int index;
  if (argument_choice(object, "part", parts, &index) < 0) return -1;
  *out = (acre_trainer_part)index;
  return 0;
}

static PyObject *trainer_read(trainer_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"part", NULL};
  PyObject *object;
  acre_trainer_part part;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:read", names, &object) ||
      take_part(object, &part) < 0)
    return NULL;
  int64_t shape[1] = {acre_trainer_size(self->trainer)};
  Py_buffer buffer;
  PyObject *values = result_array("float32", 1, shape, &buffer);
  if (!values) return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_read(buffer.buf, self->trainer, part, &error));
  PyBuffer_Release(&buffer);
  if (status == ACRE_OK) return values;
  Py_DECREF(values);
  return fail(self, &error);
}

static PyObject *trainer_write(trainer_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"part", "values", NULL};
  PyObject *part_object, *values_object;
  acre_trainer_part part;
  float *values = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:write", names, &part_object,
                                   &values_object) ||
      take_part(part_object, &part) < 0 ||
      numbers_take(values_object, "values", acre_trainer_size(self->trainer), &values) < 0)
    return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_write(self->trainer, part, values, &error));
  PyMem_RawFree(values);
  if (status != ACRE_OK) return fail(self, &error);
  Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ an example */

/* What an example is made of, borrowed from the call and owned here. */
typedef struct example_arguments {
  PyObject *ids, *intervals, *window, *stride, *carry, *weights, *questions,
      *evidence_weight, *heads, *gradients;
} example_arguments;

typedef struct question_arrays {
  int32_t *ids;
  float *weights;
  uint8_t *evidence;
} question_arrays;

typedef struct example_arrays {
  int32_t *ids;
  int32_t *interval_items;
  int64_t *intervals;
  float *weights;
  uint8_t *heads;
  int64_t question_count;
  acre_question *questions;
  question_arrays *of_questions;
} example_arrays;

static void free_arrays(example_arrays *a) {
  PyMem_RawFree(a->ids);
  PyMem_RawFree(a->interval_items);
  PyMem_RawFree(a->intervals);
  PyMem_RawFree(a->weights);
  PyMem_RawFree(a->heads);
  for (int64_t i = 0; i < a->question_count; ++i) {
    PyMem_RawFree(a->of_questions[i].ids);
    PyMem_RawFree(a->of_questions[i].weights);
    PyMem_RawFree(a->of_questions[i].evidence);
  }
  PyMem_RawFree(a->questions);
  PyMem_RawFree(a->of_questions);
}

/* A keyword that must come: the parser knows no such thing. */
static bool present(PyObject *object, const char *name) {
  if (object) return true;
  PyErr_Format(PyExc_TypeError, "%s: got none, expected this keyword", name);
  return false;
}

static bool given(PyObject *object) { return object && object != Py_None; }

static int read_intervals(PyObject *object, example_arrays *own, acre_example *e) {
  if (ids_take(object, "intervals", &own->interval_items, &e->windows) < 0) return -1;
  own->intervals = PyMem_RawMalloc((size_t)(e->windows + 1) * sizeof *own->intervals);
  if (!own->intervals) {
    PyErr_NoMemory();
    return -1;
  }
  for (int64_t i = 0; i < e->windows; ++i) own->intervals[i] = own->interval_items[i];
  e->intervals = own->intervals;
  return 0;
}

static int read_query(PyObject *object, acre_question *q) {
  PyObject *first, *last;
  if (object == Py_None) {
    PyErr_SetString(PyExc_TypeError,
                    "query: got none, expected (first, last) with evidence");
    return -1;
  }
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2)
    return argument_refuse(object, "query", "a tuple (first, last)");
  first = PyTuple_GET_ITEM(object, 0), last = PyTuple_GET_ITEM(object, 1);
  if (argument_int64(first, "query[0]", &q->first) < 0) return -1;
  return argument_int64(last, "query[1]", &q->last);
}

/* (ids, weights, query, evidence). n: the text's tokens. */
static int read_question(PyObject *object, int64_t n, question_arrays *own,
                         acre_question *q) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 4)
    return argument_refuse(object, "question", "a tuple (ids, weights, query, evidence)");
  PyObject *weights = PyTuple_GET_ITEM(object, 1), *evidence = PyTuple_GET_ITEM(object, 3);
  if (ids_take(PyTuple_GET_ITEM(object, 0), "question ids", &own->ids, &q->t) < 0 ||
      (weights != Py_None &&
       numbers_take(weights, "question weights", q->t, &own->weights) < 0))
    return -1;
  q->ids = own->ids, q->weights = own->weights;
  if (evidence == Py_None) return 0;
  if (flags_take(evidence, "evidence", n, &own->evidence) < 0) return -1;
  q->evidence = own->evidence;
  return read_query(PyTuple_GET_ITEM(object, 2), q);
}

static int read_questions(PyObject *object, example_arrays *own, acre_example *e) {
  PyObject *items = PySequence_Fast(object, "questions: expected a sequence of tuples");
  if (!items) return -1;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
  int result = 0;
  own->questions = PyMem_RawCalloc((size_t)count + 1, sizeof *own->questions);
  own->of_questions = PyMem_RawCalloc((size_t)count + 1, sizeof *own->of_questions);
  if (own->questions && own->of_questions) {
    own->question_count = (int64_t)count;
  } else {
    PyErr_NoMemory();
    result = -1;
  }
  for (Py_ssize_t i = 0; result == 0 && i < count; ++i)
    result = read_question(PySequence_Fast_GET_ITEM(items, i), e->n, &own->of_questions[i],
                           &own->questions[i]);
  e->questions = own->questions, e->question_count = own->question_count;
  Py_DECREF(items);
  return result;
}

static int read_scoring(const trainer_object *self, const example_arguments *a,
                        example_arrays *own, acre_example *e) {
  const acre_model_config *config = config_of(self);
  if (a->evidence_weight &&
      argument_double(a->evidence_weight, "evidence_weight", &e->evidence_weight) < 0)
    return -1;
  if (given(a->heads) &&
      head_flags_take(a->heads, config->layers, config->heads, &own->heads) < 0)
    return -1;
  e->heads = own->heads;
  return 0;
}

static int read_example(const trainer_object *self, const example_arguments *a,
                        example_arrays *own, acre_example *e) {
  if (ids_take(a->ids, "ids", &own->ids, &e->n) < 0 ||
      read_intervals(a->intervals, own, e) < 0 ||
      argument_int64(a->window, "window", &e->window) < 0 ||
      argument_int64(a->stride, "stride", &e->stride) < 0 ||
      (a->carry && argument_int64(a->carry, "carry", &e->carry) < 0) ||
      (given(a->weights) && numbers_take(a->weights, "weights", e->n, &own->weights) < 0) ||
      (given(a->questions) && read_questions(a->questions, own, e) < 0))
    return -1;
  e->ids = own->ids, e->weights = own->weights;
  return read_scoring(self, a, own, e);
}

static PyObject *result_to_dict(const acre_example_result *r) {
  return Py_BuildValue("{sdsdsdsLsL}", "loss", r->loss, "weight", r->weight, "evidence",
                       r->evidence, "known", (long long)r->known, "rows",
                       (long long)r->rows);
}

static PyObject *run_example(trainer_object *self, const acre_example *example,
                             bool gradients) {
  acre_error error;
  acre_example_result result;
  int64_t done = 0, total = 1;
  acre_status status = acre_trainer_begin(self->trainer, example, gradients, &error);
  while (status == ACRE_OK && done < total) {
    if (PyErr_CheckSignals() < 0) return NULL;
    WITHOUT_GIL(status = acre_trainer_step(self->trainer, &done, &total, &error));
  }
  if (status == ACRE_OK) status = acre_trainer_result(&result, self->trainer, &error);
  return status == ACRE_OK ? result_to_dict(&result) : fail(self, &error);
}

static PyObject *trainer_accumulate(trainer_object *self, PyObject *args,
                                    PyObject *kwargs) {
  static char *names[] = {"ids",   "intervals", "window",    "stride",
                          "carry", "weights",   "questions", "evidence_weight",
                          "heads", "gradients", NULL};
  example_arguments a = {0};
  example_arrays own = {0};
  acre_example example = acre_example_default();
  bool gradients = true;
  PyObject *result = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOOO:accumulate", names, &a.ids,
                                   &a.intervals, &a.window, &a.stride, &a.carry, &a.weights,
                                   &a.questions, &a.evidence_weight, &a.heads,
                                   &a.gradients))
    return NULL;
  if (!present(a.intervals, "intervals") || !present(a.window, "window") ||
      !present(a.stride, "stride"))
    return NULL;
  if ((!a.gradients || argument_bool(a.gradients, "gradients", &gradients) == 0) &&
      read_example(self, &a, &own, &example) == 0)
    result = run_example(self, &example, gradients);
  free_arrays(&own);
  return result;
}

/* ------------------------------------------------------------------ the optimiser */

static int read_number(PyObject *object, const char *name, double *out) {
  return object ? argument_double(object, name, out) : 0;
}

static PyObject *trainer_update(trainer_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"step",  "lr",  "divisor",      "clip", "beta1",
                          "beta2", "eps", "weight_decay", NULL};
  PyObject *step = NULL, *lr = NULL, *divisor_object = NULL, *clip_object = NULL,
           *beta1 = NULL, *beta2 = NULL, *eps = NULL, *decay = NULL;
  acre_adamw adamw = acre_adamw_default();
  double divisor, clip = 0, norm = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOOOOOO:update", names, &step, &lr,
                                   &divisor_object, &clip_object, &beta1, &beta2, &eps,
                                   &decay) ||
      !present(step, "step") || !present(lr, "lr") || !present(divisor_object, "divisor") ||
      argument_int64(step, "step", &adamw.step) < 0 ||
      argument_double(lr, "lr", &adamw.lr) < 0 ||
      argument_double(divisor_object, "divisor", &divisor) < 0 ||
      read_number(clip_object, "clip", &clip) < 0 ||
      read_number(beta1, "beta1", &adamw.beta1) < 0 ||
      read_number(beta2, "beta2", &adamw.beta2) < 0 ||
      read_number(eps, "eps", &adamw.eps) < 0 ||
      read_number(decay, "weight_decay", &adamw.weight_decay) < 0)
    return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status =
                  acre_trainer_update(self->trainer, &adamw, divisor, clip, &norm, &error));
  return status == ACRE_OK ? PyFloat_FromDouble(norm) : fail(self, &error);
}

static PyObject *trainer_clear(trainer_object *self, PyObject *unused) {
  (void)unused;
  acre_error error;
  if (acre_trainer_clear(self->trainer, &error) != ACRE_OK) return fail(self, &error);
  Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ peers */

static PyObject *trainer_invite(trainer_object *self, PyObject *unused) {
  (void)unused;
  uint8_t id[ACRE_PEERS_ID];
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_invite(id, self->trainer, &error));
  if (status != ACRE_OK) return fail(self, &error);
  return PyBytes_FromStringAndSize((const char *)id, sizeof id);
}

static PyObject *trainer_join(trainer_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"rank", "world", "id", NULL};
  PyObject *rank_object, *world_object, *id;
  int64_t rank, world;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:join", names, &rank_object,
                                   &world_object, &id) ||
      argument_int64(rank_object, "rank", &rank) < 0 ||
      argument_int64(world_object, "world", &world) < 0)
    return NULL;
  if (!PyBytes_Check(id)) {
    argument_refuse(id, "id", "bytes");
    return NULL;
  }
  if (PyBytes_GET_SIZE(id) != ACRE_PEERS_ID)
    return PyErr_Format(PyExc_ValueError, "id: got %zd bytes, expected %d",
                        PyBytes_GET_SIZE(id), ACRE_PEERS_ID);
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_join(self->trainer, rank, world,
                                         (const uint8_t *)PyBytes_AS_STRING(id), &error));
  if (status != ACRE_OK) return fail(self, &error);
  Py_RETURN_NONE;
}

static PyObject *trainer_share(trainer_object *self, PyObject *unused) {
  (void)unused;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_share(self->trainer, &error));
  if (status != ACRE_OK) return fail(self, &error);
  Py_RETURN_NONE;
}

static PyObject *trainer_wait(trainer_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"seconds", NULL};
  PyObject *object;
  double seconds;
  bool done;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:wait", names, &object) ||
      argument_double(object, "seconds", &seconds) < 0)
    return NULL;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_wait(&done, self->trainer, seconds, &error));
  return status == ACRE_OK ? PyBool_FromLong(done) : fail(self, &error);
}

static PyObject *trainer_leave(trainer_object *self, PyObject *unused) {
  (void)unused;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_trainer_leave(self->trainer, &error));
  if (status != ACRE_OK) return fail(self, &error);
  Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ type */

PyDoc_STRVAR(read_doc,
             "read($self, /, part)\n--\n\n"
             "A copy of one vector, float32 [size]: \"parameters\", \"gradients\" (summed\n"
             "since the last update), \"first\" or \"second\" (AdamW's moments). The\n"
             "property `entries` says where which tensor lies in it.");
PyDoc_STRVAR(write_doc,
             "write($self, /, part, values)\n--\n\n"
             "Sets one vector from float32 [size]. ValueError: another size, or a number\n"
             "that is not finite.");
PyDoc_STRVAR(
    accumulate_doc,
    "accumulate($self, /, ids, *, intervals, window, stride, carry=0, weights=None, "
    "questions=(), evidence_weight=0.0, heads=None, gradients=True)\n--\n\n"
    "Forward and backward of one example (METHOD.md, section 6); adds to \"gradients\".\n\n"
    "ids: context tokens [n], read in windows of `window`, then `stride` tokens, with\n"
    "`carry` tokens kept in view. intervals: l of each window, a last, partial one\n"
    "included. weights: float32 [n] of each token's loss, None: 1; the first token has\n"
    "no loss. questions: tuples (ids, weights, query, evidence) of a question with its\n"
    "answer. ids [t] have no L1 tokens among them; they see [L1 | recent] and each\n"
    "other, not another question. weights: float32 [t] or None, as above. evidence:\n"
    "None, or booleans [n], the context's tokens that hold it; then query = (first,\n"
    "last) are the question's tokens that score, and the example's loss gains\n"
    "evidence_weight times the mean, over the L1 entries of the evidence, of -log of\n"
    "the entry's share of these tokens' attention mass at `heads`, booleans [L, h],\n"
    "None: the last layer's. gradients=False: only the loss.\n\n"
    "Returns a dict: loss (sum of weight * nats, without evidence terms), weight (their\n"
    "sum), evidence (sum over questions of the share of all the evidence's entries),\n"
    "known (questions in it), rows (nested tokens processed). Raises ValueError,\n"
    "TooLongError where the positions do not suffice, MemoryError; after\n"
    "KeyboardInterrupt the gradients hold part of an example: clear() them.");
PyDoc_STRVAR(update_doc,
             "update($self, /, *, step, lr, divisor, clip=0.0, beta1=0.9, beta2=0.95, "
             "eps=1e-08, weight_decay=0.0)\n--\n\n"
             "One step of AdamW with gradients / divisor, scaled down to norm `clip`\n"
             "where clip > 0; clears them. step counts from 1. Returns the norm before\n"
             "clipping. ValueError, and nothing changed, where it is not finite.");
PyDoc_STRVAR(clear_doc, "clear($self, /)\n--\n\nSets the gradients to zero.");
PyDoc_STRVAR(invite_doc,
             "invite($self, /)\n--\n\n"
             "An id, bytes [128], by which trainers of several processes meet: one\n"
             "invites, and all join with the id that the program carries to them.\n"
             "NotImplementedError, with what is missing, where the device cannot sum\n"
             "over processes. ConnectionError.");
PyDoc_STRVAR(join_doc,
             "join($self, /, rank, world, id)\n--\n\n"
             "Begins to meet the others; wait() until all are there. rank: 0 to\n"
             "world - 1, another one in each process. ValueError, NotImplementedError,\n"
             "ConnectionError; RuntimeError where it has joined already.");
PyDoc_STRVAR(share_doc,
             "share($self, /)\n--\n\n"
             "Begins to sum \"gradients\" over all ranks, in place on the device; wait()\n"
             "until it is done, with the same bits on every rank. RuntimeError where no\n"
             "peers are.");
PyDoc_STRVAR(wait_doc,
             "wait($self, /, seconds)\n--\n\n"
             "Waits so long, at most, for what join() or share() began; whether it is\n"
             "through. Until then all but wait() and leave() is refused (RuntimeError).\n"
             "ConnectionError: a peer, or the way to it, has failed; the peers are left,\n"
             "and \"gradients\" are no sum: clear() them.");
PyDoc_STRVAR(leave_doc,
             "leave($self, /)\n--\n\n"
             "Parts from the peers, if there are any, and gives up what is under way:\n"
             "then \"gradients\" are no sum, and the others wait in vain.");
PyDoc_STRVAR(
    trainer_doc,
    "Trainer(model)\n--\n\n"
    "L1 parameters that learn while the model itself stays as it is.\n\n"
    "Starts from the model's L1 parameters, or where it has none from the EOS row\n"
    "and copies of q, k, v (METHOD.md, section 2). One owner: BusyError on a\n"
    "second thread. Masters, gradients and moments are float32; examples run in\n"
    "the model's dtype.");

static PyMethodDef trainer_methods[] = {
    {"read", KEYWORD_METHOD(trainer_read), METH_VARARGS | METH_KEYWORDS, read_doc},
    {"write", KEYWORD_METHOD(trainer_write), METH_VARARGS | METH_KEYWORDS, write_doc},
    {"accumulate", KEYWORD_METHOD(trainer_accumulate), METH_VARARGS | METH_KEYWORDS,
     accumulate_doc},
    {"update", KEYWORD_METHOD(trainer_update), METH_VARARGS | METH_KEYWORDS, update_doc},
    {"clear", (PyCFunction)trainer_clear, METH_NOARGS, clear_doc},
    {"invite", (PyCFunction)trainer_invite, METH_NOARGS, invite_doc},
    {"join", KEYWORD_METHOD(trainer_join), METH_VARARGS | METH_KEYWORDS, join_doc},
    {"share", (PyCFunction)trainer_share, METH_NOARGS, share_doc},
    {"wait", KEYWORD_METHOD(trainer_wait), METH_VARARGS | METH_KEYWORDS, wait_doc},
    {"leave", (PyCFunction)trainer_leave, METH_NOARGS, leave_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef trainer_getset[] = {
    {"entries", (getter)trainer_entries, NULL,
     PyDoc_STR("(Hugging Face name, offset, shape) of each tensor in the vectors."), NULL},
    {"size", (getter)trainer_size, NULL, PyDoc_STR("Numbers in each vector."), NULL},
    {"model", (getter)trainer_model, NULL, PyDoc_STR("The frozen model."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot trainer_slots[] = {
    {Py_tp_doc, (void *)trainer_doc},
    {Py_tp_new, trainer_new},
    {Py_tp_dealloc, trainer_dealloc},
    {Py_tp_traverse, trainer_traverse},
    {Py_tp_methods, trainer_methods},
    {Py_tp_getset, trainer_getset},
    {0, NULL},
};

PyType_Spec trainer_spec = {
    .name = "acre._core.Trainer",
    .basicsize = sizeof(trainer_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = trainer_slots,
};
