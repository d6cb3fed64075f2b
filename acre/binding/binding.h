/* What the files of the extension `acre._core` share: the module's state and its types.
 *
 * One heap type per file, each a Python reference to one noun of acre.h. The nouns
 * count their own references and retain what they need; Python attributes such as
 * `.model` are there for the user's convenience and keep nothing alive that C would
 * not. The types are final and immutable, the module has no mutable statics, and NumPy
 * is reached by attribute and the buffer protocol instead of its C API: that API is a
 * static pointer, which an interpreter with its own GIL could not share. So the module
 * may be imported twice, in subinterpreters and in free-threaded builds.
 *
 * The GIL is released around every call that computes. A pending signal is taken before
 * such a call and never after it: an interrupt then loses no finished step and no
 * token. */
#ifndef ACRE_BINDING_H
#define ACRE_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>

#include "acre.h"

typedef struct binding_state {
  PyTypeObject *engine, *model, *builder, *cache, *session, *tensor, *trainer;
  PyObject *too_long_error, *busy_error, *device_error;
} binding_state;

extern PyType_Spec engine_spec, model_spec, builder_spec, cache_spec, session_spec,
    tensor_spec, trainer_spec;

typedef struct engine_object {
  PyObject_HEAD acre_engine *engine;
} engine_object;

typedef struct model_object {
  PyObject_HEAD acre_model *model;
  PyObject *engine;
  atomic_bool in_use; /* bind and ready belong to one thread at a time */
  atomic_bool ready;
} model_object;

typedef struct cache_object {
  PyObject_HEAD acre_cache *cache;
  PyObject *model;
  PyObject *ids; /* read-only int32 [n] */
} cache_object;

/* The types are final, so an instance's type is always the one that carries the state.
 */
static inline binding_state *state_of(PyObject *self) {
  return PyType_GetModuleState(Py_TYPE(self));
}

#define WITHOUT_GIL(statement) \
  do {                         \
    Py_BEGIN_ALLOW_THREADS;    \
    statement;                 \
    Py_END_ALLOW_THREADS;      \
  } while (0)

/* The C model of a ready acre._core.Model; NULL with an exception for anything else. */
acre_model *model_take_ready(const binding_state *state, PyObject *object,
                             const char *name);

/* A Cache without its C cache, to be completed by cache_finish once C has made one:
 * what may fail in Python fails before the long work. */
cache_object *cache_new(const binding_state *state, PyObject *model);
PyObject *cache_finish(cache_object *self, acre_cache *cache); /* steals both */

/* A read-only view of memory of this engine; takes over the reference to `owner`, on failure
 * too. */
PyObject *tensor_new(const binding_state *state, const acre_array *view, acre_buffer *owner,
                     PyObject *engine);

/* Functions of the module: sessions that decode together (session.c). */
PyObject *sessions_open(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *sessions_next(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *sessions_fit(PyObject *module, PyObject *args, PyObject *kwargs);

/* METH_VARARGS | METH_KEYWORDS functions in a table of the two-argument kind. */
#define KEYWORD_METHOD(function) (PyCFunction)(void (*)(void)) function

#endif
