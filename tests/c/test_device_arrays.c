/* Arrays that lie on the device: taken as the same array of the host is, to the bit, whatever
 * its dtype and strides, with what is not finite found; views and copies of a cache there. On
 * the CPU's table and on the CUDA table as the host runs it. */
#include "backend.h"
#include "bf16.h"
#include "check.h"
#include "platform.h"
#include "plugin.h"
#include "tensor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 5, COLUMNS = 70, ROW_STEP = 150, COLUMN_STEP = 2, ROOM = ROWS * ROW_STEP };

static uint64_t seed = 11;

/* Of all kinds that a dtype has but NaN and infinity: normal, tiny, zeros of both signs. */
static uint64_t random_number(acre_dtype dtype) {
  float x = random_float(&seed) * (random_bits(&seed) % 3 ? 1.0f : 1e-6f);
  if (random_bits(&seed) % 9 == 0) x = random_bits(&seed) % 2 ? 0.0f : -0.0f;
  double wide = (double)x * (1 + 0x1p-40);
  uint64_t bits = 0;
  uint32_t half;
  switch (dtype) {
    case ACRE_F32: memcpy(&bits, &x, 4); break;
    case ACRE_BF16: bits = acre_to_bf16(x); break;
    case ACRE_F64: memcpy(&bits, &wide, 8); break;
    case ACRE_F16: /* any but those of the highest exponent */
      do half = (uint32_t)(random_bits(&seed) & 0xffff);
      while ((half & 0x7c00) == 0x7c00);
      bits = half;
  }
  return bits;
}

static uint64_t infinity_of(acre_dtype dtype) {
  static const uint64_t bits[] = {0x7f800000, 0x7f80, 0x7c00, 0x7ff0000000000000};
  return bits[dtype];
}

/* The array of the host on the device. */
static acre_array carried(acre_backend *backend, acre_queue *queue, const acre_array *host,
                          acre_buffer **buffer) {
  acre_array there = *host;
  size_t bytes = ROOM * acre_dtype_size(host->dtype);
  CHECK(backend->ops->alloc(backend, buffer, bytes, NULL) == ACRE_OK);
  there.data = acre_buffer_data(*buffer), there.on_device = true;
  backend->ops->upload(queue, acre_buffer_data(*buffer), host->data, bytes);
  CHECK(backend->ops->sync(queue, NULL) == ACRE_OK);
  return there;
}

/* A matrix of both, and what is read back of them. */
static void test_fill(acre_backend *backend, acre_queue *queue, const acre_array *host,
                      const acre_array *there, acre_dtype dtype, acre_weights weights,
                      bool finite) {
  const acre_backend_ops *ops = backend->ops;
  size_t bytes = (ROWS + 1) * COLUMNS * sizeof(float);
  float got[2][(ROWS + 1) * COLUMNS];
  acre_buffer *x;
  CHECK(ops->alloc(backend, &x, bytes, NULL) == ACRE_OK);
  for (int i = 0; i < 2; i++) {
    acre_matrix *W;
    bool sound = true;
    CHECK(ops->matrix_create(backend, &W, ROWS + 1, COLUMNS, dtype, weights, NULL) ==
          ACRE_OK);
    ops->matrix_fill(W, 1, i ? there : host, &sound);
    CHECK(sound == finite);
    ops->matrix_get(queue, acre_buffer_data(x), W, 0, ROWS + 1);
    ops->download(queue, got[i], acre_buffer_data(x), bytes);
    ops->matrix_release(W);
  }
  if (finite) CHECK(memcmp(got[0], got[1], bytes) == 0);
  acre_buffer_release(x);
}

/* Dense rows of it, beside what the host makes. */
static void test_store(acre_backend *backend, const acre_array *host,
                       const acre_array *there, acre_dtype dtype, bool finite) {
  size_t unit = acre_dtype_size(dtype), bytes = ROWS * COLUMNS * unit;
  char wanted[ROWS * COLUMNS * 4], got[ROWS * COLUMNS * 4];
  float row[COLUMNS];
  bool sound = true;
  acre_buffer *out;
  acre_error error;
  CHECK(backend->ops->alloc(backend, &out, bytes, NULL) == ACRE_OK);
  for (int i = 0; i < ROWS; i++) {
    acre_array_row(row, host, i);
    acre_store_row(wanted + (size_t)i * COLUMNS * unit, dtype, row, COLUMNS);
  }
  backend->ops->store_array(backend, acre_buffer_data(out), dtype, there, &sound);
  CHECK(sound == finite);
  CHECK(backend->ops->fetch(backend, got, acre_buffer_data(out), bytes, &error) == ACRE_OK);
  if (finite) CHECK(memcmp(got, wanted, bytes) == 0);
  acre_array flat = *there; /* its first row alone */
  flat.ndim = 1, flat.shape[0] = COLUMNS, flat.strides[0] = there->strides[1];
  memset(got, 1, sizeof got), sound = true;
  backend->ops->store_array(backend, acre_buffer_data(out), dtype, &flat, &sound);
  CHECK(backend->ops->fetch(backend, got, acre_buffer_data(out), bytes, &error) == ACRE_OK);
  if (finite) CHECK(sound && memcmp(got, wanted, bytes) == 0);
  acre_buffer_release(out);
}

static void test_dtype(acre_backend *backend, acre_queue *queue, acre_dtype source) {
  size_t unit = acre_dtype_size(source);
  char data[ROOM * 8];
  for (int strided = 0; strided < 2; strided++) {
    for (int finite = 0; finite < 2; finite++) {
      acre_array host = {
          .data = data, .dtype = source, .ndim = 2, .shape = {ROWS, COLUMNS}};
      host.strides[0] = strided ? ROW_STEP : COLUMNS;
      host.strides[1] = strided ? COLUMN_STEP : 1;
      for (int i = 0; i < ROOM; i++) {
        uint64_t bits = random_number(source);
        memcpy(data + (size_t)i * unit, &bits, unit);
      }
      uint64_t odd = infinity_of(source);
      int64_t at = 3 * host.strides[0] + 41 * host.strides[1];
      if (!finite) memcpy(data + (size_t)at * unit, &odd, unit);
      acre_buffer *buffer;
      acre_array there = carried(backend, queue, &host, &buffer);
      for (int dtype = ACRE_F32; dtype <= ACRE_BF16; dtype++) {
        test_fill(backend, queue, &host, &there, (acre_dtype)dtype, ACRE_WEIGHTS_SAME,
                  finite);
        test_store(backend, &host, &there, (acre_dtype)dtype, finite);
      }
      test_fill(backend, queue, &host, &there, ACRE_BF16, ACRE_WEIGHTS_Q8, finite);
      acre_buffer_release(buffer);
    }
  }
}

static void test_backend(acre_backend *backend) {
  acre_queue *queue;
  CHECK(backend->ops->queue_open(backend, &queue, NULL) == ACRE_OK);
  for (int dtype = ACRE_F32; dtype <= ACRE_F64; dtype++)
    test_dtype(backend, queue, (acre_dtype)dtype);
  CHECK((backend->ops->stream(backend) != NULL) == backend->apart);
  backend->ops->queue_close(queue);
  backend->ops->destroy(backend);
}

int main(void) {
  acre_backend *cpu, *cuda;
  acre_error error;
  acre_cuda_options options = {sizeof options, ACRE_TEST_CUDA, 0, 1024};
#ifndef __SANITIZE_ADDRESS__ /* which sees more of memory that it gave itself */
  setenv("ACRE_HOST_APART", "1", 1);
#endif
  CHECK(acre_cpu_backend_open(&cpu, 1, NULL, &error) == ACRE_OK);
  CHECK(acre_cuda_backend_open(&cuda, 0, &options, &error) == ACRE_OK);
  test_backend(cpu);
  test_backend(cuda);
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
