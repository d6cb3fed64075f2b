/* acre._core.Cache: the frozen bi-layer cache, a value that any number of sessions
 * share.
 *
 * Made by Builder.freeze and by Cache.restore, never by calling the type. */
#include "arguments.h"
#include "arrays.h"
#include "errors.h"
#include "mapping.h"
#include "records.h"

static const char *const PARTS[] = {"l1_keys",     "l1_values",     "l2_keys", "l2_values",
                                    "recent_keys", "recent_values", NULL};
enum { PART_COUNT = 6 };

cache_object *cache_new(const binding_state *state, PyObject *model) {
  cache_object *self = (cache_object *)state->cache->tp_alloc(state->cache, 0);
  if (self) self->model = Py_NewRef(model);
  return self;
}

PyObject *cache_finish(cache_object *self, acre_cache *cache) {
  self->cache = cache;
  self->ids = constant_ids(acre_cache_ids(cache), acre_cache_plan(cache)->n);
  if (self->ids) return (PyObject *)self;
  Py_DECREF(self);
  return NULL;
}

static int cache_traverse(cache_object *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->model);
  Py_VISIT(self->ids);
  return 0;
}

static void cache_dealloc(cache_object *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  acre_cache_release(self->cache);
  Py_XDECREF(self->ids);
  Py_XDECREF(self->model);
  type->tp_free(self);
  Py_DECREF(type);
}

/* ------------------------------------------------------------------ restoring */

static int read_block(const binding_state *state, acre_cache_parts *parts,
                      acre_buffer *file, PyObject *key, PyObject *value) {
  int part;
  if (argument_choice(key, "blocks", PARTS, &part) < 0) return -1;
  char name[48];
  PyOS_snprintf(name, sizeof name, "blocks['%s']", PARTS[part]);
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2)
    return argument_refuse(value, name, "a tuple (offset, nbytes)");
  int64_t offset, size;
  if (argument_int64(PyTuple_GET_ITEM(value, 0), name, &offset) < 0 ||
      argument_int64(PyTuple_GET_ITEM(value, 1), name, &size) < 0)
    return -1;
  parts->blocks[part] = mapping_block(state, file, offset, size, name);
  return parts->blocks[part] ? 0 : -1;
}

static int read_blocks(const binding_state *state, acre_cache_parts *parts, PyObject *path,
                       PyObject *blocks) {
  if (!PyDict_Check(blocks))
    return argument_refuse(blocks, "blocks", "a dict of part: (offset, nbytes)");
  acre_buffer *file = mapping_open(state, path);
  PyObject *own = file ? PyDict_Copy(blocks) : NULL;
  PyObject *key, *value;
  int result = own ? 0 : -1;
  for (Py_ssize_t at = 0; result == 0 && PyDict_Next(own, &at, &key, &value);)
    result = read_block(state, parts, file, key, value);
  Py_XDECREF(own);
  acre_buffer_release(file);
  return result;
}

/* C knows where a block begins and that it is long enough; a block that is longer than
 * its tensor belongs to another cache. */
static int check_sizes(const acre_cache *cache, const acre_model *model,
                       const acre_cache_parts *parts) {
  const acre_plan *plan = acre_cache_plan(cache);
  const acre_model_config *config = acre_model_get_config(model);
  const int64_t rows[PART_COUNT] = {plan->m,         plan->m,      plan->l2_tokens,
                                    plan->l2_tokens, plan->recent, plan->recent};
  int64_t row_bytes = config->layers * config->kv_heads * config->head_dim *
                      (int64_t)acre_dtype_size(config->dtype);
  for (int part = 0; part < PART_COUNT; ++part) {
    int64_t got = 0, expected = rows[part] * row_bytes;
    if (parts->blocks[part]) got = (int64_t)acre_buffer_size(parts->blocks[part]);
    if (got == expected) continue;
    PyErr_Format(PyExc_ValueError, "blocks['%s']: got %lld bytes, expected %lld",
                 PARTS[part], (long long)got, (long long)expected);
    return -1;
  }
  return 0;
}

static PyObject *restore(const binding_state *state, PyObject *model_object,
                         const acre_cache_parts *parts) {
  acre_model *model = model_take_ready(state, model_object, "model");
  cache_object *result = model ? cache_new(state, model_object) : NULL;
  if (!result) return NULL;
  acre_cache *cache;
  acre_error error;
  acre_status status;
  WITHOUT_GIL(status = acre_cache_restore(&cache, model, parts, &error));
  if (status != ACRE_OK) {
    Py_DECREF(result);
    return errors_raise(state, &error);
  }
  if (check_sizes(cache, model, parts) == 0) return cache_finish(result, cache);
  acre_cache_release(cache);
  Py_DECREF(result);
  return NULL;
}

static PyObject *cache_restore(PyObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"model", "ids", "options", "path", "blocks", NULL};
  binding_state *state = PyType_GetModuleState((PyTypeObject *)type);
  PyObject *model, *ids_object, *options, *path, *blocks;
  acre_cache_parts parts = {.struct_size = sizeof parts,
                            .options = acre_build_options_default()};
  int32_t *ids;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO:restore", names, &model,
                                   &ids_object, &options, &path, &blocks) ||
      PyErr_CheckSignals() < 0 ||
      record_from_dict(&record_build_options, &parts.options, options) < 0 ||
      ids_take(ids_object, "ids", &ids, &parts.n) < 0)
    return NULL;
  parts.ids = ids;
  PyObject *result = NULL;
  if (read_blocks(state, &parts, path, blocks) == 0) result = restore(state, model, &parts);
  for (int i = 0; i < PART_COUNT; ++i) acre_buffer_release(parts.blocks[i]);
  PyMem_RawFree(ids);
  return result;
}

/* ------------------------------------------------------------------ looking */

static PyObject *cache_view(cache_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"part", "layer", "page", NULL};
  PyObject *part_object, *layer_object, *page_object = NULL;
  int part;
  int64_t layer, page = 0, first;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:view", names, &part_object,
                                   &layer_object, &page_object) ||
      argument_choice(part_object, "part", PARTS, &part) < 0 ||
      argument_int64(layer_object, "layer", &layer) < 0 ||
      (page_object && argument_int64(page_object, "page", &page) < 0))
    return NULL;
  binding_state *state = state_of((PyObject *)self);
  acre_array view;
  acre_buffer *owner;
  acre_error error;
  acre_status status = acre_cache_view_in_place(self->cache, (acre_part)part, layer, page,
                                                &view, &first, &owner, &error);
  if (status != ACRE_OK) return errors_raise(state, &error);
  PyObject *engine = ((model_object *)self->model)->engine;
  return Py_BuildValue("(NL)", tensor_new(state, &view, owner, engine), (long long)first);
}

static PyObject *cache_refill_count(cache_object *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"eta", NULL};
  PyObject *eta_object;
  int64_t eta, k;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:refill_count", names, &eta_object) ||
      argument_int64(eta_object, "eta", &eta) < 0)
    return NULL;
  acre_error error;
  if (acre_refill_count(&k, self->cache, eta, &error) != ACRE_OK)
    return errors_raise(state_of((PyObject *)self), &error);
  return PyLong_FromLongLong(k);
}

static PyObject *cache_plan(cache_object *self, void *closure) {
  (void)closure;
  return record_to_dict(&record_plan, acre_cache_plan(self->cache));
}

static PyObject *cache_proxy(cache_object *self, void *closure) {
  (void)closure;
  bool trained = acre_cache_proxy(self->cache) == ACRE_PROXY_TRAINED;
  return PyUnicode_FromString(trained ? "trained" : "pooled");
}

static PyObject *cache_ids(cache_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->ids);
}

static PyObject *cache_closed_tokens(cache_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(acre_cache_closed_tokens(self->cache));
}

static PyObject *cache_nbytes(cache_object *self, void *closure) {
  (void)closure;
  return PyLong_FromSize_t(acre_cache_bytes(self->cache));
}

static PyObject *cache_pages(cache_object *self, void *closure) {
  (void)closure;
  return PyLong_FromLongLong(acre_cache_pages(self->cache));
}

static PyObject *cache_model(cache_object *self, void *closure) {
  (void)closure;
  return Py_NewRef(self->model);
}

/* ------------------------------------------------------------------ type */

PyDoc_STRVAR(view_doc,
             "view($self, /, part, layer, page=0)\n--\n\n"
             "One layer's tensor as (Tensor [rows, g, d], index of its first row).\n\n"
             "part: 'l1_keys', 'l1_values', 'l2_keys', 'l2_values', 'recent_keys' or\n"
             "'recent_values'; keys before RoPE. L2 lies in `pages` pages, the others in\n"
             "page 0. No copy, on a GPU either; the Tensor keeps the bytes alive. Raises\n"
             "ValueError.");
PyDoc_STRVAR(refill_count_doc,
             "refill_count($self, /, eta)\n--\n\n"
             "k, the groups that a budget of eta L2 tokens refills. eta = 0 gives 0;\n"
             "raises ValueError for a budget below one group.");
PyDoc_STRVAR(restore_doc,
             "restore($type, /, model, ids, options, path, blocks)\n--\n\n"
             "A stored cache, its tensors mapped read-only from a file.\n\n"
             "options: a dict of the resolved build options. blocks: part ->\n"
             "(offset, nbytes) in the file; each block holds a whole tensor\n"
             "[L, rows, g, d] in the model's dtype, row-major; parts without rows may be\n"
             "absent. The file must not shrink while the cache lives. Raises ValueError\n"
             "where a size does not fit model, options and ids, and OSError.");
PyDoc_STRVAR(cache_doc,
             "A frozen bi-layer KV cache, made by Builder.freeze() and Cache.restore().\n\n"
             "Immutable; any number of sessions on any threads may use one.");

static PyMethodDef cache_methods[] = {
    {"view", KEYWORD_METHOD(cache_view), METH_VARARGS | METH_KEYWORDS, view_doc},
    {"refill_count", KEYWORD_METHOD(cache_refill_count), METH_VARARGS | METH_KEYWORDS,
     refill_count_doc},
    /* A class method only because a static one could not reach the module's state. */
    {"restore", KEYWORD_METHOD(cache_restore), METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     restore_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef cache_getset[] = {
    {"plan", (getter)cache_plan, NULL,
     PyDoc_STR("The plan that the cache fulfils, a new dict."), NULL},
    {"proxy", (getter)cache_proxy, NULL, PyDoc_STR("'pooled' or 'trained'."), NULL},
    {"ids", (getter)cache_ids, NULL, PyDoc_STR("Token ids, read-only int32 [n]."), NULL},
    {"closed_tokens", (getter)cache_closed_tokens, NULL,
     PyDoc_STR("Tokens of full windows, which no continuation may replace."), NULL},
    {"nbytes", (getter)cache_nbytes, NULL, PyDoc_STR("Bytes of all entries."), NULL},
    {"pages", (getter)cache_pages, NULL, PyDoc_STR("Pages of the L2 cache."), NULL},
    {"model", (getter)cache_model, NULL, PyDoc_STR("The model that read it."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_doc, (void *)cache_doc},   {Py_tp_dealloc, cache_dealloc},
    {Py_tp_traverse, cache_traverse}, {Py_tp_methods, cache_methods},
    {Py_tp_getset, cache_getset},     {0, NULL},
};

PyType_Spec cache_spec = {
    .name = "acre._core.Cache",
    .basicsize = sizeof(cache_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = cache_slots,
};
