/* A backend in a shared object of its own, loaded only when its device is asked for.
 *
 * The plug-in exports acre_cuda_version, which must be this library's ACRE_VERSION,
 * acre_cuda_seam, which must be the size of this library's table of operations, and
 * acre_cuda_backend_open. */
#ifndef ACRE_PLUGIN_H
#define ACRE_PLUGIN_H

#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ACRE_PLUGIN_API __attribute__((visibility("default")))

typedef struct acre_cuda_options {
  size_t struct_size;
  const char *libraries;  /* directories to look for cuBLASLt and NCCL in, ':' between; or
                             NULL */
  size_t workspace_bytes; /* scratch of a queue, for products and sums; 0: the default */
  size_t staging_bytes;   /* pinned memory of a queue, for copies; 0: the default */
} acre_cuda_options;

typedef acre_status (*acre_cuda_open)(acre_backend **out, int32_t ordinal,
                                      const acre_cuda_options *options, acre_error *error);

/* Defined by the plug-in. */
ACRE_PLUGIN_API extern const char acre_cuda_version[];
ACRE_PLUGIN_API extern const size_t acre_cuda_seam; /* sizeof(acre_backend_ops) */
ACRE_PLUGIN_API acre_status acre_cuda_backend_open(acre_backend **out, int32_t ordinal,
                                                   const acre_cuda_options *options,
                                                   acre_error *error);

/* Loads the plug-in at `path` for good and opens the device that `device` names: "cuda" or
 * "cuda:N". Refuses, with a sentence that says what to do, where the file is missing, is
 * none, or is of another version. */
acre_status acre_plugin_open(acre_backend **out, const char *path, const char *libraries,
                             const char *device, acre_error *error);

#ifdef __cplusplus
}
#endif
#endif
