/* Takes a struct and its table of fields, gives a dict, and the reverse.
 *
 * The tables are the only place where the names of acre.h's fields meet Python. A key
 * that no field has is refused: a misspelled option must not silently mean its default.
 */
#include "records.h"

#include "arguments.h"

#define FIELD(type, member, what) {#member, offsetof(type, member), what, false, NULL, NULL}
#define REQUIRED(type, member, what) \
  {#member, offsetof(type, member), what, true, NULL, NULL}
#define CHOICE(type, member, names) \
  {#member, offsetof(type, member), FIELD_CHOICE, false, names, NULL}
#define RECORD(title, table) {title, table, (int)(sizeof table / sizeof table[0])}

static const char *const ROPE_KINDS[] = {"default", "linear", "dynamic",
                                         "llama3",  "yarn",   NULL};
static const char *const COMPUTE_DTYPES[] = {"f32", "bf16", NULL};
static const char *const WEIGHTS[] = {"same", "q8", NULL};
static const char *const PROXIES[] = {"pooled", "trained", NULL};
static const char *const PLACES[] = {"auto", "device", "host", NULL};
static const char *const SELECTS[] = {"shared", "per_layer", NULL};

static const field ROPE_FIELDS[] = {
    CHOICE(acre_rope_config, kind, ROPE_KINDS),
    FIELD(acre_rope_config, theta, FIELD_DOUBLE),
    FIELD(acre_rope_config, factor, FIELD_DOUBLE),
    FIELD(acre_rope_config, original_positions, FIELD_INT64),
    FIELD(acre_rope_config, low_freq_factor, FIELD_DOUBLE),
    FIELD(acre_rope_config, high_freq_factor, FIELD_DOUBLE),
    FIELD(acre_rope_config, beta_fast, FIELD_DOUBLE),
    FIELD(acre_rope_config, beta_slow, FIELD_DOUBLE),
    FIELD(acre_rope_config, attention_factor, FIELD_DOUBLE),
    FIELD(acre_rope_config, truncate, FIELD_BOOL),
};
static const record ROPE = RECORD("config.rope", ROPE_FIELDS);

static const field CONFIG_FIELDS[] = {
    REQUIRED(acre_model_config, vocab_size, FIELD_INT64),
    REQUIRED(acre_model_config, hidden, FIELD_INT64),
    REQUIRED(acre_model_config, layers, FIELD_INT64),
    REQUIRED(acre_model_config, heads, FIELD_INT64),
    REQUIRED(acre_model_config, kv_heads, FIELD_INT64),
    REQUIRED(acre_model_config, head_dim, FIELD_INT64),
    REQUIRED(acre_model_config, ffn, FIELD_INT64),
    REQUIRED(acre_model_config, w_max, FIELD_INT64),
    FIELD(acre_model_config, rms_eps, FIELD_DOUBLE),
    {"rope", offsetof(acre_model_config, rope), FIELD_RECORD, false, NULL, &ROPE},
    FIELD(acre_model_config, tied_head, FIELD_BOOL),
    CHOICE(acre_model_config, dtype, COMPUTE_DTYPES),
    FIELD(acre_model_config, eos_id, FIELD_INT64),
    CHOICE(acre_model_config, weights, WEIGHTS),
};
const record record_model_config = RECORD("config", CONFIG_FIELDS);

static const field OPTION_FIELDS[] = {
    CHOICE(acre_build_options, proxy, PROXIES),
    FIELD(acre_build_options, interval, FIELD_INT64),
    FIELD(acre_build_options, window, FIELD_INT64),
    FIELD(acre_build_options, stride, FIELD_INT64),
    FIELD(acre_build_options, carry, FIELD_INT64),
    FIELD(acre_build_options, eta, FIELD_INT64),
    FIELD(acre_build_options, reserve, FIELD_INT64),
    FIELD(acre_build_options, weight, FIELD_INT64),
    FIELD(acre_build_options, sink, FIELD_INT64),
    CHOICE(acre_build_options, l2, PLACES),
};
const record record_build_options = RECORD("options", OPTION_FIELDS);

static const field PLAN_FIELDS[] = {
    FIELD(acre_plan, n, FIELD_INT64),
    FIELD(acre_plan, interval, FIELD_INT64),
    FIELD(acre_plan, window, FIELD_INT64),
    FIELD(acre_plan, stride, FIELD_INT64),
    FIELD(acre_plan, carry, FIELD_INT64),
    FIELD(acre_plan, eta, FIELD_INT64),
    FIELD(acre_plan, reserve, FIELD_INT64),
    FIELD(acre_plan, weight, FIELD_INT64),
    FIELD(acre_plan, sink, FIELD_INT64),
    FIELD(acre_plan, windows, FIELD_INT64),
    FIELD(acre_plan, m, FIELD_INT64),
    FIELD(acre_plan, recent, FIELD_INT64),
    FIELD(acre_plan, l2_tokens, FIELD_INT64),
    FIELD(acre_plan, l1_bytes, FIELD_SIZE),
    FIELD(acre_plan, l2_bytes, FIELD_SIZE),
    FIELD(acre_plan, recent_bytes, FIELD_SIZE),
    FIELD(acre_plan, peak_bytes, FIELD_SIZE),
    FIELD(acre_plan, host_bytes, FIELD_SIZE),
    CHOICE(acre_plan, l2, PLACES),
};
const record record_plan = RECORD("plan", PLAN_FIELDS);

static const field SAMPLING_FIELDS[] = {
    FIELD(acre_sampling, temperature, FIELD_FLOAT),
    FIELD(acre_sampling, top_k, FIELD_INT32),
    FIELD(acre_sampling, top_p, FIELD_FLOAT),
    FIELD(acre_sampling, repetition_penalty, FIELD_FLOAT),
    FIELD(acre_sampling, seed, FIELD_UINT64),
};
const record record_sampling = RECORD("sampling", SAMPLING_FIELDS);

static const field SCORE_FIELDS[] = {
    CHOICE(acre_score_options, select, SELECTS),
    FIELD(acre_score_options, rotated, FIELD_BOOL),
};
const record record_score_options = RECORD("score", SCORE_FIELDS);

/* ------------------------------------------------------------------ reading */

static int read_double(const field *field, void *slot, PyObject *value, const char *name) {
  double number;
  if (argument_double(value, name, &number) < 0) return -1;
  if (field->kind == FIELD_DOUBLE)
    *(double *)slot = number;
  else
    *(float *)slot = (float)number;
  return 0;
}

static int read_field(const field *field, void *target, PyObject *value, const char *name) {
  void *slot = (char *)target + field->offset;
  switch (field->kind) {
    case FIELD_INT64: return argument_int64(value, name, slot);
    case FIELD_INT32: return argument_int32(value, name, slot);
    case FIELD_UINT64: return argument_uint64(value, name, slot);
    case FIELD_DOUBLE:
    case FIELD_FLOAT: return read_double(field, slot, value, name);
    case FIELD_BOOL: return argument_bool(value, name, slot);
    case FIELD_CHOICE: return argument_choice(value, name, field->choices, slot);
    case FIELD_RECORD: return record_from_dict(field->inner, slot, value);
    case FIELD_SIZE: break;
  }
  PyErr_Format(PyExc_SystemError, "%s: not an input", name);
  return -1;
}

int record_from_values(const record *record, void *target, PyObject *const *values) {
  for (int i = 0; i < record->count; ++i) {
    const field *field = &record->fields[i];
    if (values[i] && read_field(field, target, values[i], field->name) < 0) return -1;
  }
  return 0;
}

static bool has_field(const record *record, PyObject *key) {
  for (int i = 0; i < record->count; ++i)
    if (PyUnicode_CompareWithASCIIString(key, record->fields[i].name) == 0) return true;
  return false;
}

static int refuse_unknown(const record *record, PyObject *dict) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    if (PyUnicode_Check(key) && has_field(record, key)) continue;
    char known[400] = "";
    for (int i = 0; i < record->count; ++i) {
      size_t used = strlen(known);
      PyOS_snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "",
                    record->fields[i].name);
    }
    PyErr_Format(PyExc_ValueError, "%s: unknown key %R, expected some of: %s", record->name,
                 key, known);
    return -1;
  }
  return 0;
}

static int read_item(const record *record, const field *field, void *target,
                     PyObject *dict) {
  PyObject *key = PyUnicode_FromString(field->name);
  if (!key) return -1;
  PyObject *value = Py_XNewRef(PyDict_GetItemWithError(dict, key));
  Py_DECREF(key);
  int result = PyErr_Occurred() ? -1 : 0;
  if (value) {
    char name[80];
    PyOS_snprintf(name, sizeof name, "%s['%s']", record->name, field->name);
    result = read_field(field, target, value, name);
  } else if (!result && field->required) {
    PyErr_Format(PyExc_ValueError, "%s: the key '%s' is missing", record->name,
                 field->name);
    result = -1;
  }
  Py_XDECREF(value);
  return result;
}

int record_from_dict(const record *record, void *target, PyObject *dict) {
  if (!PyDict_Check(dict)) return argument_refuse(dict, record->name, "a dict");
  /* A copy: no conversion below may change what is being walked. */
  PyObject *own = PyDict_Copy(dict);
  if (!own) return -1;
  int result = refuse_unknown(record, own);
  for (int i = 0; result == 0 && i < record->count; ++i)
    result = read_item(record, &record->fields[i], target, own);
  Py_DECREF(own);
  return result;
}

/* ------------------------------------------------------------------ giving */

static PyObject *give_field(const field *field, const void *source) {
  const void *slot = (const char *)source + field->offset;
  switch (field->kind) {
    case FIELD_INT64: return PyLong_FromLongLong(*(const int64_t *)slot);
    case FIELD_INT32: return PyLong_FromLong(*(const int32_t *)slot);
    case FIELD_UINT64: return PyLong_FromUnsignedLongLong(*(const uint64_t *)slot);
    case FIELD_SIZE: return PyLong_FromSize_t(*(const size_t *)slot);
    case FIELD_DOUBLE: return PyFloat_FromDouble(*(const double *)slot);
    case FIELD_FLOAT: return PyFloat_FromDouble(*(const float *)slot);
    case FIELD_BOOL: return PyBool_FromLong(*(const bool *)slot);
    case FIELD_CHOICE: return PyUnicode_FromString(field->choices[*(const int *)slot]);
    case FIELD_RECORD: return record_to_dict(field->inner, slot);
  }
  Py_UNREACHABLE();
}

PyObject *record_to_dict(const record *record, const void *source) {
  PyObject *dict = PyDict_New();
  if (!dict) return NULL;
  for (int i = 0; i < record->count; ++i) {
    PyObject *value = give_field(&record->fields[i], source);
    if (!value || PyDict_SetItemString(dict, record->fields[i].name, value) < 0) {
      Py_XDECREF(value);
      Py_DECREF(dict);
      return NULL;
    }
    Py_DECREF(value);
  }
  return dict;
}
