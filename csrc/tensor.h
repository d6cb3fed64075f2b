/* Reading a caller's array: shape checks, and one row at a time as float32 or as T. */
#ifndef ACRE_TENSOR_H
#define ACRE_TENSOR_H

#include "bf16.h"
#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

float acre_from_f16(uint16_t bits);

/* Refuses unless `array` has exactly this shape; `name` opens the message. */
acre_status acre_array_expect(const acre_array *array, const char *name, int32_t ndim,
                              const int64_t *shape, acre_error *error);

/* out[c] = array[row, c] (a 1-D array is one row), any float dtype and strides. */
void acre_array_row(float *out, const acre_array *array, int64_t row);

/* Converts `count` floats to T at dst; false where a value is not finite in T. */
bool acre_store_row(void *dst, acre_dtype dtype, const float *row, int64_t count);

/* "[3, 64]" into text, for messages. */
void acre_shape_text(char *text, size_t size, int32_t ndim, const int64_t *shape);

#ifdef __cplusplus
}
#endif
#endif
