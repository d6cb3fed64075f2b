/* What tests may ask of the host's CUDA, or make it do. */
#ifndef ACRE_HOST_H
#define ACRE_HOST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The machine that the runtime tells of. Versions as 1000 * major + 10 * minor. */
typedef struct acre_host_machine {
  int driver, devices, major, minor;
  size_t available; /* bytes of device memory that are free; 0: what this machine has */
} acre_host_machine;

extern acre_host_machine acre_host_is;

void acre_host_seed(uint64_t seed); /* of the order of blocks and threads */
int64_t acre_host_launches(void);   /* of kernels, so far */
const char *acre_host_kernel(void); /* the last of them, as its launch has it */
int64_t acre_host_conflicts(void);  /* of banks that matrix instructions met, so far */
void acre_host_fail(int error,
                    int64_t call); /* the call-th of the calls that can, from 1 */

/* The device has so many bytes in all, and gives no more; 0: whatever the host has. */
void acre_host_limit(size_t bytes);
/* From now on streams do what is asked of them at once for a while, and then for a while not
 * before somebody waits, by turns that this seed decides; 0: everything at once, as at first.
 * For one thread at a time. */
void acre_host_disorder(uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
