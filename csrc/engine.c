#include "engine.h"

#include "platform.h"
#include "plugin.h"

#include <stdio.h>
#include <string.h>

acre_engine_options acre_engine_options_default(void) {
  return (acre_engine_options){sizeof(acre_engine_options), "cpu", 0, NULL, NULL, NULL};
}

static acre_status open_backend(acre_backend **out, const acre_engine_options *options,
                                acre_error *error) {
  const char *device = options->device ? options->device : "";
  if (strcmp(device, "cpu") != 0)
    return acre_plugin_open(out, options->plugin, options->libraries, device, error);
  int32_t threads = options->threads ? options->threads : acre_cpu_count();
  return acre_cpu_backend_open(out, threads, options->isa, error);
}

acre_status acre_engine_open(acre_engine **out, const acre_engine_options *given,
                             acre_error *error) {
  acre_engine_options options;
  ACRE_TAKE_OPTIONS(options, acre_engine_options_default(), given);
  *out = NULL;
  if (options.threads < 0 || options.threads > 1024) {
    return acre_fail(error, ACRE_BAD_VALUE, "threads: got %d, expected 0 to 1024",
                     (int)options.threads);
  }
  acre_engine *engine = acre_alloc_zero(sizeof *engine);
  if (!engine) return acre_fail(error, ACRE_NO_MEMORY, "engine: out of memory");
  acre_status status = open_backend(&engine->backend, &options, error);
  if (status != ACRE_OK) {
    acre_free(engine);
    return status;
  }
  bool whole = strcmp(options.device, "cuda") != 0;
  snprintf(engine->device, sizeof engine->device, "%s%s", options.device,
           whole ? "" : ":0");
  engine->references = 1;
  *out = engine;
  return ACRE_OK;
}

acre_engine *acre_engine_retain(acre_engine *engine) {
  atomic_fetch_add(&engine->references, 1);
  return engine;
}

void acre_engine_release(acre_engine *engine) {
  if (!engine || atomic_fetch_sub(&engine->references, 1) != 1) return;
  engine->backend->ops->destroy(engine->backend);
  acre_free(engine);
}

const char *acre_engine_device(const acre_engine *engine) { return engine->device; }
int32_t acre_engine_threads(const acre_engine *engine) { return engine->backend->threads; }
const char *acre_engine_isa(const acre_engine *engine) { return engine->backend->isa; }
size_t acre_engine_bytes(const acre_engine *engine) {
  return acre_account_held(&engine->backend->account);
}
size_t acre_engine_peak_bytes(const acre_engine *engine) {
  return acre_account_peak(&engine->backend->account);
}
size_t acre_engine_host_bytes(const acre_engine *engine) {
  return acre_account_held(&engine->backend->host);
}
void *acre_engine_stream(const acre_engine *engine) {
  return engine->backend->ops->stream(engine->backend);
}
acre_status acre_engine_fetch(acre_engine *engine, void *host, const void *device,
                              size_t bytes, acre_error *error) {
  return engine->backend->ops->fetch(engine->backend, host, device, bytes, error);
}

static void free_copy(void *context) { acre_free(context); }

static acre_status copy_home(acre_backend *backend, const acre_array *view, size_t bytes,
                             acre_buffer **owner, acre_error *error) {
  void *copy = acre_alloc(acre_max(bytes, 1));
  if (!copy) return acre_fail(error, ACRE_NO_MEMORY, "view: out of memory");
  acre_status status = ACRE_OK;
  if (view->on_device) {
    status = backend->ops->fetch(backend, copy, view->data, bytes, error);
  } else {
    memcpy(copy, view->data, bytes);
  }
  if (status == ACRE_OK)
    status = acre_buffer_wrap(owner, copy, bytes, free_copy, copy, error);
  if (status != ACRE_OK) acre_free(copy);
  return status;
}

static acre_status copy_there(acre_backend *backend, const acre_array *view, size_t bytes,
                              acre_buffer **owner, acre_error *error) {
  const acre_backend_ops *ops = backend->ops;
  acre_queue *queue;
  ACRE_TRY(ops->mover_open(backend, &queue, error));
  acre_status status = ops->alloc(backend, owner, bytes, error);
  if (status == ACRE_OK) {
    acre_span all = {view->data, 0, 1};
    ops->copy_rows(queue, acre_buffer_data(*owner), &all, 1, bytes);
    status = ops->sync(queue, error);
  }
  ops->queue_close(queue);
  if (status == ACRE_OK) return ACRE_OK;
  acre_buffer_release(*owner);
  *owner = NULL;
  return status;
}

acre_status acre_engine_copy(acre_engine *engine, acre_array *view, bool to_host,
                             acre_buffer **owner, acre_error *error) {
  size_t bytes = (size_t)(view->shape[0] * view->strides[0]) * acre_dtype_size(view->dtype);
  *owner = NULL;
  ACRE_TRY((to_host ? copy_home : copy_there)(engine->backend, view, bytes, owner, error));
  view->data = acre_buffer_data(*owner);
  view->on_device = !to_host && engine->backend->apart;
  return ACRE_OK;
}

void acre_engine_reset_peak(acre_engine *engine) {
  acre_account_reset_peak(&engine->backend->account);
}
