#include "loss.h"

#include <string.h>

acre_status acre_loss_open(acre_loss *loss, const acre_model *model, acre_error *error) {
  int64_t vocab = model->config.vocab_size;
  size_t logits =
      (size_t)acre_round_up(ACRE_LOSS_ROWS * vocab * (int64_t)sizeof(float), ACRE_ALIGN);
  size_t column = ACRE_LOSS_ROWS * sizeof(float);
  memset(loss, 0, sizeof *loss);
  ACRE_TRY(
      model->backend->ops->alloc(model->backend, &loss->block, logits + 2 * column, error));
  char *block = acre_buffer_data(loss->block);
  loss->logits = (float *)block;
  loss->values = (float *)(block + logits);
  loss->targets = (int32_t *)(block + logits + column);
  return ACRE_OK;
}

void acre_loss_close(acre_loss *loss) {
  acre_buffer_release(loss->block);
  memset(loss, 0, sizeof *loss);
}

void acre_loss_run(acre_loss *loss, float *out, const int32_t *targets,
                   const acre_model *model, acre_workspace *workspace, int64_t rows) {
  const acre_backend_ops *ops = model->backend->ops;
  for (int64_t i = 0; i < rows; i += ACRE_LOSS_ROWS) {
    int64_t count = acre_min(rows - i, ACRE_LOSS_ROWS);
    size_t bytes = (size_t)count * sizeof(float);
    acre_head(model, workspace, loss->logits, i, count);
    ops->upload(workspace->queue, loss->targets, targets + i, bytes);
    ops->cross_entropy(workspace->queue, loss->values, loss->logits, loss->targets, count,
                       model->config.vocab_size);
    ops->download(workspace->queue, out + i, loss->values, bytes);
  }
}
