/* Takes single Python objects, gives C integers, floats, flags and strings.
 *
 * A wrong type is a TypeError, a wrong value a ValueError, and a number that does not
 * fit its C type is refused instead of wrapped. */
#include "arguments.h"

int argument_refuse(PyObject *object, const char *name, const char *expected) {
  PyErr_Format(PyExc_TypeError, "%s: got %.100s, expected %s", name,
               Py_TYPE(object)->tp_name, expected);
  return -1;
}

static int refuse_value(PyObject *object, const char *name, const char *expected) {
  PyErr_Format(PyExc_ValueError, "%s: got %R, expected %s", name, object, expected);
  return -1;
}

/* An integer as every index is one: int, NumPy integers; not 1.0. */
static PyObject *as_integer(PyObject *object, const char *name) {
  if (PyIndex_Check(object)) return PyNumber_Index(object);
  argument_refuse(object, name, "an integer");
  return NULL;
}

static int integer_between(PyObject *object, const char *name, int64_t low, int64_t high,
                           const char *expected, int64_t *out) {
  PyObject *integer = as_integer(object, name);
  if (!integer) return -1;
  int overflow = 0;
  long long value = PyLong_AsLongLongAndOverflow(integer, &overflow);
  Py_DECREF(integer);
  if (value == -1 && PyErr_Occurred()) return -1;
  if (overflow || value < low || value > high) return refuse_value(object, name, expected);
  *out = value;
  return 0;
}

int argument_int64(PyObject *object, const char *name, int64_t *out) {
  return integer_between(object, name, INT64_MIN, INT64_MAX, "a 64-bit integer", out);
}

int argument_int32(PyObject *object, const char *name, int32_t *out) {
  int64_t value;
  if (integer_between(object, name, INT32_MIN, INT32_MAX, "a 32-bit integer", &value) < 0)
    return -1;
  *out = (int32_t)value;
  return 0;
}

int argument_uint64(PyObject *object, const char *name, uint64_t *out) {
  PyObject *integer = as_integer(object, name);
  if (!integer) return -1;
  unsigned long long value = PyLong_AsUnsignedLongLong(integer);
  Py_DECREF(integer);
  if (value == (unsigned long long)-1 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
    PyErr_Clear();
    return refuse_value(object, name, "an integer from 0 to 2**64 - 1");
  }
  *out = value;
  return 0;
}

int argument_double(PyObject *object, const char *name, double *out) {
  if (!PyFloat_Check(object) && !PyIndex_Check(object) &&
      !(Py_TYPE(object)->tp_as_number && Py_TYPE(object)->tp_as_number->nb_float))
    return argument_refuse(object, name, "a number");
  double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
    PyErr_Clear();
    return refuse_value(object, name, "a number within the range of a float");
  }
  *out = value;
  return 0;
}

int argument_bool(PyObject *object, const char *name, bool *out) {
  if (!PyBool_Check(object)) return argument_refuse(object, name, "True or False");
  *out = object == Py_True;
  return 0;
}

int argument_text(PyObject *object, const char *name, const char **out) {
  if (!PyUnicode_Check(object)) return argument_refuse(object, name, "a string");
  Py_ssize_t size;
  const char *text = PyUnicode_AsUTF8AndSize(object, &size);
  if (!text) return -1;
  if (strlen(text) != (size_t)size)
    return refuse_value(object, name, "a string without NUL characters");
  *out = text;
  return 0;
}

static int refuse_choice(PyObject *object, const char *name, const char *const *choices) {
  char known[160] = "";
  for (int i = 0; choices[i]; ++i) {
    size_t used = strlen(known);
    PyOS_snprintf(known + used, sizeof known - used, "%s'%s'", i ? ", " : "", choices[i]);
  }
  PyErr_Format(PyExc_ValueError, "%s: got %R, expected one of %s", name, object, known);
  return -1;
}

int argument_choice(PyObject *object, const char *name, const char *const *choices,
                    int *out) {
  const char *text;
  if (argument_text(object, name, &text) < 0) return -1;
  for (int i = 0; choices[i]; ++i)
    if (strcmp(text, choices[i]) == 0) {
      *out = i;
      return 0;
    }
  return refuse_choice(object, name, choices);
}

int argument_instance(PyObject *object, PyTypeObject *type, const char *name) {
  if (Py_IS_TYPE(object, type)) return 0;
  return argument_refuse(object, name, type->tp_name);
}
