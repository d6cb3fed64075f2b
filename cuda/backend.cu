/* The CUDA backend's table, and how a device is opened or refused. */
#include "gemm.h"
#include "sm80/sm80.h"
#include "sm90/attend.h"

#include <stdio.h>
#include <string.h>

namespace acre {
namespace {

constexpr int CAPABILITY_LEAST = 80; /* 8.0: bf16 matrix units, asynchronous copies */
constexpr size_t WORKSPACE_BYTES = (size_t)96 << 20;
constexpr size_t STAGING_BYTES = (size_t)1 << 20;
constexpr size_t WORKSPACE_LEAST = 4096, STAGING_LEAST = 64;
constexpr int64_t ROWS_MAX = 4096; /* rows of a pass: large products fill the device */

/* ------------------------------------------------------------------ operations */

acre_status sync(acre_queue *queue, acre_error *error) {
  on_device scope(queue->owner->ordinal);
  check(&queue->failure, cudaStreamSynchronize(queue->stream),
        ACRE_SITE("cudaStreamSynchronize"));
  return report(queue, error);
}

void upload(acre_queue *queue, void *dst, const void *host, size_t bytes) {
  send(queue, dst, host, bytes);
}

void destroy(acre_backend *base) {
  if (!base) return;
  backend *owner = (backend *)base;
  queue_close(owner->loader);
  owner->loader = NULL;
  leave(owner);
}

/* Kernels for some chips take the places of the plain ones here, once, by what the chip can
 * do: those of a later chip over those of an earlier one, to which they leave the rest. */
void choose_for(acre_backend_ops *ops, const backend *owner) {
  if (owner->chip.major >= 8) {
    ops->attend = acre_cuda_sm80_attend;
    ops->attend_back = acre_cuda_sm80_attend_back;
  }
  if (owner->tensor_maps) ops->attend = acre_cuda_sm90_attend;
}

acre_backend_ops operations_for(const backend *owner) {
  acre_backend_ops ops = {};
  ops.name = "cuda";
  ops.alloc = alloc;
  ops.alloc_host = alloc_host;
  ops.available = available;
  ops.destroy = destroy;
  ops.queue_open = queue_open;
  ops.mover_open = mover_open;
  ops.queue_close = queue_close;
  ops.sync = sync;
  ops.follow = follow;
  ops.upload = upload;
  ops.download = download;
  ops.stream = acre_cuda_stream;
  ops.fetch = acre_cuda_fetch;
  ops.store_array = acre_cuda_store_array;
  ops.matrix_create = acre_cuda_matrix_create;
  ops.matrix_release = acre_cuda_matrix_release;
  ops.matrix_fill = acre_cuda_matrix_fill;
  ops.matrix_get = acre_cuda_matrix_get;
  ops.matrix_set = acre_cuda_matrix_set;
  ops.matrix_transpose = acre_cuda_matrix_transpose;
  ops.embed = acre_cuda_embed;
  ops.rmsnorm = acre_cuda_rmsnorm;
  ops.matmul = acre_cuda_matmul;
  ops.swiglu = acre_cuda_swiglu;
  ops.cross_entropy = acre_cuda_cross_entropy;
  ops.gather_rows = acre_cuda_gather_rows;
  ops.scatter_rows = acre_cuda_scatter_rows;
  ops.rope = acre_cuda_rope;
  ops.store_kv = acre_cuda_store_kv;
  ops.rotate = acre_cuda_rotate;
  ops.copy_rows = acre_cuda_copy_rows;
  ops.pool = acre_cuda_pool;
  ops.attend = acre_cuda_attend;
  ops.score = acre_cuda_score;
  ops.clear = acre_cuda_clear;
  ops.round = acre_cuda_round;
  ops.add_rows = acre_cuda_add_rows;
  ops.rmsnorm_back = acre_cuda_rmsnorm_back;
  ops.swiglu_back = acre_cuda_swiglu_back;
  ops.cross_entropy_back = acre_cuda_cross_entropy_back;
  ops.matmul_back = acre_cuda_matmul_back;
  ops.attend_back = acre_cuda_attend_back;
  ops.score_back = acre_cuda_score_back;
  ops.sum_squares = acre_cuda_sum_squares;
  ops.adamw = acre_cuda_adamw;
  ops.argmax = acre_cuda_argmax;
  ops.top = acre_cuda_top;
  ops.penalize = acre_cuda_penalize;
  ops.loop_record = acre_cuda_loop_record;
  ops.loop_run = acre_cuda_loop_run;
  ops.loop_read = acre_cuda_loop_read;
  ops.loop_release = acre_cuda_loop_release;
  ops.peers_invite = acre_cuda_peers_invite;
  ops.peers_open = acre_cuda_peers_open;
  ops.peers_close = acre_cuda_peers_close;
  ops.peers_sum = acre_cuda_peers_sum;
  ops.peers_wait = acre_cuda_peers_wait;
  choose_for(&ops, owner);
  return ops;
}

/* ------------------------------------------------------------------ opening */

/* "13.0" of a version as CUDA counts them. */
struct version_text {
  char text[24];
  explicit version_text(int version) {
    snprintf(text, sizeof text, "%d.%d", version / 1000, version % 1000 / 10);
  }
};

/* A driver that this runtime can work with, and at least one device. */
acre_status find_devices(int *count, acre_error *error) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0)
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: no NVIDIA driver is installed on this machine");
  cudaError_t failed = cudaGetDeviceCount(count);
  if (failed == cudaErrorInsufficientDriver)
    return acre_fail(
        error, ACRE_UNSUPPORTED,
        "device: the NVIDIA driver is too old: it supports CUDA %s, this build "
        "of acre needs %s",
        version_text(driver).text, version_text(runtime).text);
  if (failed == cudaErrorNoDevice || (failed == cudaSuccess && *count == 0))
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: there is a driver for CUDA %s, but no GPU that it can use",
                     version_text(driver).text);
  return failed == cudaSuccess ? ACRE_OK
                               : refuse(error, failed, ACRE_SITE("cudaGetDeviceCount"));
}

acre_status read_limits(limits *chip, int ordinal, acre_error *error) {
  int shared = 0;
  const struct {
    int *value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&chip->major, cudaDevAttrComputeCapabilityMajor},
                {&chip->minor, cudaDevAttrComputeCapabilityMinor},
                {&chip->processors, cudaDevAttrMultiProcessorCount},
                {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto &one : wanted) {
    cudaError_t failed = cudaDeviceGetAttribute(one.value, one.attribute, ordinal);
    if (failed != cudaSuccess)
      return refuse(error, failed, ACRE_SITE("cudaDeviceGetAttribute"));
  }
  chip->shared = (size_t)shared;
  if (chip->major * 10 + chip->minor < CAPABILITY_LEAST)
    return acre_fail(
        error, ACRE_UNSUPPORTED,
        "device: cuda:%d has compute capability %d.%d, expected %d.%d or later", ordinal,
        chip->major, chip->minor, CAPABILITY_LEAST / 10, CAPABILITY_LEAST % 10);
  return ACRE_OK;
}

acre_status choose_device(limits *chip, int ordinal, acre_error *error) {
  int count = 0;
  ACRE_TRY(find_devices(&count, error));
  if (ordinal < 0 || ordinal >= count)
    return acre_fail(error, ACRE_BAD_VALUE,
                     "device: got cuda:%d, this machine has %d GPU%s (cuda:0%s)", ordinal,
                     count, count == 1 ? "" : "s", count == 1 ? "" : "...");
  return read_limits(chip, ordinal, error);
}

size_t size_or(size_t given, size_t otherwise, size_t least) {
  size_t bytes = given ? given : otherwise;
  bytes = bytes < least ? least : bytes;
  return (bytes + ACRE_ALIGN - 1) / ACRE_ALIGN * ACRE_ALIGN;
}

acre_status keep_libraries(backend *owner, const char *libraries, acre_error *error) {
  if (!libraries) return ACRE_OK;
  size_t bytes = strlen(libraries) + 1;
  owner->libraries = (char *)acre_alloc(bytes);
  if (!owner->libraries)
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a backend");
  memcpy(owner->libraries, libraries, bytes);
  return ACRE_OK;
}

acre_status fill(backend *owner, int ordinal, const acre_cuda_options &options,
                 acre_error *error) {
  owner->ordinal = ordinal;
  owner->references = 1;
  owner->workspace_bytes =
      size_or(options.workspace_bytes, WORKSPACE_BYTES, WORKSPACE_LEAST);
  owner->staging_bytes = size_or(options.staging_bytes, STAGING_BYTES, STAGING_LEAST);
  snprintf(owner->isa, sizeof owner->isa, "sm_%d%d", owner->chip.major, owner->chip.minor);
  if (owner->chip.major == 9 && owner->chip.minor == 0)
    owner->tensor_maps = sm90::find_tensor_maps();
  owner->ops = operations_for(owner);
  owner->base.ops = &owner->ops;
  owner->base.isa = owner->isa;
  owner->base.threads = 1;
  owner->base.rows_max = ROWS_MAX;
  owner->base.apart = true;
  owner->base.queue_bytes = owner->workspace_bytes;
  owner->base.mover_bytes = MOVER_BYTES;
  owner->loading = acre_mutex_new();
  if (!owner->loading)
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a backend");
  ACRE_TRY(keep_libraries(owner, options.libraries, error));
  ACRE_TRY(gemm_library_open(&owner->gemm, options.libraries, error));
  return queue_open_with(owner, MOVER_BYTES, false, &owner->loader, error);
}

}  // namespace
}  // namespace acre

extern "C" {

const char acre_cuda_version[] = ACRE_VERSION;
const size_t acre_cuda_seam = sizeof(acre_backend_ops);

acre_status acre_cuda_backend_open(acre_backend **out, int32_t ordinal,
                                   const acre_cuda_options *given, acre_error *error) {
  *out = NULL;
  acre_cuda_options options;
  ACRE_TAKE_OPTIONS(options, (acre_cuda_options{sizeof options, NULL, 0, 0}), given);
  acre::limits chip = {};
  ACRE_TRY(acre::choose_device(&chip, ordinal, error));
  acre::backend *owner = (acre::backend *)acre_alloc_zero(sizeof *owner);
  if (!owner) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a backend");
  owner->chip = chip;
  acre_status status = acre::fill(owner, ordinal, options, error);
  if (status != ACRE_OK) {
    acre::destroy(&owner->base);
    return status;
  }
  *out = &owner->base;
  return ACRE_OK;
}
}
