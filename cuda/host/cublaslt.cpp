/* cuBLASLt's entry points on the host, in plain loops: a library of its own, so that how it is
 * found and what it is asked for (sides, steps, transpositions, bias) are tested as well. */
#include "cublaslt.h"

#include <stdlib.h>
#include <string.h>

struct lt_context {
  int unused;
};
struct lt_matmul_desc {
  int a_op, b_op, epilogue;
  const float *bias;
};
struct lt_matrix_layout {
  int type;
  uint64_t rows, columns;
  int64_t step;
};
struct lt_matmul_preference {
  uint64_t workspace;
  uint32_t alignment[4];
};

namespace {

enum { INVALID = 7 };

template <class T>
int create(T **out) {
  *out = (T *)calloc(1, sizeof **out);
  return *out ? LT_SUCCESS : 3;
}

template <class T>
int destroy(T *thing) {
  free(thing);
  return LT_SUCCESS;
}

int take(void *to, const void *from, size_t size, size_t expected) {
  if (size != expected) return INVALID;
  memcpy(to, from, size);
  return LT_SUCCESS;
}

/* Number (row, column) of op(x), column by column. */
float number(const void *x, const lt_matrix_layout *layout, int op, uint64_t row,
             uint64_t column) {
  uint64_t r = op == LT_OP_T ? column : row, c = op == LT_OP_T ? row : column;
  if (r >= layout->rows || c >= layout->columns) abort();
  uint64_t at = r + c * (uint64_t)layout->step;
  if (layout->type == LT_R_32F) return ((const float *)x)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint64_t size_of(const lt_matrix_layout *layout, int op, bool rows) {
  return rows == (op == LT_OP_N) ? layout->rows : layout->columns;
}

/* Whether all columns start at multiples of so many bytes. */
bool suits(const void *data, const lt_matrix_layout *layout, uint64_t alignment) {
  uint64_t step = (uint64_t)layout->step * (layout->type == LT_R_32F ? 4 : 2);
  return alignment && (uintptr_t)data % alignment == 0 &&
         (layout->columns < 2 || step % alignment == 0);
}

bool fit(lt_desc d, lt_layout a, lt_layout b, lt_layout c) {
  return a->type == b->type && c->type == LT_R_32F && a->step >= (int64_t)a->rows &&
         b->step >= (int64_t)b->rows && c->step >= (int64_t)c->rows &&
         size_of(a, d->a_op, true) == c->rows && size_of(b, d->b_op, false) == c->columns &&
         size_of(a, d->a_op, false) == size_of(b, d->b_op, true);
}

/* A product that was asked for, with all that it was asked with. */
struct job {
  lt_matmul_desc d;
  lt_matrix_layout A, B, C;
  const void *a, *b;
  void *out;
  float by, old;
  cudaStream_t stream;
};

cudaError_t multiply(const void *asked) {
  const job *w = (const job *)asked;
  uint64_t inner = size_of(&w->A, w->d.a_op, false);
  w->stream->access(true);
  for (uint64_t j = 0; j < w->C.columns; j++) {
    for (uint64_t i = 0; i < w->C.rows; i++) {
      float sum = 0.0f, *to = (float *)w->out + i + j * (uint64_t)w->C.step;
      for (uint64_t k = 0; k < inner; k++)
        sum += number(w->a, &w->A, w->d.a_op, i, k) * number(w->b, &w->B, w->d.b_op, k, j);
      sum *= w->by;
      if (w->old != 0.0f) sum += w->old * *to;
      *to = w->d.epilogue == LT_EPILOGUE_BIAS ? sum + w->d.bias[i] : sum;
    }
  }
  w->stream->access(false);
  return cudaSuccess;
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasLtGetStatusString(int status) {
  return status == LT_NOT_SUPPORTED ? "not supported" : "invalid value";
}
int cublasLtCreate(lt_handle *out) { return create(out); }
int cublasLtDestroy(lt_handle handle) { return destroy(handle); }

int cublasLtMatmulDescCreate(lt_desc *out, int compute, int scale) {
  if (compute != LT_COMPUTE_32F || scale != LT_R_32F) return INVALID;
  int status = create(out);
  if (status == LT_SUCCESS) (*out)->epilogue = LT_EPILOGUE_DEFAULT;
  return status;
}
int cublasLtMatmulDescDestroy(lt_desc desc) { return destroy(desc); }

int cublasLtMatmulDescSetAttribute(lt_desc d, int attribute, const void *value,
                                   size_t size) {
  switch (attribute) {
    case LT_DESC_TRANSA: return take(&d->a_op, value, size, sizeof d->a_op);
    case LT_DESC_TRANSB: return take(&d->b_op, value, size, sizeof d->b_op);
    case LT_DESC_EPILOGUE: return take(&d->epilogue, value, size, sizeof d->epilogue);
    case LT_DESC_BIAS_POINTER: return take(&d->bias, value, size, sizeof d->bias);
  }
  return INVALID;
}

int cublasLtMatrixLayoutCreate(lt_layout *out, int type, uint64_t rows, uint64_t columns,
                               int64_t step) {
  int status = create(out);
  if (status == LT_SUCCESS) **out = {type, rows, columns, step};
  return status;
}
int cublasLtMatrixLayoutDestroy(lt_layout layout) { return destroy(layout); }

int cublasLtMatmulPreferenceCreate(lt_preference *out) { return create(out); }
int cublasLtMatmulPreferenceDestroy(lt_preference preference) {
  return destroy(preference);
}

int cublasLtMatmulPreferenceSetAttribute(lt_preference p, int attribute, const void *value,
                                         size_t size) {
  if (attribute == LT_PREF_MAX_WORKSPACE_BYTES)
    return take(&p->workspace, value, size, sizeof p->workspace);
  int which = attribute - LT_PREF_MIN_ALIGNMENT_A_BYTES;
  if (which < 0 || which > 3) return INVALID;
  return take(&p->alignment[which], value, size, sizeof p->alignment[which]);
}

/* The algorithm carries the alignments that it was chosen for. */
int cublasLtMatmulAlgoGetHeuristic(lt_handle, lt_desc d, lt_layout a, lt_layout b,
                                   lt_layout c, lt_layout, lt_preference p, int wanted,
                                   lt_heuristic *out, int *found) {
  *found = 0;
  if (wanted < 1 || !fit(d, a, b, c)) return INVALID;
  memset(out, 0, sizeof *out);
  for (int i = 0; i < 4; i++) out->algo.data[i] = p->alignment[i];
  *found = 1;
  return LT_SUCCESS;
}

int cublasLtMatmul(lt_handle, lt_desc d, const void *alpha, const void *a, lt_layout A,
                   const void *b, lt_layout B, const void *beta, const void *c, lt_layout C,
                   void *out, lt_layout D, const lt_algo *algo, void *, size_t,
                   cudaStream_t stream) {
  const void *sides[] = {a, b, c, out};
  const lt_matrix_layout *layouts[] = {A, B, C, D};
  for (int i = 0; i < 4; i++)
    if (!suits(sides[i], layouts[i], algo->data[i])) return LT_NOT_SUPPORTED;
  if (!fit(d, A, B, C) || c != out || C->step != D->step) return INVALID;
  job work = {*d,    *A, *B, *C, a, b, out, *(const float *)alpha, *(const float *)beta,
              stream};
  cudaError_t error = stream->enqueue(stream, multiply, &work, sizeof work);
  return error == cudaSuccess ? (int)LT_SUCCESS : (int)INVALID;
}
}
