/* The wrappers of cuda/sm90 as the host emulates them: boxes and products against plain loops,
 * and that each thing a kernel may forget or get wrong about them shows. Then plans, and which
 * chip gets the kernels. */
#include "check.h"
#include "host.h"
#include "sm80/sm80.h"
#include "sm90/attend.h"

#include <math.h>
#include <stdlib.h>

namespace {

using namespace acre::sm90;

constexpr int SUM = 64, COLUMNS = 128; /* of the scores: [64, 64] times [128, 64] turned */
constexpr int THERE = 100;             /* rows of B that exist */

enum fault {
  NONE,
  NO_INIT,
  PARITY,
  FEW_BYTES,
  MANY_BYTES,
  LEFT_COPY,
  NO_FENCE,
  NO_COMMIT,
  NO_WAIT,
  LAYOUT,
  STRIDE,
  STARTS_LATE,
  NO_PROXY_FENCE,
  FAULTS
};

struct call {
  CUtensorMap a, b;
  const bf16 *data; /* of a */
  float *out;       /* [64][128] */
  fault wrong;
};

struct room {
  unsigned char *a, *b;
  uint64_t *full;
};

constexpr int A_BYTES = PRODUCT_ROWS * BOX_ROW_BYTES, B_BYTES = COLUMNS * BOX_ROW_BYTES;
constexpr size_t SHARED = A_BYTES + 2 * B_BYTES + sizeof(uint64_t) + SWIZZLE_BYTES;

room arrange(void) {
  unsigned char *first = acre_shared();
  first += (SWIZZLE_BYTES - shared_address(first) % SWIZZLE_BYTES) % SWIZZLE_BYTES;
  return room{first, first + A_BYTES, (uint64_t *)(first + A_BYTES + 2 * B_BYTES)};
}

void write_out(float *out, const float (&d)[64]) {
  int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  for (int i = 0; i < 64; i++)
    out[(warp * 16 + lane / 4 + fragment_row(i) * 8) * COLUMNS + fragment_column(i, lane)] =
        d[i];
}

void fetch(const call &c, const room &r, int boxes, int bytes) {
  if (threadIdx.x == 0 && c.wrong != NO_INIT) barrier_init(r.full, 1);
  barriers_ready();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (c.wrong == FEW_BYTES) bytes /= 2;
  if (c.wrong == MANY_BYTES) bytes += 16;
  barrier_expect(r.full, bytes);
  for (int i = 0; i < boxes; i++)
    box_copy(r.b + i * B_BYTES, &c.b, i * BOX_COLUMNS, 0, r.full);
  if (c.wrong == LEFT_COPY) box_copy(r.b, &c.b, 0, 0, r.full);
}

/* out = a b^T: a stored by the threads, b by the copy engine. */
__global__ void scores_kernel(call c) {
  room r = arrange();
  fetch(c, r, 1, B_BYTES);
  for (int i = (int)threadIdx.x; i < PRODUCT_ROWS * 8; i += WARPGROUP)
    memcpy(r.a + swizzled(i / 8, i % 8), c.data + i * 8, 16);
  if (c.wrong != NO_PROXY_FENCE) proxy_fence();
  __syncthreads();
  barrier_wait(r.full, c.wrong == PARITY);
  float d[64] = {0.0f};
  uint64_t a = matrix_at(r.a, 0), b = matrix_at(r.b, 0);
  if (c.wrong == LAYOUT) b &= ~((uint64_t)3 << 62);
  if (c.wrong == STRIDE) b ^= (uint64_t)3 << 37; /* 512 and not 1024 bytes */
  if (c.wrong == STARTS_LATE) b = matrix_after(b, 128);
  if (c.wrong != NO_FENCE) products_fence();
  for (int k = 0; k < SUM / PRODUCT_DEPTH; k++)
    product<false>(d, matrix_after(a, 32 * k), matrix_after(b, 32 * k), k > 0);
  if (c.wrong != NO_COMMIT) products_commit();
  if (c.wrong != NO_WAIT) products_wait<0>();
  write_out(c.out, d);
}

/* out = a[:, :16] b[:16, :]: a in registers, b of two boxes, turned. */
__global__ void values_kernel(call c) {
  room r = arrange();
  fetch(c, r, 2, 2 * B_BYTES);
  barrier_wait(r.full, 0);
  int row = (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4;
  int first = (int)threadIdx.x % 4 * 2;
  uint32_t a[4];
  for (int i = 0; i < 4; i++)
    memcpy(&a[i], c.data + (row + i % 2 * 8) * SUM + first + i / 2 * 8, 4);
  float d[64] = {0.0f};
  products_fence();
  product<true>(d, a, matrix_at(r.b, B_BYTES), false);
  products_commit();
  products_wait<0>();
  write_out(c.out, d);
}

/* ------------------------------------------------------------------ against plain loops */

typedef CUresult (*encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                            const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                            const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

CUresult encode(CUtensorMap *map, void *data, cuuint64_t columns, cuuint64_t rows,
                cuuint64_t row_bytes, cuuint32_t box_rows) {
  cuuint64_t sizes[] = {columns, rows};
  cuuint32_t box[] = {BOX_COLUMNS, box_rows}, steps[] = {1, 1};
  return ((encoder)find_tensor_maps())(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, sizes, &row_bytes, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

alignas(128) bf16 left[PRODUCT_ROWS * SUM], right[THERE * COLUMNS];

float number(const bf16 *x, int i) { return __bfloat162float(x[i]); }

/* Whether the kernel ran and gave what a plain loop does: b has THERE rows, then zeros. */
bool runs_right(bool scores, fault wrong) {
  static float out[PRODUCT_ROWS * COLUMNS];
  call c = {};
  c.data = left, c.out = out, c.wrong = wrong;
  memset(out, 0xff, sizeof out);
  CHECK(encode(&c.b, right, COLUMNS, THERE, COLUMNS * sizeof(bf16), COLUMNS) ==
        CUDA_SUCCESS);
  if (acre_host_launch("a test", scores ? scores_kernel : values_kernel, dim3(1),
                       dim3(WARPGROUP), SHARED, c) != cudaSuccess)
    return false;
  for (int i = 0; i < PRODUCT_ROWS; i++) {
    for (int j = 0; j < COLUMNS; j++) {
      double sum = 0.0;
      for (int k = 0; k < (scores ? SUM : PRODUCT_DEPTH); k++) {
        bool there = (scores ? j : k) < THERE;
        int at = scores ? j * COLUMNS + k : k * COLUMNS + j;
        sum += there ? (double)number(left, i * SUM + k) * number(right, at) : 0.0;
      }
      if (!(fabs(out[i * COLUMNS + j] - sum) <= 1e-4)) return false;
    }
  }
  return true;
}

void test_products(uint64_t seed) {
  for (bf16 &x : left) x = __float2bfloat16_rn(random_float(&seed));
  for (bf16 &x : right) x = __float2bfloat16_rn(random_float(&seed));
  for (int i = 0; i < 10; i++) CHECK(runs_right(true, NONE) && runs_right(false, NONE));
}

/* What is wrong shows at the latest in some of a few runs. */
void test_faults(void) {
  fprintf(stderr, "kernels that must fail:\n");
  for (int wrong = NONE + 1; wrong < FAULTS; wrong++) {
    bool caught = false;
    for (int i = 0; i < 12 && !caught; i++) caught = !runs_right(true, (fault)wrong);
    CHECK(caught);
    if (!caught) fprintf(stderr, "  fault %d\n", wrong);
  }
}

/* ------------------------------------------------------------------ names */

/* Two warps in turns of two: each adds to what the other left. */
__global__ void turns_kernel(float *out, bool in_turn) {
  int warp = (int)threadIdx.x / 32;
  if (in_turn && warp == 1) name_arrive(1, 64);
  for (int i = 0; i < 4; i++) {
    if (in_turn) name_sync(1 + warp, 64);
    if (threadIdx.x % 32 == 0) out[0] = out[0] * 2 + (float)warp;
    if (in_turn) name_arrive(2 - warp, 64);
  }
  if (in_turn && warp == 0) name_sync(1, 64);
}

__global__ void crowded_kernel(int threads) {
  if (threadIdx.x < 32)
    name_sync(1, 64);
  else
    name_sync(1, threads);
}

void test_names(void) {
  int wrong[2] = {0, 0};
  for (int in_turn = 0; in_turn < 2; in_turn++) {
    for (int i = 0; i < 20; i++) {
      float out = 0.0f;
      CHECK(acre_host_launch("a test", turns_kernel, dim3(1), dim3(64), 0, &out, in_turn) ==
            cudaSuccess);
      wrong[in_turn] += out != 0x55;
    }
  }
  CHECK(wrong[0] > 5 && wrong[1] == 0);
  const int others[] = {40, 96};
  for (int threads : others)
    CHECK(acre_host_launch("a test", crowded_kernel, dim3(1), dim3(64), 0, threads) ==
          cudaErrorLaunchFailure);
}

/* ------------------------------------------------------------------ plans, choice */

void test_plans(void) {
  CHECK(window_plan<64>::ASKED <= SHARED_MOST && window_plan<128>::ASKED <= SHARED_MOST);
  CHECK(registers_asked() <= 65536 && PRODUCER_REGISTERS % 8 == 0 &&
        CONSUMER_REGISTERS % 8 == 0 && CONSUMER_REGISTERS <= 255);
  CUtensorMap map;
  char *data = (char *)left;
  CHECK(encode(&map, data, 64, 64, 128, 64) == CUDA_SUCCESS);
  CHECK(encode(&map, data + 8, 64, 64, 128, 64) == CUDA_ERROR_INVALID_VALUE);
  CHECK(encode(&map, data, 64, 64, 136, 64) == CUDA_ERROR_INVALID_VALUE);
  CHECK(encode(&map, data, 64, 0, 128, 64) == CUDA_ERROR_INVALID_VALUE);
  CHECK(encode(&map, data, 64, 64, 128, 257) == CUDA_ERROR_INVALID_VALUE);
}

/* Of a chip: its attention, and that the gradient is of matrix units. */
bool chosen(int major, int minor, decltype(acre_backend_ops::attend) attend) {
  acre_host_is.major = major, acre_host_is.minor = minor;
  acre_cuda_options options = {sizeof options, ACRE_TEST_CUDA, 0, 0};
  acre_backend *backend;
  CHECK(acre_cuda_backend_open(&backend, 0, &options, NULL) == ACRE_OK);
  bool is = backend->ops->attend == attend &&
            backend->ops->attend_back == acre_cuda_sm80_attend_back;
  backend->ops->destroy(backend);
  return is;
}

void test_choice(void) {
  CHECK(chosen(8, 0, acre_cuda_sm80_attend) && chosen(8, 9, acre_cuda_sm80_attend));
  CHECK(chosen(9, 0, acre_cuda_sm90_attend));
  CHECK(chosen(10, 0, acre_cuda_sm80_attend) && chosen(12, 0, acre_cuda_sm80_attend));
}

}  // namespace

int main(int argc, char **argv) {
  uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 5;
  printf("seed %llu\n", (unsigned long long)seed);
  acre_host_seed(seed);
  test_choice();
  acre_host_is.major = 9;
  test_products(seed);
  test_faults();
  test_names();
  test_plans();
  return check_report();
}
