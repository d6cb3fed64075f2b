/* Takes whatever Python has for an array, gives data, element kind, shape and strides;
 * and gives new NumPy arrays.
 *
 * Three doors, tried in this order: the buffer protocol (NumPy), DLPack (PyTorch, JAX,
 * CuPy on the host), and `numpy.asarray` for lists and the like. Nothing is copied on
 * the first two. Elements that C would misread are refused: foreign byte order,
 * complex, structured, unaligned. */
#include "arrays.h"

#include "arguments.h"
#include "errors.h"

/* ------------------------------------------------------------------ names */

static void kind_name(const foreign_array *array, char *out, size_t size) {
  static const char *const names[] = {"int", "uint", "float", "bfloat", "bool"};
  if (array->kind == ELEMENT_BOOL)
    PyOS_snprintf(out, size, "bool");
  else
    PyOS_snprintf(out, size, "%s%d", names[array->kind], 8 * array->item_size);
}

static int refuse_kind(const foreign_array *array, const char *name, const char *expected) {
  char got[24];
  kind_name(array, got, sizeof got);
  PyErr_Format(PyExc_ValueError, "%s: got dtype %s, expected %s", name, got, expected);
  return -1;
}

/* ------------------------------------------------------------------ buffers */

/* One native number per element, as `struct` writes it: "f", "<i", "=H", "?". */
static int read_format(foreign_array *array, const char *format, const char *name,
                       const char *expected) {
  const char *letter = format;
  if (*letter && strchr("@=<>!", *letter)) ++letter;
  bool swapped = PY_LITTLE_ENDIAN ? *format == '>' || *format == '!' : *format == '<';
  static const struct {
    const char *letters;
    element_kind kind;
  } kinds[] = {{"bhilqn", ELEMENT_INT},
               {"BHILQN", ELEMENT_UINT},
               {"efd", ELEMENT_FLOAT},
               {"?", ELEMENT_BOOL}};
  for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; ++i) {
    if (!*letter || letter[1] || !strchr(kinds[i].letters, *letter)) continue;
    array->kind = kinds[i].kind;
    if (!swapped || array->item_size == 1) return 0;
    char got[24];
    kind_name(array, got, sizeof got);
    PyErr_Format(PyExc_ValueError,
                 "%s: got %s in foreign byte order (format '%s'), expected native order",
                 name, got, format);
    return -1;
  }
  PyErr_Format(PyExc_ValueError, "%s: got elements of format '%s', expected %s", name,
               format, expected);
  return -1;
}

static int refuse_dims(int64_t ndim, const char *name) {
  PyErr_Format(PyExc_ValueError, "%s: got %lld dimensions, expected at most %d", name,
               (long long)ndim, ACRE_MAX_DIMS);
  return -1;
}

static int read_buffer(foreign_array *array, const char *name, const char *expected) {
  const Py_buffer *buffer = &array->buffer;
  if (buffer->ndim > ACRE_MAX_DIMS) return refuse_dims(buffer->ndim, name);
  array->data = buffer->buf;
  array->item_size = (int32_t)buffer->itemsize;
  array->ndim = buffer->ndim;
  const char *format = buffer->format ? buffer->format : "B";
  if (read_format(array, format, name, expected) < 0) return -1;
  for (int i = 0; i < buffer->ndim; ++i) {
    array->shape[i] = buffer->shape[i];
    array->strides[i] = buffer->strides[i] / buffer->itemsize;
    if (buffer->strides[i] % buffer->itemsize == 0 || buffer->shape[i] <= 1) continue;
    PyErr_Format(PyExc_ValueError,
                 "%s: got a stride of %zd bytes, expected a multiple of the element's %zd",
                 name, buffer->strides[i], buffer->itemsize);
    return -1;
  }
  return 0;
}

/* ml_dtypes' bfloat16 is a NumPy dtype that no buffer format describes: seen as uint16
 * it has one. New reference to the array to take the buffer of, or NULL. */
static PyObject *as_bits(PyObject *object, bool *is_bfloat) {
  *is_bfloat = false;
  PyObject *dtype = PyObject_GetAttrString(object, "dtype");
  PyObject *name = dtype ? PyObject_GetAttrString(dtype, "name") : NULL;
  Py_XDECREF(dtype);
  if (name && PyUnicode_Check(name))
    *is_bfloat = PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
  Py_XDECREF(name);
  PyErr_Clear();
  if (!*is_bfloat) return Py_NewRef(object);
  return PyObject_CallMethod(object, "view", "s", "uint16");
}

static int take_buffer(foreign_array *out, PyObject *object, const char *name,
                       const char *expected) {
  bool is_bfloat;
  PyObject *source = as_bits(object, &is_bfloat);
  if (!source) return -1;
  int result = PyObject_GetBuffer(source, &out->buffer, PyBUF_RECORDS_RO);
  Py_DECREF(source);
  if (result < 0) {
    if (PyErr_ExceptionMatches(PyExc_MemoryError)) return -1;
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: got a %.100s that no buffer describes, expected %s",
                 name, Py_TYPE(object)->tp_name, expected);
    return -1;
  }
  result = read_buffer(out, name, expected);
  if (result == 0 && is_bfloat) out->kind = ELEMENT_BFLOAT;
  if (result < 0) PyBuffer_Release(&out->buffer);
  return result;
}

/* ------------------------------------------------------------------ DLPack */

/* Shape and strides; false where they describe no memory. */
static bool read_shape(foreign_array *array, const dlpack_tensor *tensor) {
  if (tensor->ndim > 0 && !tensor->shape) return false;
  int64_t compact = 1;
  for (int i = tensor->ndim; i-- > 0;) {
    array->shape[i] = tensor->shape[i];
    array->strides[i] = tensor->strides ? tensor->strides[i] : compact;
    if (array->shape[i] < 0 || __builtin_mul_overflow(compact, array->shape[i], &compact))
      return false;
  }
  return tensor->data || compact == 0;
}

static int read_tensor(foreign_array *array, const dlpack_tensor *tensor, const char *name,
                       const char *expected) {
  if (tensor->ndim < 0 || tensor->ndim > ACRE_MAX_DIMS)
    return refuse_dims(tensor->ndim, name);
  static const int kinds[] = {ELEMENT_INT,    ELEMENT_UINT, ELEMENT_FLOAT, -1,
                              ELEMENT_BFLOAT, -1,           ELEMENT_BOOL};
  int code = tensor->dtype.code, bits = tensor->dtype.bits;
  int kind = code < (int)(sizeof kinds / sizeof kinds[0]) ? kinds[code] : -1;
  bool whole = bits == 8 || bits == 16 || bits == 32 || bits == 64;
  if (kind < 0 || !whole || tensor->dtype.lanes != 1) {
    PyErr_Format(PyExc_ValueError,
                 "%s: got DLPack dtype (code %d, bits %d, lanes %d), expected %s", name,
                 code, bits, (int)tensor->dtype.lanes, expected);
    return -1;
  }
  array->kind = (element_kind)kind;
  array->item_size = bits / 8;
  array->ndim = tensor->ndim;
  if (read_shape(array, tensor)) {
    array->data = (const char *)tensor->data + tensor->byte_offset;
    return 0;
  }
  PyErr_Format(PyExc_ValueError, "%s: got a DLPack tensor of an impossible shape", name);
  return -1;
}

static int take_dlpack(foreign_array *out, PyObject *object, const char *name,
                       const char *expected, const acre_engine *engine) {
  const dlpack_tensor *tensor;
  if (dlpack_take(&out->import, &tensor, object, name, engine) < 0) return -1;
  out->on_device = tensor->device.type != DLPACK_CPU;
  if (read_tensor(out, tensor, name, expected) == 0) return 0;
  dlpack_drop(&out->import);
  return -1;
}

/* ------------------------------------------------------------------ taking */

static PyObject *as_array(PyObject *object, const char *name, const char *expected) {
  bool listed = PySequence_Check(object) && !PyUnicode_Check(object);
  if (!listed && !PyObject_HasAttrString(object, "__array__")) {
    argument_refuse(object, name, expected);
    return NULL;
  }
  PyObject *numpy = PyImport_ImportModule("numpy");
  if (!numpy) return NULL;
  PyObject *array = PyObject_CallMethod(numpy, "asarray", "(O)", object);
  Py_DECREF(numpy);
  if (!array && PyErr_ExceptionMatches(PyExc_ValueError)) {
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: got a %.100s that is no array, expected %s", name,
                 Py_TYPE(object)->tp_name, expected);
  }
  return array;
}

int foreign_take_for(foreign_array *out, PyObject *object, const char *name,
                     const char *expected, const acre_engine *engine) {
  memset(out, 0, sizeof *out);
  if (PyBytes_Check(object) || PyByteArray_Check(object))
    return argument_refuse(object, name, expected);
  if (dlpack_is_capsule(object)) return take_dlpack(out, object, name, expected, engine);
  if (PyObject_CheckBuffer(object)) return take_buffer(out, object, name, expected);
  if (dlpack_is_producer(object)) return take_dlpack(out, object, name, expected, engine);
  PyObject *array = as_array(object, name, expected);
  if (!array) return -1;
  int result = PyObject_CheckBuffer(array) ? take_buffer(out, array, name, expected)
                                           : argument_refuse(object, name, expected);
  Py_DECREF(array);
  return result;
}

int foreign_take(foreign_array *out, PyObject *object, const char *name,
                 const char *expected) {
  return foreign_take_for(out, object, name, expected, NULL);
}

/* Bytes from the first element to behind the last one; -1 where there are elements before
 * the first, or too many. */
static int64_t span_of(const foreign_array *array) {
  int64_t last = 0;
  for (int i = 0; i < array->ndim; ++i) {
    int64_t reach;
    if (array->shape[i] == 0) return 0;
    if (array->strides[i] < 0 ||
        __builtin_mul_overflow(array->shape[i] - 1, array->strides[i], &reach) ||
        __builtin_add_overflow(last, reach, &last))
      return -1;
  }
  return last < INT64_MAX / array->item_size ? (last + 1) * array->item_size : -1;
}

int foreign_land(const binding_state *state, foreign_array *array, const char *name,
                 acre_engine *engine) {
  if (!array->on_device) return 0;
  int64_t bytes = span_of(array);
  if (bytes < 0) {
    PyErr_Format(PyExc_ValueError, "%s: got strides that run backwards", name);
    return -1;
  }
  array->landed = PyMem_RawMalloc(bytes ? (size_t)bytes : 1);
  if (!array->landed) {
    PyErr_NoMemory();
    return -1;
  }
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_engine_fetch(engine, array->landed, array->data, (size_t)bytes,
                                         &error));
  if (status != ACRE_OK) {
    errors_raise(state, &error);
    return -1;
  }
  array->data = array->landed;
  array->on_device = false;
  return 0;
}

void foreign_drop(foreign_array *array) {
  PyMem_RawFree(array->landed);
  array->landed = NULL;
  if (array->buffer.obj)
    PyBuffer_Release(&array->buffer);
  else
    dlpack_drop(&array->import);
}

/* ------------------------------------------------------------------ floats */

static bool float_dtype(const foreign_array *array, acre_dtype *out) {
  if (array->kind == ELEMENT_BFLOAT && array->item_size == 2)
    *out = ACRE_BF16;
  else if (array->kind == ELEMENT_FLOAT && array->item_size == 2)
    *out = ACRE_F16;
  else if (array->kind == ELEMENT_FLOAT && array->item_size == 4)
    *out = ACRE_F32;
  else if (array->kind == ELEMENT_FLOAT && array->item_size == 8)
    *out = ACRE_F64;
  else
    return false;
  return true;
}

static int read_dtype(const foreign_array *array, const char *dtype, const char *name,
                      acre_dtype *out) {
  bool half_bits =
      array->item_size == 2 && (array->kind == ELEMENT_UINT || array->kind == ELEMENT_INT);
  if (dtype && strcmp(dtype, "bf16") == 0 && half_bits) {
    *out = ACRE_BF16;
    return 0;
  }
  if (!float_dtype(array, out))
    return refuse_kind(array, name, "bfloat16, float16, float32 or float64");
  if (!dtype || strcmp(dtype, acre_dtype_name(*out)) == 0) return 0;
  PyErr_Format(PyExc_ValueError, "dtype: got '%s' for %s of %s", dtype, name,
               acre_dtype_name(*out));
  return -1;
}

int foreign_floats(const foreign_array *array, const char *dtype, const char *name,
                   acre_array *out) {
  if (read_dtype(array, dtype, name, &out->dtype) < 0) return -1;
  if ((uintptr_t)array->data % (size_t)array->item_size) {
    PyErr_Format(PyExc_ValueError, "%s: got unaligned data, expected multiples of %d bytes",
                 name, array->item_size);
    return -1;
  }
  out->data = array->data;
  out->ndim = array->ndim;
  memcpy(out->shape, array->shape, sizeof out->shape);
  memcpy(out->strides, array->strides, sizeof out->strides);
  out->on_device = array->on_device;
  return 0;
}

/* ------------------------------------------------------------------ integers */

/* Unaligned elements are legal here: hence memcpy. Values above int64 saturate, and so
 * fail the range check that follows. */
static int64_t read_integer(const foreign_array *array, int64_t element) {
  const char *at = (const char *)array->data + element * array->item_size;
  bool is_signed = array->kind == ELEMENT_INT;
  uint64_t bits = 0;
  uint8_t one;
  uint16_t two;
  uint32_t four;
  switch (array->item_size) {
    case 1: memcpy(&one, at, 1); return is_signed ? (int8_t)one : one;
    case 2: memcpy(&two, at, 2); return is_signed ? (int16_t)two : two;
    case 4: memcpy(&four, at, 4); return is_signed ? (int32_t)four : (int64_t)four;
    default:
      memcpy(&bits, at, 8);
      return is_signed || bits <= INT64_MAX ? (int64_t)bits : INT64_MAX;
  }
}

static int copy_integers(const foreign_array *array, const char *name, int64_t count,
                         int32_t *out) {
  int64_t index[ACRE_MAX_DIMS] = {0};
  for (int64_t i = 0; i < count; ++i) {
    int64_t element = 0;
    for (int a = 0; a < array->ndim; ++a) element += index[a] * array->strides[a];
    int64_t value = read_integer(array, element);
    if (value < INT32_MIN || value > INT32_MAX) {
      PyErr_Format(PyExc_ValueError, "%s: got %lld as element %lld, expected int32", name,
                   (long long)value, (long long)i);
      return -1;
    }
    out[i] = (int32_t)value;
    for (int a = array->ndim; a-- > 0;) {
      if (++index[a] < array->shape[a]) break;
      index[a] = 0;
    }
  }
  return 0;
}

static int read_integers(const foreign_array *array, const char *name, int max_ndim,
                         bool flags, integers *out) {
  if (array->ndim < 1 || array->ndim > max_ndim) {
    PyErr_Format(PyExc_ValueError, "%s: got %d dimensions, expected %s", name, array->ndim,
                 max_ndim == 1 ? "1" : "1 or 2");
    return -1;
  }
  int64_t count = 1;
  for (int a = 0; a < array->ndim; ++a) count *= array->shape[a];
  bool integral = array->kind == ELEMENT_INT || array->kind == ELEMENT_UINT ||
                  (flags && array->kind == ELEMENT_BOOL);
  /* An empty list becomes a float64 array; without elements the dtype says nothing. */
  if (!integral && count > 0)
    return refuse_kind(array, name, flags ? "booleans or integers" : "integers");
  if (count <= PY_SSIZE_T_MAX / 4) out->data = PyMem_RawMalloc((size_t)count * 4);
  if (!out->data) {
    PyErr_NoMemory();
    return -1;
  }
  out->ndim = array->ndim;
  memcpy(out->shape, array->shape, sizeof out->shape);
  return copy_integers(array, name, count, out->data);
}

int integers_take(PyObject *object, const char *name, int max_ndim, bool flags,
                  integers *out) {
  memset(out, 0, sizeof *out);
  foreign_array array;
  if (foreign_take(&array, object, name, "an array or sequence of integers") < 0) return -1;
  int result = read_integers(&array, name, max_ndim, flags, out);
  foreign_drop(&array);
  if (result == 0) return 0;
  PyMem_RawFree(out->data);
  out->data = NULL;
  return -1;
}

int ids_take(PyObject *object, const char *name, int32_t **out, int64_t *count) {
  integers ids;
  if (integers_take(object, name, 1, false, &ids) < 0) return -1;
  *out = ids.data;
  *count = ids.shape[0];
  return 0;
}

/* ------------------------------------------------------------------ results */

int numbers_take(PyObject *object, const char *name, int64_t count, float **out) {
  foreign_array foreign;
  acre_array array;
  int result = -1;
  if (foreign_take(&foreign, object, name, "float32 or float64 numbers") < 0) return -1;
  if (foreign_floats(&foreign, NULL, name, &array) < 0) {
    /* the exception is set */
  } else if (array.ndim != 1 || array.shape[0] != count) {
    PyErr_Format(PyExc_ValueError,
                 "%s: got %d dimensions, %lld numbers in the first, "
                 "expected one dimension of %lld",
                 name, array.ndim, (long long)(array.ndim ? array.shape[0] : 1),
                 (long long)count);
  } else if (array.dtype != ACRE_F32 && array.dtype != ACRE_F64) {
    PyErr_Format(PyExc_TypeError, "%s: got %s, expected f32 or f64", name,
                 acre_dtype_name(array.dtype));
  } else if (!(*out = PyMem_RawMalloc((size_t)(count + 1) * sizeof **out))) {
    PyErr_NoMemory();
  } else {
    result = 0;
  }
  for (int64_t i = 0; result == 0 && i < count; ++i) {
    int64_t at = i * array.strides[0];
    (*out)[i] = array.dtype == ACRE_F32 ? ((const float *)array.data)[at]
                                        : (float)((const double *)array.data)[at];
  }
  foreign_drop(&foreign);
  return result;
}

/* The items of `table` as bytes; frees it. */
static int to_flags(integers *table, int64_t count, uint8_t **out) {
  *out = PyMem_RawMalloc((size_t)count + 1);
  for (int64_t i = 0; *out && i < count; ++i) (*out)[i] = table->data[i] != 0;
  PyMem_RawFree(table->data);
  if (*out) return 0;
  PyErr_NoMemory();
  return -1;
}

int flags_take(PyObject *object, const char *name, int64_t count, uint8_t **out) {
  integers table;
  if (integers_take(object, name, 1, true, &table) < 0) return -1;
  if (table.shape[0] == count) return to_flags(&table, count, out);
  PyErr_Format(PyExc_ValueError, "%s: got %lld items, expected %lld", name,
               (long long)table.shape[0], (long long)count);
  PyMem_RawFree(table.data);
  return -1;
}

int head_flags_take(PyObject *object, int64_t layers, int64_t heads, uint8_t **out) {
  integers table;
  if (integers_take(object, "heads", 2, true, &table) < 0) return -1;
  if (table.ndim == 2 && table.shape[0] == layers && table.shape[1] == heads)
    return to_flags(&table, layers * heads, out);
  PyErr_Format(PyExc_ValueError, "heads: got shape [%lld, %lld], expected [%lld, %lld]",
               (long long)table.shape[0], (long long)table.shape[1], (long long)layers,
               (long long)heads);
  PyMem_RawFree(table.data);
  return -1;
}

PyObject *result_array(const char *dtype, int ndim, const int64_t *shape,
                       Py_buffer *buffer) {
  PyObject *numpy = PyImport_ImportModule("numpy");
  PyObject *sizes = numpy ? PyTuple_New(ndim) : NULL;
  for (int i = 0; sizes && i < ndim; ++i) {
    PyObject *size = PyLong_FromLongLong(shape[i]);
    if (size)
      PyTuple_SET_ITEM(sizes, i, size);
    else
      Py_CLEAR(sizes);
  }
  PyObject *array =
      sizes ? PyObject_CallMethod(numpy, "empty", "(Os)", sizes, dtype) : NULL;
  Py_XDECREF(sizes);
  Py_XDECREF(numpy);
  if (array && PyObject_GetBuffer(array, buffer, PyBUF_CONTIG) < 0) Py_CLEAR(array);
  return array;
}

PyObject *constant_ids(const int32_t *ids, int64_t count) {
  PyObject *numpy = PyImport_ImportModule("numpy");
  if (!numpy) return NULL;
  PyObject *bytes = PyBytes_FromStringAndSize((const char *)ids,
                                              (Py_ssize_t)(count * (int64_t)sizeof *ids));
  PyObject *array =
      bytes ? PyObject_CallMethod(numpy, "frombuffer", "Os", bytes, "int32") : NULL;
  Py_XDECREF(bytes);
  Py_DECREF(numpy);
  return array;
}
