/* Window attention on Hopper: where everything lies in a block's shared memory. */
#ifndef ACRE_CUDA_SM90_ATTEND_H
#define ACRE_CUDA_SM90_ATTEND_H

#include "internal.h"
#include "sm90/wgmma.h"

namespace acre {
namespace sm90 {

constexpr int KEYS = 128;    /* of a tile */
constexpr int CONSUMERS = 2; /* warpgroups, PRODUCT_ROWS items each */
constexpr int BLOCK_ITEMS = CONSUMERS * PRODUCT_ROWS;
constexpr int BLOCK_THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int SHARED_MOST = 227 * 1024; /* of a block */

/* Bytes from the first multiple of SWIZZLE_BYTES on. Queries, then rings of tiles of keys and
 * of values, then the barriers of both: each tile's `full` and `empty`. */
template <int D>
struct window_plan {
  static constexpr int STAGES = D == 64 ? 4 : 2;
  static constexpr int BOXES = D / BOX_COLUMNS;
  static constexpr int QUERY_BOX = PRODUCT_ROWS * BOX_ROW_BYTES;
  static constexpr int KEY_BOX = KEYS * BOX_ROW_BYTES;
  static constexpr int TILE_BYTES = BOXES * KEY_BOX;
  static constexpr int QUERIES = 0;
  static constexpr int RINGS = QUERIES + CONSUMERS * BOXES * QUERY_BOX; /* keys, values */
  static constexpr int BARRIERS = RINGS + 2 * STAGES * TILE_BYTES;
  static constexpr int BYTES = BARRIERS + 2 * STAGES * 2 * (int)sizeof(uint64_t);
  static constexpr int ASKED = BYTES + SWIZZLE_BYTES; /* wherever the first multiple is */
  static_assert(ASKED <= SHARED_MOST, "shared memory of a block");
  static_assert(RINGS % SWIZZLE_BYTES == 0 && TILE_BYTES % SWIZZLE_BYTES == 0, "swizzling");
};

/* setmaxnreg hands registers round within what the block began with. */
constexpr int registers_asked(void) {
  return WARPGROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS);
}
static_assert(registers_asked() <= BLOCK_THREADS * (65536 / BLOCK_THREADS / 8 * 8),
              "registers");

/* The driver's cuTensorMapEncodeTiled, or NULL. */
void *find_tensor_maps(void);

}  // namespace sm90
}  // namespace acre

/* As backend.h has it; what it is not made for goes to acre_cuda_sm80_attend. */
void acre_cuda_sm90_attend(acre_queue *, void *out, int64_t out_stride, float *lse,
                           const float *q, int64_t q_stride, const acre_keys *prefix,
                           const acre_keys *own, int64_t seen, int64_t rows, bool split,
                           const acre_heads *);

#endif
