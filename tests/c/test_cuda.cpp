/* The CUDA backend's own promises, on the host: what its launches may be, that a failure is
 * kept, told once and stays in its queue, that memory that runs out is refused whole, and which
 * machines are refused. First, that the host finds the faults in kernels that it is there for. */
#include "check.h"
#include "host.h"
#include "internal.h"
#include "sm80/attend.h"
#include "tiles.h"

#include <stdlib.h>
#include <string.h>

namespace {

acre_backend *backend;
acre_queue *queue;
const acre_backend_ops *ops;

/* ------------------------------------------------------------------ the host itself */

__global__ void neighbour_kernel(float *out, bool with_barrier) {
  float *shared = (float *)acre_shared();
  shared[threadIdx.x] = (float)threadIdx.x;
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

/* The second half is overwritten before it was read, unless there is a barrier between. */
__global__ void overtaken_kernel(float *out, bool with_barrier) {
  float *shared = (float *)acre_shared();
  for (int round = 0; round < 2; round++) {
    shared[threadIdx.x] = (float)round;
    __syncthreads();
    out[round * (int)blockDim.x + (int)threadIdx.x] =
        shared[(threadIdx.x + 1) % blockDim.x];
    if (with_barrier) __syncthreads();
  }
}

__global__ void diverged_kernel(int mode) {
  if (mode == 0 && threadIdx.x < 5) __syncthreads();
  if (mode == 1 && threadIdx.x % 32 < 16) __shfl_xor_sync(acre::ALL_LANES, 1.0f, 1);
  if (mode == 2) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncwarp();
  }
  if (mode == 3 && threadIdx.x != 7) __syncthreads();
  if (mode == 5 && threadIdx.x % 32 != 9) {
    float c[4] = {0.0f};
    const uint32_t a[4] = {0};
    acre::multiply(c, a, 0, 0);
  }
}

/* Two groups of a piece for each thread, the latter of which is zeros; what the neighbour sees
 * of either once all but the latest `left` have arrived, with a barrier behind. */
template <int LEFT>
__global__ void copy_kernel(const bf16 *from, bf16 *out) {
  bf16 *shared = (bf16 *)acre_shared();
  int own = (int)threadIdx.x * 8, next = (int)((threadIdx.x + 1) % blockDim.x) * 8;
  int second = (int)blockDim.x * 8;
  acre::copy_async(shared + own, from + own, true);
  acre::copies_commit();
  acre::copy_async(shared + second + own, NULL, false);
  acre::copies_commit();
  acre::copies_wait<LEFT>();
  __syncthreads();
  for (int j = 0; j < 8; j++) {
    out[own + j] = shared[next + j];
    out[second + own + j] = shared[second + next + j];
  }
  __syncthreads();
}

/* c [16, 16] = a [16, D] . b [16, D]^T and then that, rounded, times b. */
template <int D>
__global__ void product_kernel(const bf16 *a, const bf16 *b, float *c, float *then) {
  bf16 *tile = (bf16 *)acre_shared();
  int lane = acre::lane_anew();
  acre::load_tile<D, 16, 32>(tile, a, D, 16, lane, true);
  acre::load_tile<D, 16, 32>(tile + 16 * D, b, D, 16, lane, false);
  acre::copies_commit();
  acre::copies_wait<0>();
  __syncthreads();
  acre::product<1, 16> s = {};
  acre::product<1, D> o = {};
  acre::packed<1, 16> w;
  acre::add_dots<D, 1, 16>(s, tile, 0, tile + 16 * D, lane);
  for (int n = 0; n < 2; n++)
    for (int i = 0; i < 4; i++)
      c[acre::row_of(0, i) * 16 + acre::column_of(n, i)] = s[0][n][i];
  for (int n = 0; n < 2; n++)
    for (int r = 0; r < 2; r++)
      w[0][n][r] = acre::pair_of(s[0][n][2 * r], s[0][n][2 * r + 1]);
  acre::add_weighted<D, 1, 16, D>(o, w, tile + 16 * D, 0, lane);
  for (int n = 0; n < D / 8; n++)
    for (int i = 0; i < 4; i++)
      then[acre::row_of(0, i) * D + acre::column_of(n, i)] = o[0][n][i];
}

__global__ void sum_kernel(float *out) {
  float *shared = (float *)acre_shared();
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      acre::block_reduce((float)threadIdx.x, shared, acre::add());
}

cudaError_t run(void (*kernel)(float *, bool), float *out, bool with_barrier) {
  return acre_host_launch("a test", kernel, dim3(1), dim3(64), 64 * sizeof(float), out,
                          with_barrier);
}

void test_missing_barriers(void) {
  float out[128];
  int wrong[2] = {0, 0};
  for (int barrier = 0; barrier < 2; barrier++) {
    for (int i = 0; i < 20; i++) {
      CHECK(run(neighbour_kernel, out, barrier) == cudaSuccess);
      for (int t = 0; t < 64; t++) wrong[barrier] += !(out[t] == (float)((t + 1) % 64));
      CHECK(run(overtaken_kernel, out, barrier) == cudaSuccess);
      for (int t = 0; t < 128; t++) wrong[barrier] += !(out[t] == (float)(t / 64));
    }
  }
  CHECK(wrong[0] > 100 && wrong[1] == 0);
}

void test_divergence(void) {
  fprintf(stderr, "five kernels that must fail:\n");
  for (int mode = 0; mode < 6; mode += mode == 3 ? 2 : 1)
    CHECK(acre_host_launch("diverged_kernel", diverged_kernel, dim3(2), dim3(64), 0,
                           mode) == cudaErrorLaunchFailure);
  float out[3 * 96];
  CHECK(acre_host_launch("sum_kernel", sum_kernel, dim3(3), dim3(96), 3 * sizeof(float),
                         out) == cudaSuccess);
  for (float sum : out) CHECK(sum == 95 * 96 / 2);
}

/* A copy is seen once its group was waited for, and no sooner. */
void test_copies(void) {
  alignas(16) bf16 from[64 * 8], out[2 * 64 * 8];
  for (int i = 0; i < 64 * 8; i++) from[i].bits = (uint16_t)i;
  size_t bytes = sizeof out;
  for (int left = 0; left < 3; left++) {
    auto kernel = left == 0 ? copy_kernel<0> : left == 1 ? copy_kernel<1> : copy_kernel<2>;
    CHECK(acre_host_launch("copy_kernel", kernel, dim3(1), dim3(64), bytes, from, out) ==
          cudaSuccess);
    bool right = true;
    for (int i = 0; i < 64 * 8; i++) {
      right &= out[i].bits == (left < 2 ? (i + 8) % (64 * 8) : 0xffff);
      right &= out[64 * 8 + i].bits == (left < 1 ? 0 : 0xffff);
    }
    CHECK(right);
  }
}

/* Small whole numbers: products are exact. */
template <int D>
void test_products(void) {
  alignas(16) bf16 a[16 * D], b[16 * D];
  static float c[16 * 16], then[16 * D];
  uint64_t random = D;
  for (int i = 0; i < 16 * D; i++) {
    a[i] = __float2bfloat16_rn((float)(int)(random_bits(&random) % 3) - 1.0f);
    b[i] = __float2bfloat16_rn((float)(int)(random_bits(&random) % 3) - 1.0f);
  }
  int64_t before = acre_host_conflicts();
  CHECK(acre_host_launch("product_kernel", product_kernel<D>, dim3(1), dim3(32),
                         sizeof a + sizeof b, a, b, c, then) == cudaSuccess);
  bool right = true;
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 16; j++) {
      float sum = 0.0f;
      for (int x = 0; x < D; x++)
        sum += __bfloat162float(a[i * D + x]) * __bfloat162float(b[j * D + x]);
      right &= c[i * 16 + j] == sum;
    }
    for (int x = 0; x < D; x++) {
      float sum = 0.0f;
      for (int j = 0; j < 16; j++) sum += c[i * 16 + j] * __bfloat162float(b[j * D + x]);
      right &= then[i * D + x] == sum;
    }
  }
  CHECK(right && acre_host_conflicts() == before);
}

void test_launch_limits(void) {
  const struct {
    dim3 grid, block;
    size_t shared;
  } wrong[] = {{dim3(0), dim3(32), 0},
               {dim3(1), dim3(1025), 0},
               {dim3(1, 1 << 16), dim3(32), 0},
               {dim3(1u << 31), dim3(32), 0},
               {dim3(1), dim3(32), acre::SHARED_MOST + 1}};
  fprintf(stderr, "five launches that must fail:\n");
  for (const auto &w : wrong)
    CHECK(acre_host_launch("diverged_kernel", diverged_kernel, w.grid, w.block, w.shared,
                           4) == cudaErrorInvalidValue);
}

/* ------------------------------------------------------------------ launches and plans */

void test_plans(void) {
  CHECK(acre::blocks_for(0, 256) == 0 && acre::blocks_for(1, 256) == 1 &&
        acre::blocks_for(257, 256) == 2 && acre::blocks_for(INT64_MAX / 2, 1) == INT32_MAX);
  CHECK(acre::threads_for(0) == 32 && acre::threads_for(1) == 32 &&
        acre::threads_for(576) == 96 && acre::threads_for(1 << 20) == 256);
  for (int d = 2; d <= acre::HEAD_DIM_MOST; d += 2)
    CHECK(acre::attend_shared_bytes(d) <= acre::SHARED_MOST);
}

/* No rows: nothing is launched, and no pointer is looked at. */
void test_no_rows(void) {
  int64_t before = acre_host_launches();
  acre_heads heads = {2, 1, 16, ACRE_BF16};
  acre_keys none = {NULL, NULL, NULL, 0};
  ops->embed(queue, NULL, NULL, NULL, NULL, 0, 8, 8, ACRE_F32);
  ops->rmsnorm(queue, NULL, NULL, NULL, 1e-5, 0, 8, ACRE_F32);
  ops->gather_rows(queue, NULL, NULL, NULL, 0, 16);
  ops->scatter_rows(queue, NULL, NULL, NULL, 0, 16);
  ops->rope(queue, NULL, 0, NULL, NULL, 0, 0, 2, 16);
  ops->store_kv(queue, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL, 0, 0, &heads);
  ops->rotate(queue, NULL, NULL, NULL, NULL, 0, 0, &heads);
  ops->copy_rows(queue, NULL, NULL, 0, 16);
  ops->pool(queue, NULL, NULL, 0, 4, 16, ACRE_F32);
  ops->attend(queue, NULL, 32, NULL, NULL, 32, NULL, &none, 0, 0, false, &heads);
  ops->attend_back(queue, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, &none, 0,
                   &heads);
  ops->round(queue, NULL, 8, NULL, 8, 0, 8, ACRE_BF16);
  ops->upload(queue, NULL, NULL, 0);
  ops->download(queue, NULL, NULL, 0);
  CHECK(acre_host_launches() == before && ops->sync(queue, NULL) == ACRE_OK);
}

/* Rows whose sizes allow wide units, from places that do not. */
void test_odd_places(void) {
  alignas(16) unsigned char from[20 * 16], to[8 * 16];
  for (int i = 0; i < 20 * 16; i++) from[i] = (unsigned char)i;
  for (int offset = 0; offset < 16; offset++) {
    acre_span spans[] = {{from, 0, 2}, {from + 64 + offset, 2, 3}, {from + offset, 5, 3}};
    for (int again = 0; again < 8; again++) { /* by kernels or through the host */
      memset(to, 0, sizeof to);
      ops->copy_rows(queue, to, spans, 3, 16);
      for (const acre_span &span : spans)
        CHECK(memcmp(to + span.dst_row * 16, span.source, (size_t)span.rows * 16) == 0);
    }
  }
}

/* ------------------------------------------------------------------ failures */

acre_status open_backend(acre_backend **out, const char *libraries, acre_error *error) {
  acre_cuda_options options = {sizeof options, libraries, 0, 0};
  return acre_cuda_backend_open(out, 0, &options, error);
}

/* A failure of the given call of an upload or a launch. */
void test_failure(int64_t call, const char *words) {
  acre_queue *other, *bad;
  acre_error error = {};
  float host[4] = {1, 2, 3, 4}, x[4] = {0}, y[4];
  CHECK(ops->queue_open(backend, &other, NULL) == ACRE_OK);
  CHECK(ops->queue_open(backend, &bad, NULL) == ACRE_OK);
  acre_host_fail(cudaErrorIllegalAddress, call);
  ops->upload(bad, x, host, sizeof host);
  ops->round(bad, y, 4, x, 4, 1, 4, ACRE_F32);
  acre_host_fail(0, 0);
  int64_t before = acre_host_launches();
  ops->round(bad, y, 4, x, 4, 1, 4, ACRE_F32);
  CHECK(acre_host_launches() == before);
  CHECK(ops->sync(bad, &error) == ACRE_DEVICE);
  CHECK(strstr(error.message, words) && strstr(error.message, "cuda/") &&
        strstr(error.message, "cudaErrorIllegalAddress"));
  if (!strstr(error.message, words)) fprintf(stderr, "  %s\n", error.message);
  CHECK(ops->sync(bad, &error) == ACRE_DEVICE && strstr(error.message, "before"));
  ops->download(bad, y, x, sizeof y);
  CHECK(y[0] == 0.0f);
  ops->upload(other, x, host, sizeof host);
  ops->download(other, y, x, sizeof y);
  CHECK(ops->sync(other, &error) == ACRE_OK && memcmp(y, host, sizeof y) == 0);
  ops->queue_close(other), ops->queue_close(bad);
}

/* Every allocation, of the host and of the device, fails once. */
void test_memory(void) {
  int64_t live = acre_alloc_live();
  acre_backend *b;
  acre_error error;
  int64_t n = 1;
  for (bool done = false; !done && n < 100; n++) {
    acre_queue *q = NULL;
    acre_buffer *buffer = NULL;
    acre_matrix *W = NULL, *turned = NULL;
    acre_alloc_fail_at(n);
    acre_status status = open_backend(&b, ACRE_TEST_CUDA, &error);
    if (status == ACRE_OK) status = b->ops->queue_open(b, &q, &error);
    if (status == ACRE_OK) status = b->ops->alloc(b, &buffer, 1000, &error);
    if (status == ACRE_OK)
      status = b->ops->matrix_create(b, &W, 3, 5, ACRE_F32, ACRE_WEIGHTS_SAME, &error);
    if (status == ACRE_OK) status = b->ops->matrix_transpose(q, &turned, W, &error);
    acre_alloc_fail_at(0);
    done = status == ACRE_OK;
    CHECK(done || error.status == ACRE_NO_MEMORY);
    if (turned) b->ops->matrix_release(turned);
    if (W) b->ops->matrix_release(W);
    if (q) b->ops->queue_close(q);
    if (b) b->ops->destroy(b);
    acre_buffer_release(buffer); /* outlives the backend */
    CHECK(acre_alloc_live() == live);
  }
  CHECK(n > 20 && n < 100);
  size_t held = backend->account.held;
  acre_buffer *none;
  CHECK(ops->alloc(backend, &none, SIZE_MAX / 2 + 1, &error) == ACRE_NO_MEMORY && !none);
  CHECK(strstr(error.message, "9223372036854775808 bytes") &&
        backend->account.held == held);
}

/* What the device has left, not what the host has; nothing is known where the call fails, and
 * that is no failure of what comes next. */
void test_available(void) {
  acre_error error = {};
  acre_host_is.available = 12345;
  CHECK(ops->available(backend) == 12345);
  acre_host_fail(cudaErrorInvalidValue, 1);
  CHECK(ops->available(backend) == 0);
  acre_host_fail(0, 0);
  acre_host_is.available = 0;
  CHECK(cudaGetLastError() == cudaSuccess && ops->sync(queue, &error) == ACRE_OK);
}

/* Of calls that fail for other reasons the first is told, and nothing is kept. */
void test_failing_open(void) {
  int64_t live = acre_alloc_live();
  bool done = false;
  for (int64_t call = 1; !done && call < 100; call++) {
    acre_backend *b;
    acre_error error = {};
    acre_host_fail(cudaErrorInvalidValue, call);
    done = open_backend(&b, ACRE_TEST_CUDA, &error) == ACRE_OK;
    acre_host_fail(0, 0);
    CHECK(done || (error.status == ACRE_DEVICE && !b && strstr(error.message, "cuda/")));
    if (b) b->ops->destroy(b);
    CHECK(acre_alloc_live() == live);
  }
  CHECK(done);
}

/* ------------------------------------------------------------------ queues that follow */

/* Three times numbers are made at `from` on one queue, and copied away from there by another,
 * which follows it (`behind`) or does not; and what is made next follows the copy (`before`) or
 * does not. How many copies are not of what they should be of. */
int wrong_copies(acre_queue *maker, acre_queue *mover, float *from, float *to, bool behind,
                 bool before) {
  constexpr int N = 16, TIMES = 3;
  int wrong = 0;
  float made[TIMES][N], got[TIMES][N];
  for (int round = 0; round < 60; round++) {
    for (int i = 0; i < TIMES; i++) {
      for (float &x : made[i]) x = (float)(round * TIMES + i);
      if (before) ops->follow(maker, mover);
      ops->upload(maker, from, made[i], sizeof made[i]);
      if (behind) ops->follow(mover, maker);
      acre_span all = {from, 0, 1};
      ops->copy_rows(mover, to + i * N, &all, 1, sizeof made[i]);
    }
    ops->download(mover, got, to, sizeof got);
    for (int i = 0; i < TIMES; i++) wrong += memcmp(got[i], made[i], sizeof made[i]) != 0;
    CHECK(ops->sync(maker, NULL) == ACRE_OK);
  }
  return wrong;
}

/* The host finds an order that is missing, in either direction; with both none is. Into pinned
 * memory, of which the device reads as of its own. */
void test_follow(void) {
  acre_queue *mover;
  acre_buffer *from, *pinned;
  int without[2] = {0, 0}, with = 0;
  CHECK(ops->alloc(backend, &from, 64 * sizeof(float), NULL) == ACRE_OK);
  CHECK(ops->alloc_host(backend, &pinned, 48 * sizeof(float), NULL) == ACRE_OK);
  CHECK(acre::device_reads(acre_buffer_data(pinned)));
  CHECK(backend->host.held == 48 * sizeof(float));
  float *x = (float *)acre_buffer_data(from), *y = (float *)acre_buffer_data(pinned);
  for (uint64_t seed = 1; seed < 9; seed++) {
    acre_host_disorder(seed);
    CHECK(ops->mover_open(backend, &mover, NULL) == ACRE_OK);
    without[0] += wrong_copies(queue, mover, x, y, false, true);
    without[1] += wrong_copies(queue, mover, x, y, true, false);
    with += wrong_copies(queue, mover, x, y, true, true);
    ops->queue_close(mover);
  }
  acre_host_disorder(0);
  CHECK(without[0] > 20 && without[1] > 20 && with == 0);
  acre_buffer_release(from), acre_buffer_release(pinned);
  CHECK(backend->host.held == 0);
}

/* A failure goes with those who follow, and no further. */
void test_failure_follows(void) {
  acre_queue *first, *later, *other;
  acre_error error = {};
  float host[4] = {1, 2, 3, 4}, x[4];
  CHECK(ops->queue_open(backend, &first, NULL) == ACRE_OK);
  CHECK(ops->mover_open(backend, &later, NULL) == ACRE_OK);
  CHECK(ops->mover_open(backend, &other, NULL) == ACRE_OK);
  acre_host_fail(cudaErrorIllegalAddress, 1);
  ops->upload(first, x, host, sizeof host);
  acre_host_fail(0, 0);
  ops->follow(later, first);
  ops->follow(other, queue);
  CHECK(ops->sync(later, &error) == ACRE_DEVICE &&
        strstr(error.message, "cudaMemcpyAsync"));
  CHECK(ops->sync(first, &error) == ACRE_DEVICE);
  CHECK(ops->sync(other, &error) == ACRE_OK);
  acre_host_fail(cudaErrorInvalidValue, 2); /* recorded, and not waited for */
  ops->follow(other, queue);
  acre_host_fail(0, 0);
  CHECK(ops->sync(other, &error) == ACRE_DEVICE &&
        strstr(error.message, "cudaStreamWaitEvent"));
  CHECK(ops->sync(queue, &error) == ACRE_OK);
  ops->queue_close(first), ops->queue_close(later), ops->queue_close(other);
}

/* ------------------------------------------------------------------ refusals */

void refused(acre_host_machine machine, acre_status status, const char *words) {
  acre_host_machine before = acre_host_is;
  acre_backend *none;
  acre_error error = {};
  acre_host_is = machine;
  CHECK(open_backend(&none, ACRE_TEST_CUDA, &error) == status && !none);
  CHECK(strstr(error.message, words) != NULL);
  if (!strstr(error.message, words)) fprintf(stderr, "  %s\n", error.message);
  acre_host_is = before;
}

void test_refusals(void) {
  refused({0, 0, 0, 0, 0}, ACRE_UNSUPPORTED, "no NVIDIA driver");
  refused({12080, 1, 9, 0, 0}, ACRE_UNSUPPORTED,
          "supports CUDA 12.8, this build of acre needs 13.0");
  refused({13000, 0, 9, 0, 0}, ACRE_UNSUPPORTED, "no GPU");
  refused({13000, 1, 7, 5, 0}, ACRE_UNSUPPORTED, "compute capability 7.5, expected 8.0");
  acre_backend *none;
  acre_error error;
  CHECK(acre_cuda_backend_open(&none, 1, NULL, &error) == ACRE_BAD_VALUE && !none);
  CHECK(acre_cuda_backend_open(&none, -1, NULL, &error) == ACRE_BAD_VALUE && !none);
  CHECK(open_backend(&none, "no/such/place", &error) == ACRE_UNSUPPORTED && !none);
  CHECK(strstr(error.message, "cuBLASLt"));
}

}  // namespace

int main(int argc, char **argv) {
  uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 3;
  printf("seed %llu\n", (unsigned long long)seed);
  acre_host_seed(seed);
  test_missing_barriers();
  test_divergence();
  test_copies();
  test_products<64>(), test_products<80>(), test_products<96>();
  test_products<128>(), test_products<256>();
  test_launch_limits();
  test_plans();
  test_refusals();
  acre_error error = {};
  CHECK(open_backend(&backend, ACRE_TEST_CUDA, &error) == ACRE_OK);
  if (!backend) return check_report();
  ops = backend->ops;
  CHECK(ops->queue_open(backend, &queue, NULL) == ACRE_OK);
  test_no_rows();
  test_odd_places();
  test_failure(1, "cudaMemcpyAsync");
  test_failure(2, "round_kernel");
  test_follow();
  test_failure_follows();
  test_memory();
  test_available();
  test_failing_open();
  ops->queue_close(queue);
  ops->destroy(backend);
  CHECK(acre_alloc_live() == 0);
  return check_report();
}
