/* The runtime's calls on the host: devices, and memory that is memory.
 *
 * Memory comes from acre_alloc, so the tests of leaks and of memory that runs out hold here,
 * too. A call can be made to fail (host.h). Of memory that it did not give itself, or gave as
 * the device's, the runtime says now that it lies on the device, now that it does not: both
 * are true here, and both ways of copying must be right. Where streams are in disorder it says
 * the truth: what lies on the host is read at once.
 *
 * With ACRE_HOST_APART in the environment device memory can be touched by kernels and copies
 * alone, as on a device: whoever else does is stopped. For one thread at a time. */
#include "apart.h"
#include "cuda_runtime.h"
#include "host.h"
#include "platform.h"

#include <pthread.h>

acre_host_machine acre_host_is = {13000, 1, 8, 0, 0};

namespace {

const size_t POISONED = (size_t)1 << 20; /* the first bytes of an allocation */

thread_local int device;
thread_local cudaError_t last = cudaSuccess;
int fail_error;
int64_t fail_countdown;
uint64_t told;

/* What a call that may fail returns: success, but for the one that must not succeed. */
cudaError_t result(cudaError_t error = cudaSuccess) {
  if (fail_countdown > 0 && --fail_countdown == 0) error = (cudaError_t)fail_error;
  if (error != cudaSuccess) last = error;
  return error;
}

/* What was given and is still held. */
struct block {
  const char *memory;
  size_t bytes;
  cudaMemoryType type;
};

constexpr int BLOCKS = 4096;
block blocks[BLOCKS];
int block_count;
size_t device_bytes, device_limit;
pthread_mutex_t of_blocks = PTHREAD_MUTEX_INITIALIZER;

bool keep(const void *memory, size_t bytes, cudaMemoryType type) {
  pthread_mutex_lock(&of_blocks);
  bool device = type == cudaMemoryTypeDevice;
  bool room = block_count < BLOCKS &&
              (!device || !device_limit || device_bytes + bytes <= device_limit);
  if (room) blocks[block_count++] = {(const char *)memory, bytes, type};
  if (room && device) device_bytes += bytes;
  pthread_mutex_unlock(&of_blocks);
  return room;
}

void forget(const void *memory) {
  pthread_mutex_lock(&of_blocks);
  for (int i = 0; i < block_count; i++)
    if (blocks[i].memory == memory) {
      if (blocks[i].type == cudaMemoryTypeDevice) device_bytes -= blocks[i].bytes;
      blocks[i] = blocks[--block_count];
      break;
    }
  pthread_mutex_unlock(&of_blocks);
}

}  // namespace

extern "C" {

cudaError_t acre_host_result(void) { return result(); }

/* Of Hopper; else the least of the chips that are supported. */
size_t acre_host_shared_most(void) {
  return (size_t)(acre_host_is.major == 9 ? 227 : 99) * 1024;
}

void acre_host_limit(size_t bytes) { device_limit = bytes; }

void acre_host_fail(int error, int64_t call) { fail_error = error, fail_countdown = call; }

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
  }
  return "unknown error";
}

const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "as the host tells it";
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = acre_host_is.driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = acre_host_is.devices;
  if (acre_host_is.driver < 13000) return cudaErrorInsufficientDriver;
  return acre_host_is.devices ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int *out) {
  *out = device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  device = ordinal;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = acre_host_is.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = acre_host_is.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (int)acre_host_shared_most();
      break;
  }
  return result();
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  size_t most = acre_host_is.available ? acre_host_is.available : acre_memory_available();
  *total = device_limit ? device_limit : most;
  *available = device_limit ? device_limit - device_bytes : most;
  return result();
}

void acre_host_access(bool begins) { acre_apart_access(begins); }

cudaMemoryType acre_host_memory(const void *memory) {
  cudaMemoryType type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&of_blocks);
  for (int i = 0; i < block_count; i++) {
    size_t at = (size_t)((const char *)memory - blocks[i].memory);
    if (at < blocks[i].bytes) type = blocks[i].type;
  }
  pthread_mutex_unlock(&of_blocks);
  return type;
}

cudaError_t acre_host_malloc(void **out, size_t bytes, bool device_memory) {
  *out = NULL;
  cudaError_t error = result();
  if (error != cudaSuccess) return error;
  *out = device_memory && acre_apart_wanted() ? acre_apart_alloc(bytes) : acre_alloc(bytes);
  if (!*out) return result(cudaErrorMemoryAllocation);
  if (!keep(*out, bytes, device_memory ? cudaMemoryTypeDevice : cudaMemoryTypeHost)) {
    cudaFreeHost(*out);
    return result(cudaErrorMemoryAllocation);
  }
  acre_host_access(true);
  memset(*out, 0xff, bytes < POISONED ? bytes : POISONED); /* nobody may count on zeros */
  acre_host_access(false);
  return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
  acre_host_settle_all();
  return cudaFreeHost(memory);
}

/* Waits for nobody. */
cudaError_t cudaFreeHost(void *memory) {
  forget(memory);
  if (!acre_apart_free(memory)) acre_free(memory);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *memory) {
  out->type = acre_host_memory(memory);
  out->devicePointer = out->type ? (void *)memory : NULL;
  if (out->type == cudaMemoryTypeHost || acre_apart_wanted() || acre_host_in_disorder())
    return cudaSuccess;
  told = told * 6364136223846793005u + 1442695040888963407u;
  out->type = told >> 63 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
}
