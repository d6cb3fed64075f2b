/* What Hopper's own instructions do, on the host: barriers that count bytes, the bulk copy
 * engine, matrix products of a warpgroup.
 *
 * All of it is asynchronous here, too. A bulk copy fills its destination with NaN when it is
 * issued and arrives at some later turn of the block, or not before nobody else can go on. A
 * product leaves NaN in its accumulators until the group that it was committed to has been
 * waited for, and reads its operands at once or then. Operands are found by their
 * descriptors. What the copy engine and the products read of shared memory is a view of its
 * own, in which ordinary stores show once a thread has called the proxy fence. */
#ifndef ACRE_HOST_HOPPER_H
#define ACRE_HOST_HOPPER_H

#include "cuda.h"

extern "C" {
/* For run.cpp. */
void acre_hopper_begin(unsigned char *shared, size_t bytes); /* a block */
bool acre_hopper_step(uint64_t random,
                      bool must); /* whether the copy engine did something */
bool acre_hopper_end(void);       /* whether nothing is left undone */

/* Of run.cpp: a wait for a condition, randomness, a broken rule. */
void acre_host_await(bool (*ready)(const void *, uint32_t), const void *what,
                     uint32_t which, acre_host_wait kind);
uint64_t acre_host_random(void);
void acre_host_fault(const char *rule);

void acre_host_name_sync(int name, int threads);
void acre_host_name_arrive(int name, int threads);

void acre_host_mbarrier_init(uint64_t *barrier, int count);
void acre_host_mbarrier_arrive(uint64_t *barrier);
void acre_host_mbarrier_expect(uint64_t *barrier, int bytes);
void acre_host_mbarrier_wait(uint64_t *barrier, unsigned parity);
void acre_host_box_copy(void *to, const CUtensorMap *map, int x, int y, uint64_t *barrier);
void acre_host_proxy_fence(void);

unsigned acre_host_shared_address(const void *shared);
void acre_host_wgmma(float *d, int columns, const uint32_t *a, uint64_t a_matrix,
                     uint64_t b, bool turned, bool add);
void acre_host_wgmma_fence(void);
void acre_host_wgmma_commit(void);
void acre_host_wgmma_wait(int left);
}

#endif
