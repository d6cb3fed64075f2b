#include "timeline.h"

#include "platform.h"

#include <string.h>

size_t acre_timeline_bytes(const acre_model *model, int64_t capacity, bool keep_raw) {
  return (size_t)(capacity * model->config.layers * (keep_raw ? 3 : 2)) *
         acre_model_row_bytes(model);
}

acre_status acre_timeline_begin(acre_timeline *timeline, const acre_model *model,
                                int64_t capacity, bool with_bias, acre_error *error) {
  acre_backend *backend = model->backend;
  int64_t layers = model->config.layers;
  *timeline = (acre_timeline){
      .layers = layers, .capacity = capacity, .row_bytes = acre_model_row_bytes(model)};
  timeline->buffers = acre_alloc_zero((size_t)(3 * layers) * sizeof *timeline->buffers);
  acre_status status = ACRE_OK;
  if (!timeline->buffers) {
    status = acre_fail(error, ACRE_NO_MEMORY, "timeline: out of memory");
  }
  if (status == ACRE_OK && with_bias) {
    status = backend->ops->alloc(backend, &timeline->bias,
                                 (size_t)acre_max(capacity, 1) * sizeof(float), error);
  }
  if (status != ACRE_OK) acre_timeline_close(timeline);
  return status;
}

acre_status acre_timeline_open_layer(acre_timeline *timeline, const acre_model *model,
                                     int64_t layer, bool keep_raw, acre_error *error) {
  acre_backend *backend = model->backend;
  size_t bytes = (size_t)acre_max(timeline->capacity, 1) * timeline->row_bytes;
  for (int which = keep_raw ? 0 : 1; which < 3; ++which) {
    acre_buffer **buffer = &timeline->buffers[which * timeline->layers + layer];
    ACRE_TRY(backend->ops->alloc(backend, buffer, bytes, error));
  }
  return ACRE_OK;
}

acre_status acre_timeline_open(acre_timeline *timeline, const acre_model *model,
                               int64_t capacity, bool keep_raw, bool with_bias,
                               acre_error *error) {
  ACRE_TRY(acre_timeline_begin(timeline, model, capacity, with_bias, error));
  acre_status status = ACRE_OK;
  for (int64_t i = 0; status == ACRE_OK && i < timeline->layers; ++i) {
    status = acre_timeline_open_layer(timeline, model, i, keep_raw, error);
  }
  if (status != ACRE_OK) acre_timeline_close(timeline);
  return status;
}

void acre_timeline_close(acre_timeline *timeline) {
  for (int64_t i = 0; timeline->buffers && i < 3 * timeline->layers; ++i) {
    acre_buffer_release(timeline->buffers[i]);
  }
  acre_free(timeline->buffers);
  acre_buffer_release(timeline->bias);
  memset(timeline, 0, sizeof *timeline);
}

char *acre_timeline_at(const acre_timeline *timeline, int which, int64_t layer,
                       int64_t row) {
  acre_buffer *buffer = acre_timeline_buffer(timeline, which, layer);
  return buffer ? (char *)acre_buffer_data(buffer) + (size_t)row * timeline->row_bytes
                : NULL;
}

acre_keys acre_timeline_keys(const acre_timeline *timeline, int64_t layer, int64_t count) {
  const float *bias = timeline->bias ? acre_buffer_data(timeline->bias) : NULL;
  return (acre_keys){acre_timeline_at(timeline, ACRE_ROTATED, layer, 0),
                     acre_timeline_at(timeline, ACRE_VALUES, layer, 0),
                     bias ? bias + layer * timeline->bias_stride : NULL, count};
}
