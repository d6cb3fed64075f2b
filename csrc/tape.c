#include "tape.h"

#include <string.h>

/* Bytes of the four arrays, each a whole number of cache lines. */
typedef struct sizes {
  size_t x, lse, heads;
} sizes;

static sizes sizes_of(const acre_model *model, int64_t rows) {
  const acre_model_config *c = &model->config;
  int64_t T = (int64_t)acre_dtype_size(c->dtype), f32 = (int64_t)sizeof(float);
  return (sizes){
      (size_t)acre_round_up((c->layers + 1) * rows * c->hidden * f32, ACRE_ALIGN),
      (size_t)acre_round_up(c->layers * rows * c->heads * f32, ACRE_ALIGN),
      (size_t)acre_round_up(c->layers * rows * c->heads * c->head_dim * T, ACRE_ALIGN)};
}

size_t acre_tape_bytes(const acre_model *model, int64_t rows) {
  sizes s = sizes_of(model, rows);
  return s.x + s.lse + 2 * s.heads + acre_timeline_bytes(model, rows, true);
}

acre_status acre_tape_open(acre_tape *tape, const acre_model *model, int64_t rows,
                           bool whole, acre_error *error) {
  const acre_model_config *c = &model->config;
  memset(tape, 0, sizeof *tape);
  tape->rows = rows;
  tape->layers = c->layers;
  tape->hidden = c->hidden;
  tape->heads = c->heads;
  tape->width = c->heads * c->head_dim;
  tape->unit = acre_dtype_size(c->dtype);
  ACRE_TRY(acre_timeline_open(&tape->own, model, rows, true, false, error));
  if (!whole) return ACRE_OK;
  sizes s = sizes_of(model, rows);
  acre_status status = model->backend->ops->alloc(model->backend, &tape->block,
                                                  s.x + s.lse + 2 * s.heads, error);
  if (status != ACRE_OK) {
    acre_tape_close(tape);
    return status;
  }
  char *block = acre_buffer_data(tape->block);
  tape->x = (float *)(void *)block;
  tape->lse = (float *)(void *)(block + s.x);
  tape->q = block + s.x + s.lse;
  tape->attended = tape->q + s.heads;
  return ACRE_OK;
}

void acre_tape_close(acre_tape *tape) {
  acre_timeline_close(&tape->own);
  acre_buffer_release(tape->block);
  memset(tape, 0, sizeof *tape);
}
