/* Hopper's own instructions on the host (hopper.h). */
#include "hopper.h"

#include "bf16.h"

#include <stdlib.h>

namespace {

enum { LANES = 32, WARPS = 32, NAMES = 16, COPIES = 64, PRODUCTS = 64, CHAINS = 4 };
enum { ROWS = 16, DEPTH = 16, COLUMNS = 128, BOX_ROW = 128 };

/* ------------------------------------------------------------------ what is under way */

/* A tensor map, as the host keeps it in one. */
struct box_map {
  const char *data;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
  uint64_t magic;
};
const uint64_t BOX_MAGIC = 0x626f78206d617021u;

struct copy {
  box_map map;
  unsigned char *to;
  uint64_t *barrier;
  int x, y;
};

/* One warp's part of a product: 16 rows. */
struct product {
  const uint32_t *a[LANES]; /* registers, NULL: a_matrix */
  uint64_t a_matrix, b;
  int chain, group, warp;
  bool turned, add;
};

/* Accumulators that products are adding to; the warp's registers hold NaN meanwhile. */
struct chain {
  float *d[LANES];
  int columns, products;
  float c[ROWS][COLUMNS];
};

struct warp_products {
  product waiting[PRODUCTS];
  chain chains[CHAINS];
  int count, computed, group;
  bool fenced;
};

struct name {
  int arrived, threads;
  uint32_t generation;
};

struct state {
  unsigned char *shared, *view; /* view: what the asynchronous proxy reads */
  size_t bytes, room;
  bool used;
  bool early;       /* of this block: whether products are computed at once or at last */
  uint64_t copying; /* of this block: one turn in so many moves a copy; 0: none must */
  copy copies[COPIES];
  int copy_count;
  warp_products warps[WARPS];
  name names[NAMES];
};

thread_local state here;

/* The asynchronous view begins as NaN, as shared memory does. */
void use(void) {
  if (here.used) return;
  if (here.room < here.bytes) {
    free(here.view);
    here.view = (unsigned char *)malloc(here.bytes);
    here.room = here.bytes;
  }
  memset(here.view, 0xff, here.bytes);
  here.used = true;
}

/* Addresses in shared memory keep the low bits that swizzling looks at. */
uintptr_t shared_origin(void) { return (uintptr_t)here.shared & ~(uintptr_t)1023; }

/* Where an address lies from the start of shared memory on, or 0 after a complaint. */
size_t place(uint64_t address, size_t bytes) {
  uint64_t skipped = (uintptr_t)here.shared - shared_origin();
  if (address >= skipped && address - skipped + bytes <= here.bytes)
    return (size_t)(address - skipped);
  acre_host_fault("an operand or a box lies outside of shared memory");
  return 0;
}

uint64_t swizzle(uint64_t address) { return address ^ (address >> 7 & 7) << 4; }

/* ------------------------------------------------------------------ barriers */

/* In its eight bytes, as on the device: nothing else knows of it. */
struct mbarrier {
  uint64_t expected : 12, pending : 12, bytes : 32, phase : 1, magic : 7;
};
const uint64_t MAGIC = 0x2a;
const uint32_t NO_BYTES = 1u << 31; /* bytes may come before they are expected */

mbarrier read_barrier(const void *at) {
  mbarrier b;
  memcpy(&b, at, sizeof b);
  if (b.magic != MAGIC) acre_host_fault("an mbarrier that nobody initialised");
  return b;
}

void write_barrier(void *at, mbarrier b) {
  if (b.pending == 0 && b.bytes == NO_BYTES) b.phase ^= 1, b.pending = b.expected;
  memcpy(at, &b, sizeof b);
}

void arrive(uint64_t *at, int bytes) {
  mbarrier b = read_barrier(at);
  if (b.pending == 0) acre_host_fault("more arrivals than an mbarrier's phase has");
  b.pending--, b.bytes += (uint32_t)bytes;
  write_barrier(at, b);
}

bool phase_over(const void *at, uint32_t parity) {
  return read_barrier(at).phase != (parity & 1);
}

bool generation_over(const void *at, uint32_t generation) {
  return ((const name *)at)->generation != generation;
}

name *come_to(int id, int threads) {
  name *n = &here.names[id];
  if (id < 1 || id >= NAMES || threads % LANES)
    acre_host_fault("a named barrier of another number or of parts of warps");
  if (n->arrived && n->threads != threads)
    acre_host_fault("a named barrier for different numbers of threads");
  n->threads = threads;
  if (++n->arrived == threads) n->arrived = 0, n->generation++;
  return n;
}

/* ------------------------------------------------------------------ the copy engine */

void perform(const copy &c) {
  uint64_t to = (uintptr_t)c.to - shared_origin();
  for (uint32_t row = 0; row < c.map.box_rows; row++) {
    int64_t y = (int64_t)c.y + row;
    for (uint32_t column = 0; column < c.map.box_columns; column++) {
      int64_t x = (int64_t)c.x + column;
      uint16_t number = 0; /* beyond the edges */
      if (x >= 0 && y >= 0 && (uint64_t)x < c.map.columns && (uint64_t)y < c.map.rows)
        memcpy(&number, c.map.data + (uint64_t)y * c.map.row_bytes + (uint64_t)x * 2, 2);
      size_t at = place(swizzle(to + row * BOX_ROW + column * 2), 2);
      memcpy(here.shared + at, &number, 2);
      memcpy(here.view + at, &number, 2);
    }
  }
  mbarrier b = read_barrier(c.barrier);
  b.bytes -= c.map.box_rows * c.map.box_columns * 2;
  write_barrier(c.barrier, b);
}

/* ------------------------------------------------------------------ products */

float number_at(uint64_t address) {
  uint16_t bits;
  memcpy(&bits, here.view + place(swizzle(address), 2), 2);
  return acre_from_bf16(bits);
}

/* A descriptor's parts, in bytes. */
struct operand {
  uint64_t start, leading, stride;
  explicit operand(uint64_t m)
      : start((m & 0x3fff) << 4),
        leading((m >> 16 & 0x3fff) << 4),
        stride((m >> 32 & 0x3fff) << 4) {
    if (m >> 62 != 1 || (m >> 49 & 7))
      acre_host_fault("a matrix descriptor of a layout other than 128-byte swizzled");
  }
  float k_major(int row, int k) const {
    return number_at(start + (uint64_t)(row / 8) * stride + (uint64_t)(row % 8) * BOX_ROW +
                     (uint64_t)k * 2);
  }
  float turned(int n, int k) const {
    return number_at(start + (uint64_t)(n / 64) * leading + (uint64_t)(n % 64) * 2 +
                     (uint64_t)(k / 8) * stride + (uint64_t)(k % 8) * BOX_ROW);
  }
};

void read_a(float (&a)[ROWS][DEPTH], const product &p) {
  if (!p.a[0]) {
    operand from(p.a_matrix);
    for (int r = 0; r < ROWS; r++)
      for (int k = 0; k < DEPTH; k++) a[r][k] = from.k_major(p.warp % 4 * ROWS + r, k);
    return;
  }
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++)
        a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + half] =
            acre_from_bf16((uint16_t)(p.a[lane][i] >> 16 * half));
}

void compute(warp_products *w, const product &p) {
  static thread_local float a[ROWS][DEPTH], b[DEPTH][COLUMNS];
  chain *c = &w->chains[p.chain];
  operand from(p.b);
  read_a(a, p);
  for (int k = 0; k < DEPTH; k++)
    for (int n = 0; n < c->columns; n++)
      b[k][n] = p.turned ? from.turned(n, k) : from.k_major(n, k);
  for (int r = 0; r < ROWS; r++) {
    float *sum = c->c[r];
    for (int n = 0; !p.add && n < c->columns; n++) sum[n] = 0.0f;
    for (int k = 0; k < DEPTH; k++)
      for (int n = 0; n < c->columns; n++) sum[n] += a[r][k] * b[k][n];
  }
}

/* Between the warp's registers and a chain; NaN stays in the registers of what is read. */
void exchange(chain *c, bool to_registers) {
  for (int lane = 0; lane < LANES; lane++) {
    for (int i = 0; i < c->columns / 2; i++) {
      float *x = &c->c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      if (to_registers) {
        c->d[lane][i] = *x;
      } else {
        *x = c->d[lane][i];
        memset(&c->d[lane][i], 0xff, sizeof(float));
      }
    }
  }
}

struct product_call {
  float *d;
  const uint32_t *a;
  uint64_t a_matrix, b;
  int columns;
  bool turned, add;
};

int chain_of(warp_products *w, void *const *of) {
  const product_call *first = (const product_call *)of[0];
  for (int i = 0; i < CHAINS; i++)
    if (w->chains[i].products && w->chains[i].d[0] == first->d) return i;
  for (int i = 0; i < CHAINS; i++) {
    chain *c = &w->chains[i];
    if (c->products) continue;
    if (!w->fenced) acre_host_fault("a product of registers without wgmma.fence");
    c->columns = first->columns;
    for (int lane = 0; lane < LANES; lane++)
      c->d[lane] = ((const product_call *)of[lane])->d;
    exchange(c, false);
    return i;
  }
  acre_host_fault("products in more accumulators than the host has room for");
  return 0;
}

void compute_all(warp_products *w, int count) {
  for (; w->computed < count; w->computed++) compute(w, w->waiting[w->computed]);
}

void issue(void *const *of, int warp) {
  warp_products *w = &here.warps[warp];
  const product_call *call = (const product_call *)of[0];
  for (int lane = 0; lane < LANES; lane++) {
    const product_call *other = (const product_call *)of[lane];
    if (other->b != call->b || other->a_matrix != call->a_matrix ||
        other->columns != call->columns || other->add != call->add)
      acre_host_fault("a product that differs from lane to lane");
  }
  if (w->count == PRODUCTS) {
    acre_host_fault("more products under way than the host has room for");
    return;
  }
  product *p = &w->waiting[w->count++];
  *p = product{{NULL},   call->a_matrix, call->b,      chain_of(w, of),
               w->group, warp,           call->turned, call->add};
  for (int lane = 0; lane < LANES; lane++) p->a[lane] = ((const product_call *)of[lane])->a;
  w->chains[p->chain].products++;
  if (here.early) compute_all(w, w->count);
}

void fence(void *const *, int warp) { here.warps[warp].fenced = true; }
void commit(void *const *, int warp) { here.warps[warp].group++; }

void wait(void *const *of, int warp) {
  warp_products *w = &here.warps[warp];
  int over = w->group - *(const int *)of[0], done = 0;
  while (done < w->count && w->waiting[done].group < over) done++;
  compute_all(w, done);
  for (int i = 0; i < done; i++) {
    chain *c = &w->chains[w->waiting[i].chain];
    if (--c->products == 0) exchange(c, true);
  }
  w->count -= done, w->computed -= done;
  memmove(w->waiting, w->waiting + done, (size_t)w->count * sizeof *w->waiting);
  w->fenced = false;
}

}  // namespace

extern "C" {

void acre_hopper_begin(unsigned char *shared, size_t bytes) {
  here.shared = shared, here.bytes = bytes;
  here.used = false, here.copy_count = 0;
  here.early = acre_host_random() % 2;
  here.copying = acre_host_random() % 3 * 4;
  memset(here.names, 0, sizeof here.names);
  for (warp_products &w : here.warps) {
    w.count = w.computed = w.group = 0, w.fenced = false;
    for (chain &c : w.chains) c.products = 0;
  }
}

bool acre_hopper_step(uint64_t random, bool must) {
  bool moves = must || (here.copying && random % here.copying == 0);
  if (here.copy_count == 0 || !moves) return false;
  int chosen = (int)(random / 64 % (uint64_t)here.copy_count);
  copy c = here.copies[chosen];
  here.copies[chosen] = here.copies[--here.copy_count];
  perform(c);
  return true;
}

bool acre_hopper_end(void) {
  if (here.copy_count) acre_host_fault("bulk copies under way at the end of a block");
  for (const warp_products &w : here.warps)
    if (w.count) acre_host_fault("products under way at the end of a block");
  for (const name &n : here.names)
    if (n.arrived) acre_host_fault("a named barrier half full at the end of a block");
  return true;
}

void acre_host_name_sync(int id, int threads) {
  uint32_t generation = here.names[id].generation;
  acre_host_await(generation_over, come_to(id, threads), generation, ACRE_WAIT_NAME);
}
void acre_host_name_arrive(int id, int threads) { come_to(id, threads); }

void acre_host_mbarrier_init(uint64_t *barrier, int count) {
  mbarrier b = {(uint64_t)count, (uint64_t)count, NO_BYTES, 0, MAGIC};
  memcpy(barrier, &b, sizeof b);
}
void acre_host_mbarrier_arrive(uint64_t *barrier) { arrive(barrier, 0); }
void acre_host_mbarrier_expect(uint64_t *barrier, int bytes) { arrive(barrier, bytes); }
void acre_host_mbarrier_wait(uint64_t *barrier, unsigned parity) {
  acre_host_await(phase_over, barrier, parity, ACRE_WAIT_MBARRIER);
}

void acre_host_box_copy(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier) {
  use();
  copy c = {};
  memcpy(&c.map, map, sizeof c.map);
  c.to = (unsigned char *)to, c.x = x, c.y = y, c.barrier = barrier;
  size_t bytes = (size_t)c.map.box_rows * BOX_ROW;
  if (c.map.magic != BOX_MAGIC || (uintptr_t)to % 128)
    acre_host_fault("a box without a tensor map, or not at a multiple of 128 bytes");
  else if (here.copy_count == COPIES)
    acre_host_fault("more bulk copies under way than the host has room for");
  else {
    size_t at = place((uintptr_t)to - shared_origin(), bytes);
    memset(here.shared + at, 0xff, bytes);
    memset(here.view + at, 0xff, bytes);
    here.copies[here.copy_count++] = c;
  }
}

void acre_host_proxy_fence(void) {
  use();
  memcpy(here.view, here.shared, here.bytes);
}

unsigned acre_host_shared_address(const void *shared) {
  return (unsigned)((uintptr_t)shared - shared_origin());
}

void acre_host_wgmma(float *d, int columns, const uint32_t *a, uint64_t a_matrix,
                     uint64_t b, bool turned, bool add) {
  use();
  product_call call = {d, a, a_matrix, b, columns, turned, add};
  acre_host_together(issue, &call, ACRE_WAIT_WGMMA);
}
void acre_host_wgmma_fence(void) { acre_host_together(fence, NULL, ACRE_WAIT_WGMMA); }
void acre_host_wgmma_commit(void) { acre_host_together(commit, NULL, ACRE_WAIT_WGMMA); }
void acre_host_wgmma_wait(int left) { acre_host_together(wait, &left, ACRE_WAIT_WGMMA); }

/* What the driver demands of a map, as far as it is asked for here. */
static CUresult encode(CUtensorMap *out, CUtensorMapDataType type, cuuint32_t rank,
                       void *data, const cuuint64_t *sizes, const cuuint64_t *strides,
                       const cuuint32_t *box, const cuuint32_t *steps,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool right =
      type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 2 && (uintptr_t)data % 16 == 0 &&
      (uintptr_t)out % 64 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
      swizzle == CU_TENSOR_MAP_SWIZZLE_128B && strides[0] % 16 == 0 &&
      strides[0] < (uint64_t)1 << 40 && box[0] * 2 == BOX_ROW && box[1] && box[1] <= 256;
  for (int i = 0; i < 2; i++)
    right = right && sizes[i] && sizes[i] <= (uint64_t)1 << 32 && steps[i] == 1;
  if (!right) return CUDA_ERROR_INVALID_VALUE;
  box_map map = {(const char *)data, sizes[0], sizes[1], strides[0], box[0], box[1],
                 BOX_MAGIC};
  memset(out, 0, sizeof *out);
  memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  *result = cudaDriverEntryPointSuccess;
  *out = strcmp(symbol, "cuTensorMapEncodeTiled") == 0 ? (void *)encode : NULL;
  return *out ? cudaSuccess : cudaErrorInvalidValue;
}
}
