/* Takes an acre_error, gives the exception that says the same in Python.
 *
 * A status says what the caller can do about it, and so do Python's own exceptions; new
 * ones exist only where no built-in does: TooLongError (a ValueError), BusyError and
 * DeviceError (RuntimeErrors). */
#include "errors.h"

static int add(PyObject *module, PyObject **out, const char *name, const char *doc,
               PyObject *base) {
  *out = PyErr_NewExceptionWithDoc(name, doc, base, NULL);
  if (!*out) return -1;
  return PyModule_AddObjectRef(module, strrchr(name, '.') + 1, *out);
}

int errors_add(PyObject *module, binding_state *state) {
  if (add(module, &state->too_long_error, "acre.TooLongError",
          "A text or question exceeds the model's usable positions.", PyExc_ValueError) < 0)
    return -1;
  if (add(module, &state->busy_error, "acre.BusyError",
          "The object is in use on another thread.", PyExc_RuntimeError) < 0)
    return -1;
  return add(module, &state->device_error, "acre.DeviceError",
             "The device failed; the object cannot be used any more.", PyExc_RuntimeError);
}

static PyObject *exception_of(const binding_state *state, acre_status status) {
  switch (status) {
    case ACRE_BAD_VALUE:
    case ACRE_BAD_SHAPE: return PyExc_ValueError;
    case ACRE_BAD_STATE: return PyExc_RuntimeError;
    case ACRE_TOO_LONG: return state->too_long_error;
    case ACRE_NO_MEMORY: return PyExc_MemoryError;
    case ACRE_DEVICE: return state->device_error;
    case ACRE_UNSUPPORTED: return PyExc_NotImplementedError;
    case ACRE_BUSY: return state->busy_error;
    case ACRE_NO_PEER: return PyExc_ConnectionError;
    case ACRE_OK: break;
  }
  return PyExc_SystemError;
}

PyObject *errors_raise(const binding_state *state, const acre_error *error) {
  /* C's sentences may quote a name cut in the middle of a character: hence "replace".
   */
  PyObject *text =
      PyUnicode_DecodeUTF8(error->message, (Py_ssize_t)strlen(error->message), "replace");
  if (!text) return NULL;
  PyErr_SetObject(exception_of(state, error->status), text);
  Py_DECREF(text);
  return NULL;
}
