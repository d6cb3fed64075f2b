#include "plugin.h"

#include "status.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

/* N of "cuda" (0) or "cuda:N"; -1 for anything else. */
static int32_t ordinal_of(const char *device) {
  if (strcmp(device, "cuda") == 0) return 0;
  if (strncmp(device, "cuda:", 5) != 0 || device[5] < '0' || device[5] > '9') return -1;
  char *end;
  long ordinal = strtol(device + 5, &end, 10);
  return *end || ordinal > INT16_MAX ? -1 : (int32_t)ordinal;
}

/* A symbol as a function: ISO C has no cast for it. */
static acre_cuda_open open_function(void *plugin) {
  void *symbol = dlsym(plugin, "acre_cuda_backend_open");
  acre_cuda_open function;
  memcpy(&function, &symbol, sizeof function);
  return function;
}

/* Never unloaded: a buffer may outlive the engine, and its code with it. */
acre_status acre_plugin_open(acre_backend **out, const char *path, const char *libraries,
                             const char *device, acre_error *error) {
  *out = NULL;
  int32_t ordinal = ordinal_of(device);
  if (ordinal < 0)
    return acre_fail(error, ACRE_BAD_VALUE,
                     "device: got '%.40s', expected 'cpu', 'cuda' or 'cuda:N'", device);
  if (!path)
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: got '%s', but this build of acre has no CUDA backend (it is "
                     "built where nvcc is found)",
                     device);
  void *plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!plugin)
    return acre_fail(error, ACRE_UNSUPPORTED, "device: the CUDA backend does not load: %s",
                     dlerror());
  const char *version = dlsym(plugin, "acre_cuda_version");
  acre_cuda_open open_backend = open_function(plugin);
  if (!version || !open_backend || strcmp(version, ACRE_VERSION) != 0)
    return acre_fail(
        error, ACRE_UNSUPPORTED,
        "device: the CUDA backend %s is of version %.20s, expected " ACRE_VERSION
        "; build or install acre anew",
        path, version && open_backend ? version : "unknown");
  const size_t *seam = dlsym(plugin, "acre_cuda_seam");
  if (!seam || *seam != sizeof(acre_backend_ops))
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: the CUDA backend %s was built from other sources than this "
                     "build of acre; build or install both anew",
                     path);
  acre_cuda_options options = {sizeof options, libraries, 0, 0};
  return open_backend(out, ordinal, &options, error);
}
