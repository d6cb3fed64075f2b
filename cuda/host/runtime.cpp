/* The runtime's calls on the host: memory is memory, and a stream does everything at once.
 *
 * Memory comes from acre_alloc, so the tests of leaks and of memory that runs out hold here,
 * too. A call can be made to fail (host.h). Of memory that it did not give itself the runtime
 * says now that it lies on the device, now that it does not: both are true here, and both
 * ways of copying must be right.
 *
 * With ACRE_HOST_APART in the environment device memory can be touched by kernels and copies
 * alone, as on a device: whoever else does is stopped. For one thread at a time. */
#include "apart.h"
#include "cuda_runtime.h"
#include "host.h"
#include "platform.h"

struct acre_host_event {
  int unused;
};

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

template <class T>
cudaError_t create(T **out) {
  *out = NULL;
  cudaError_t error = result();
  if (error != cudaSuccess) return error;
  *out = (T *)acre_alloc_zero(sizeof **out);
  return *out ? cudaSuccess : result(cudaErrorMemoryAllocation);
}

}  // namespace

extern "C" {

cudaError_t acre_host_result(void) { return result(); }

/* Of Hopper; else the least of the chips that are supported. */
size_t acre_host_shared_most(void) {
  return (size_t)(acre_host_is.major == 9 ? 227 : 99) * 1024;
}

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
  *available = acre_host_is.available ? acre_host_is.available : acre_memory_available();
  *total = *available;
  return result();
}

void acre_host_access(bool begins) { acre_apart_access(begins); }

cudaError_t acre_host_malloc(void **out, size_t bytes, bool device_memory) {
  *out = NULL;
  cudaError_t error = result();
  if (error != cudaSuccess) return error;
  *out = device_memory && acre_apart_wanted() ? acre_apart_alloc(bytes) : acre_alloc(bytes);
  if (!*out) return result(cudaErrorMemoryAllocation);
  acre_host_access(true);
  memset(*out, 0xff, bytes < POISONED ? bytes : POISONED); /* nobody may count on zeros */
  acre_host_access(false);
  return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
  if (!acre_apart_free(memory)) acre_free(memory);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  cudaError_t error = result();
  acre_host_access(true);
  if (error == cudaSuccess) memcpy(to, from, bytes);
  acre_host_access(false);
  return error;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
  cudaError_t error = result();
  acre_host_access(true);
  if (error == cudaSuccess) memset(to, value, bytes);
  acre_host_access(false);
  return error;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *memory) {
  if (acre_apart_wanted()) {
    out->type = acre_apart_has(memory) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
  }
  told = told * 6364136223846793005u + 1442695040888963407u;
  out->type = told >> 63 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
  cudaError_t error = create(out);
  if (error == cudaSuccess) (*out)->access = acre_host_access;
  return error;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaFree(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (stream->work && stream->work(stream->context)) stream->work = NULL;
  return result(stream->work ? cudaErrorNotReady : cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  while (stream->work && !stream->work(stream->context)) acre_sleep(1e-4);
  stream->work = NULL;
  return result();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) { return create(out); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaFree(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return result(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return result(); }
}
