#include "tensor.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

float acre_from_f16(uint16_t bits) {
  int exponent = bits >> 10 & 31;
  int mantissa = bits & 0x3ff;
  float magnitude;
  if (exponent == 0) {
    magnitude = ldexpf((float)mantissa, -24);
  } else if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = ldexpf((float)(mantissa | 0x400), exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

void acre_shape_text(char *text, size_t size, int32_t ndim, const int64_t *shape) {
  size_t used = 0;
  text[0] = 0;
  for (int32_t i = 0; i < ndim && used < size; ++i) {
    int wrote =
        snprintf(text + used, size - used, "%s%lld", i ? ", " : "[", (long long)shape[i]);
    if (wrote < 0) return;
    used += (size_t)wrote;
  }
  if (used + 2 <= size) snprintf(text + used, size - used, ndim ? "]" : "[]");
}

acre_status acre_array_expect(const acre_array *array, const char *name, int32_t ndim,
                              const int64_t *shape, acre_error *error) {
  bool same = array->ndim == ndim;
  for (int32_t i = 0; same && i < ndim; ++i) same = array->shape[i] == shape[i];
  if (same && (array->data || acre_dtype_size(array->dtype) == 0)) return ACRE_OK;
  if (same) return acre_fail(error, ACRE_BAD_SHAPE, "%s: array without data", name);
  char got[96], want[96];
  acre_shape_text(got, sizeof got,
                  array->ndim < 0 || array->ndim > ACRE_MAX_DIMS ? 0 : array->ndim,
                  array->shape);
  acre_shape_text(want, sizeof want, ndim, shape);
  return acre_fail(error, ACRE_BAD_SHAPE, "%s: got shape %s, expected %s", name, got, want);
}

void acre_array_row(float *out, const acre_array *array, int64_t row) {
  int64_t columns = array->shape[array->ndim - 1];
  int64_t step = array->strides[array->ndim - 1];
  int64_t start = array->ndim == 2 ? row * array->strides[0] : 0;
  switch (array->dtype) {
    case ACRE_F32: {
      const float *from = (const float *)array->data + start;
      if (step == 1) {
        memcpy(out, from, (size_t)columns * sizeof *out);
      } else {
        for (int64_t c = 0; c < columns; ++c) out[c] = from[c * step];
      }
      break;
    }
    case ACRE_BF16: {
      const uint16_t *from = (const uint16_t *)array->data + start;
      for (int64_t c = 0; c < columns; ++c) out[c] = acre_from_bf16(from[c * step]);
      break;
    }
    case ACRE_F16: {
      const uint16_t *from = (const uint16_t *)array->data + start;
      for (int64_t c = 0; c < columns; ++c) out[c] = acre_from_f16(from[c * step]);
      break;
    }
    case ACRE_F64: {
      const double *from = (const double *)array->data + start;
      for (int64_t c = 0; c < columns; ++c) out[c] = (float)from[c * step];
      break;
    }
  }
}

bool acre_store_row(void *dst, acre_dtype dtype, const float *row, int64_t count) {
  bool finite = true;
  if (dtype == ACRE_F32) {
    memcpy(dst, row, (size_t)count * sizeof *row);
    for (int64_t c = 0; c < count; ++c) finite &= isfinite(row[c]) != 0;
    return finite;
  }
  uint16_t *out = dst;
  for (int64_t c = 0; c < count; ++c) {
    out[c] = acre_to_bf16(row[c]);
    finite &= (out[c] & 0x7f80) != 0x7f80;
  }
  return finite;
}
