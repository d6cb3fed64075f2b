/* The bulk copy engine and what announces that it is done: boxes of a matrix of bf16 come to
 * shared memory, 128 bytes of each row, with the 16-byte units of a row exchanged by its number
 * modulo 8, and count their bytes at a barrier in shared memory.
 *
 * On the host the same calls are emulated (host/hopper.h). */
#ifndef ACRE_CUDA_SM90_BULK_H
#define ACRE_CUDA_SM90_BULK_H

#include "device.h"

#include <cuda.h>
#ifndef __CUDACC__
#include "hopper.h"
#endif

namespace acre {
namespace sm90 {

constexpr int BOX_COLUMNS = 64; /* of bf16: the 128 bytes that are swizzled together */
constexpr int BOX_ROW_BYTES = 128;
constexpr int SWIZZLE_BYTES = 1024; /* eight rows, after which the pattern repeats */

/* Where unit `unit` (16 bytes) of row `row` lies in a box that starts at a multiple of
 * SWIZZLE_BYTES. */
__device__ __forceinline__ int swizzled(int row, int unit) {
  return row * BOX_ROW_BYTES + (unit ^ (row & 7)) * PACK_BYTES;
}

#ifdef __CUDACC__

/* Phase after phase: one is over once `count` arrivals and all the bytes expected in it came. */
__device__ __forceinline__ void barrier_init(uint64_t *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}

/* What was initialised is there for the copy engine; before a __syncthreads. */
__device__ __forceinline__ void barriers_ready(void) {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/* Arrives, and so many more bytes will. */
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

/* Until the phase of this parity is over: 0 for the first; 1 is over from the beginning. */
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/* The box at column x of row y. */
__device__ __forceinline__ void box_copy(void *to, const CUtensorMap *map, int x, int y,
                                         uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

/* What this thread has stored to shared memory is there for products; before a barrier. */
__device__ __forceinline__ void proxy_fence(void) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* A barrier for some warps of a block, by name, 1 to 15: `threads` come to it, those that wait
 * and those that go on. */
__device__ __forceinline__ void name_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void name_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

/* Registers of each thread of this warpgroup from here on. */
template <int COUNT>
__device__ __forceinline__ void fewer_registers(void) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers(void) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#else

inline unsigned shared_address(const void *shared) {
  return acre_host_shared_address(shared);
}
inline void barrier_init(uint64_t *barrier, int count) {
  acre_host_mbarrier_init(barrier, count);
}
inline void barriers_ready(void) {}
inline void barrier_arrive(uint64_t *barrier) { acre_host_mbarrier_arrive(barrier); }
inline void barrier_expect(uint64_t *barrier, int bytes) {
  acre_host_mbarrier_expect(barrier, bytes);
}
inline void barrier_wait(uint64_t *barrier, unsigned parity) {
  acre_host_mbarrier_wait(barrier, parity);
}
inline void box_copy(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier) {
  acre_host_box_copy(to, map, x, y, barrier);
}
inline void proxy_fence(void) { acre_host_proxy_fence(); }
inline void name_sync(int name, int threads) { acre_host_name_sync(name, threads); }
inline void name_arrive(int name, int threads) { acre_host_name_arrive(name, threads); }
template <int COUNT>
void fewer_registers(void) {}
template <int COUNT>
void more_registers(void) {}

#endif

}  // namespace sm90
}  // namespace acre
#endif
