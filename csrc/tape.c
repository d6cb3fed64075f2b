#include "tape.h"

#include "platform.h"

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

/* Lays the arrays out for so many rows, in a block that holds them. */
static void lay_out(acre_tape *tape, const acre_model *model, int64_t rows) {
  const acre_model_config *c = &model->config;
  sizes s = sizes_of(model, rows);
  char *block = acre_buffer_data(tape->block);
  tape->rows = rows;
  tape->x = (float *)(void *)block;
  tape->lse = (float *)(void *)(block + s.x);
  tape->q = block + s.x + s.lse;
  tape->attended = tape->q + s.heads;
  tape->own.count = 0;
  tape->hidden = c->hidden;
  tape->heads = c->heads;
  tape->width = c->heads * c->head_dim;
  tape->unit = acre_dtype_size(c->dtype);
}

acre_status acre_tape_open(acre_tape *tape, const acre_model *model, int64_t rows,
                           bool whole, acre_error *error) {
  memset(tape, 0, sizeof *tape);
  tape->rows = tape->capacity = rows;
  ACRE_TRY(acre_timeline_open(&tape->own, model, rows, true, false, error));
  if (!whole) return ACRE_OK;
  sizes s = sizes_of(model, rows);
  acre_status status = model->backend->ops->alloc(model->backend, &tape->block,
                                                  s.x + s.lse + 2 * s.heads, error);
  if (status == ACRE_OK) {
    lay_out(tape, model, rows);
  } else {
    acre_tape_close(tape);
  }
  return status;
}

void acre_tape_close(acre_tape *tape) {
  acre_timeline_close(&tape->own);
  acre_buffer_release(tape->block);
  memset(tape, 0, sizeof *tape);
}

/* ---------------------------------------------------------------- the shelf */

#define ROWS_STEP 128 /* capacities are multiples: passes of about a size share tapes */

static void take_out(acre_tape *tape, acre_tape_shelf *shelf, int64_t index) {
  *tape = shelf->tapes[index];
  shelf->tapes[index] = shelf->tapes[--shelf->count];
}

acre_status acre_tape_take(acre_tape *tape, acre_tape_shelf *shelf, const acre_model *model,
                           int64_t rows, acre_error *error) {
  for (int64_t i = 0; i < shelf->count; ++i) {
    int64_t capacity = shelf->tapes[i].capacity;
    if (capacity < rows || capacity > 2 * rows + ROWS_STEP) continue;
    take_out(tape, shelf, i);
    lay_out(tape, model, rows);
    return ACRE_OK;
  }
  if (shelf->count) {
    take_out(tape, shelf, 0);
    acre_tape_close(tape);
  }
  ACRE_TRY(acre_tape_open(tape, model, acre_round_up(rows, ROWS_STEP), true, error));
  lay_out(tape, model, rows);
  return ACRE_OK;
}

/* Room for one more; false where there is none. */
static bool make_room(acre_tape_shelf *shelf) {
  if (shelf->count < shelf->capacity) return true;
  int64_t capacity = 2 * shelf->capacity + 8;
  acre_tape *grown = acre_alloc((size_t)capacity * sizeof *grown);
  if (!grown) return false;
  if (shelf->count) memcpy(grown, shelf->tapes, (size_t)shelf->count * sizeof *grown);
  acre_free(shelf->tapes);
  shelf->tapes = grown;
  shelf->capacity = capacity;
  return true;
}

void acre_tape_give(acre_tape *tape, acre_tape_shelf *shelf) {
  if (!tape->block || !make_room(shelf)) {
    acre_tape_close(tape);
    return;
  }
  shelf->tapes[shelf->count++] = *tape;
  memset(tape, 0, sizeof *tape);
}

size_t acre_tape_shelf_bytes(const acre_tape_shelf *shelf, const acre_model *model) {
  size_t bytes = 0;
  for (int64_t i = 0; i < shelf->count; ++i) {
    bytes += acre_tape_bytes(model, shelf->tapes[i].capacity);
  }
  return bytes;
}

void acre_tape_shelf_close(acre_tape_shelf *shelf) {
  for (int64_t i = 0; i < shelf->count; ++i) acre_tape_close(&shelf->tapes[i]);
  acre_free(shelf->tapes);
  memset(shelf, 0, sizeof *shelf);
}
