/* Matrix products of a warpgroup, 64 rows by 64 or 128 columns by 16 of the sum, of bf16 in
 * float32. They run on while the warpgroup does: a group of them is committed, and later
 * waited for.
 *
 * B, and A where it is not in registers, lies in shared memory as the bulk copy engine leaves a
 * box: rows of 128 bytes, swizzled, eight to a block of 1024 bytes. On the host the same calls
 * are emulated (host/hopper.h). */
#ifndef ACRE_CUDA_SM90_WGMMA_H
#define ACRE_CUDA_SM90_WGMMA_H

#include "sm90/bulk.h"

namespace acre {
namespace sm90 {

constexpr int WARPGROUP = 128; /* threads */
constexpr int PRODUCT_ROWS = 64, PRODUCT_DEPTH = 16;

/* What tells the products where an operand lies. stride: bytes from eight rows of a box to the
 * next eight. leading: where the rows of a box run along the sum (TURNED), from its 64 columns
 * to the next box's; else not used. */
__device__ __forceinline__ uint64_t matrix_at(const void *shared, int leading) {
  constexpr uint64_t SWIZZLE_128 = 1, STRIDE = SWIZZLE_BYTES;
  return (uint64_t)(shared_address(shared) >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 |
         STRIDE >> 4 << 32 | SWIZZLE_128 << 62;
}

/* The same operand, so many bytes further on. */
__device__ __forceinline__ uint64_t matrix_after(uint64_t matrix, int bytes) {
  return matrix + (uint64_t)(bytes >> 4);
}

/* Thread t of the warpgroup has of the result, and of A in registers, rows 16 (t / 32) +
 * t % 32 / 4 and 8 more. Number i of its accumulators is of row fragment_row(i) of those two
 * and of column fragment_column(i); a[0..3] are pairs of A: of the two rows, then of the two
 * rows eight columns on. */
__device__ constexpr int fragment_row(int i) { return i / 2 % 2; }
__device__ __forceinline__ int fragment_column(int i, int lane) {
  return i / 4 * 8 + lane % 4 * 2 + i % 2;
}

/* d = a b, or d + a b. TURNED: the rows of b's box are those of the sum. */
#ifdef __CUDACC__

#define ACRE_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACRE_16(d, i) ACRE_4(d, i), ACRE_4(d, i + 4), ACRE_4(d, i + 8), ACRE_4(d, i + 12)
#define ACRE_32(d, i) ACRE_16(d, i), ACRE_16(d, i + 16)
#define ACRE_64(d, i) ACRE_32(d, i), ACRE_32(d, i + 32)

template <bool TURNED>
__device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, 0, %35;\n}\n"
      : ACRE_32(d, 0)
      : "l"(a), "l"(b), "r"((int)add), "n"((int)TURNED));
}
template <bool TURNED>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                        bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
      : ACRE_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),
        "n"((int)TURNED));
}

template <bool TURNED>
__device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, %67;\n}\n"
      : ACRE_64(d, 0)
      : "l"(a), "l"(b), "r"((int)add), "n"((int)TURNED));
}
template <bool TURNED>
__device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                        bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
      : ACRE_64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),
        "n"((int)TURNED));
}

#undef ACRE_4
#undef ACRE_16
#undef ACRE_32
#undef ACRE_64

/* Registers that were written are there for the products that follow. */
__device__ __forceinline__ void products_fence(void) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit(void) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Until at most LEFT of the committed groups are under way. */
template <int LEFT>
__device__ __forceinline__ void products_wait(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/* The compiler may not move what reads or writes these across this place. */
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&p)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(p[i / 4][i % 4])::"memory");
}

#else

template <bool TURNED, int N>
void product(float (&d)[N], uint64_t a, uint64_t b, bool add) {
  acre_host_wgmma(d, 2 * N, NULL, a, b, TURNED, add);
}
template <bool TURNED, int N>
void product(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add) {
  acre_host_wgmma(d, 2 * N, a, 0, b, TURNED, add);
}
inline void products_fence(void) { acre_host_wgmma_fence(); }
inline void products_commit(void) { acre_host_wgmma_commit(); }
template <int LEFT>
void products_wait(void) {
  acre_host_wgmma_wait(LEFT);
}
template <int N>
void hold(float (&)[N]) {}
template <int N>
void hold(uint32_t (&)[N][4]) {}

#endif

}  // namespace sm90
}  // namespace acre
#endif
